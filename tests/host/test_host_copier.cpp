// The copier on a CUDA runtime of its own, which is as late as CUDA may be: a copy happens when somebody waits for an event behind
// it, not before, and goes into pinned memory alone.
#include "trainer/host_copier.h"

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>

#include "tests/host/temp_folder.h"

namespace {

// What the runtime below has been asked for; the copier calls it from several threads.
struct Runtime {
    struct Operation {
        void* to;
        const void* from;
        size_t bytes;
        cudaEvent_t event;  // a record of it, if not null
    };
    std::mutex mutex;
    std::deque<Operation> stream;  // not done yet
    std::map<uintptr_t, size_t> buffers;
    size_t pinned_bytes = 0, most_pinned_bytes = 0, copies = 0;
    size_t failing_copy = SIZE_MAX;
};
Runtime* runtime = nullptr;

struct HostCopierTest : testing::Test {
    Runtime own;
    HostCopierTest() { runtime = &own; }
    ~HostCopierTest() override { runtime = nullptr; }
};

std::vector<float> numbers(size_t count, float first) {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = first + float(i % 100003);
    return values;
}

constexpr size_t kOfABuffer = HostCopier::kBufferBytes / sizeof(float);

TEST_F(HostCopierTest, CopiesArraysOfEverySize) {
    std::vector<std::vector<float>> device, host;
    std::vector<HostCopier::Range> ranges;
    for (const size_t count : {size_t(1), kOfABuffer - 1, kOfABuffer, size_t(1000), kOfABuffer + 1, 40 * kOfABuffer + 12345, size_t(0)}) {
        device.push_back(numbers(count, float(device.size() + 1)));
        host.emplace_back(count + 1, -1.0f);
    }
    for (size_t i = 0; i < device.size(); ++i) ranges.push_back({host[i].data(), device[i].data(), device[i].size() * sizeof(float)});
    HostCopier copier;
    for (int again = 0; again < 2; ++again) {
        for (std::vector<float>& values : host) std::fill(values.begin(), values.end(), -1.0f);
        copier.start(ranges, nullptr).get();
        for (size_t i = 0; i < device.size(); ++i) {
            EXPECT_TRUE(std::equal(device[i].begin(), device[i].end(), host[i].begin())) << device[i].size();
            EXPECT_EQ(host[i].back(), -1.0f) << "written beyond the end";
        }
    }
    EXPECT_LE(own.most_pinned_bytes, size_t(128) << 20);
}

// More ranges than buffers, all of one array.
TEST_F(HostCopierTest, CopiesPiecesOfAnArray) {
    const std::vector<float> device = numbers(1 << 20, 1);
    std::vector<float> host(device.size(), -1.0f);
    std::vector<HostCopier::Range> ranges;
    for (size_t i = 0; i < 1000; ++i) ranges.push_back({host.data() + 1000 * i, device.data() + 1000 * i, 999 * sizeof(float)});
    HostCopier copier;
    copier.start(ranges, nullptr).get();
    for (size_t i = 0; i < 1'000'000; ++i) ASSERT_EQ(host[i], i % 1000 == 999 ? -1.0f : device[i]) << i;
}

TEST_F(HostCopierTest, WaitsUntilTheSourcesAreRead) {
    const std::vector<float> before = numbers(20 * kOfABuffer, 1);
    std::vector<float> device = before, host(before.size());
    HostCopier copier;
    const std::shared_future<void> copied = copier.start({{host.data(), device.data(), device.size() * sizeof(float)}}, nullptr);
    copier.wait();
    std::fill(device.begin(), device.end(), 0.0f);
    copied.get();
    EXPECT_EQ(host, before);
}

TEST_F(HostCopierTest, TheFutureCarriesTheErrorOfEveryThread) {
    const std::vector<float> device = numbers(40 * kOfABuffer, 1);
    std::vector<float> host(device.size());
    for (const size_t failing : {0, 7, 25, 39}) {
        HostCopier copier;
        own.copies = 0, own.failing_copy = failing;
        const std::shared_future<void> copied = copier.start({{host.data(), device.data(), device.size() * sizeof(float)}}, nullptr);
        EXPECT_NE(error_of([&] { copied.get(); }), "") << failing;
        own.failing_copy = SIZE_MAX;
        copier.start({{host.data(), device.data(), device.size() * sizeof(float)}}, nullptr).get();
        EXPECT_EQ(host, device) << "after a failure";
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

extern "C" {

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    const std::lock_guard lock(runtime->mutex);
    if (runtime->copies++ == runtime->failing_copy) return cudaErrorUnknown;
    const auto buffer = runtime->buffers.find(reinterpret_cast<uintptr_t>(to));
    if (buffer == runtime->buffers.end() || bytes > buffer->second) return cudaErrorInvalidValue;
    runtime->stream.push_back({to, from, bytes, nullptr});
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    const std::lock_guard lock(runtime->mutex);
    runtime->stream.push_back({nullptr, nullptr, 0, event});
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const std::lock_guard lock(runtime->mutex);
    std::deque<Runtime::Operation>& stream = runtime->stream;
    size_t behind = stream.size();  // the event's last record
    while (behind > 0 && stream[behind - 1].event != event) --behind;
    for (; behind > 0; --behind) {
        if (stream.front().event == nullptr) std::memcpy(stream.front().to, stream.front().from, stream.front().bytes);
        stream.pop_front();
    }
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** memory, size_t bytes) {
    *memory = new char[bytes];
    runtime->buffers[reinterpret_cast<uintptr_t>(*memory)] = bytes;
    runtime->most_pinned_bytes = std::max(runtime->most_pinned_bytes, runtime->pinned_bytes += bytes);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
    runtime->pinned_bytes -= runtime->buffers.at(reinterpret_cast<uintptr_t>(memory));
    runtime->buffers.erase(reinterpret_cast<uintptr_t>(memory));
    delete[] static_cast<char*>(memory);
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(new char);
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete reinterpret_cast<char*>(event);
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the test's CUDA"; }

}  // extern "C"
