// The copier on a CUDA runtime of its own: copies happen at once, and pinned memory is as strict as CUDA's. Two pieces may not
// share a page, and a copy may not begin in one and end beyond it.
#include "trainer/host_copier.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <numeric>
#include <thread>

#include "tests/host/temp_folder.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr uintptr_t kPage = 4096;

// What the runtime below has been asked for; the copier calls it from several threads.
struct Runtime {
    std::mutex mutex;
    std::map<uintptr_t, size_t> registered, buffers;
    std::vector<size_t> sizes;                                        // of what was registered
    std::vector<std::pair<Clock::time_point, Clock::time_point>> times;  // of each registration
    size_t most_registered = SIZE_MAX;
    size_t direct_bytes = 0, longest_queue = 0, queue = 0;
    std::chrono::milliseconds registration{0};
};
Runtime* runtime = nullptr;

bool holds(const std::map<uintptr_t, size_t>& pieces, uintptr_t at, size_t bytes) {
    for (const auto& [begin, size] : pieces)
        if (at >= begin && at + bytes <= begin + size) return true;
    return false;
}

bool touches(const std::map<uintptr_t, size_t>& pieces, uintptr_t at, size_t bytes) {
    for (const auto& [begin, size] : pieces)
        if (at < begin + size && begin < at + bytes) return true;
    return false;
}

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

constexpr size_t kMany = 3 * HostCopier::kPinnedBytes / sizeof(float) + 12345, kFew = 1000;

TEST_F(HostCopierTest, PinsInPiecesAndCopiesToEach) {
    const std::vector<float> device_many = numbers(kMany, 1), device_few = numbers(kFew, 7);
    std::vector<float> many(kMany), few(kFew);
    HostCopier copier;
    {
        const std::shared_ptr<void> pinned = copier.pin({many, few});
        EXPECT_GE(own.registered.size(), 4u);
        EXPECT_LE(*std::max_element(own.sizes.begin(), own.sizes.end()), HostCopier::kPinnedBytes);
        EXPECT_EQ(std::accumulate(own.sizes.begin(), own.sizes.end(), size_t(0)), kMany * sizeof(float)) << "all of the large one, none of the small one";
        copier.start({{few.data(), device_few.data(), kFew * sizeof(float)}, {many.data(), device_many.data(), kMany * sizeof(float)}}, nullptr).get();
        EXPECT_EQ(many, device_many);
        EXPECT_EQ(few, device_few);
        EXPECT_EQ(own.direct_bytes, kMany * sizeof(float));
    }
    EXPECT_TRUE(own.registered.empty());
    std::fill(many.begin(), many.end(), 0.0f);
    copier.start({{many.data(), device_many.data(), kMany * sizeof(float)}}, nullptr).get();
    EXPECT_EQ(many, device_many);
    EXPECT_EQ(own.direct_bytes, kMany * sizeof(float)) << "what is pinned no more is copied through buffers";
}

// Neither the begin nor the end of what is copied is a piece's.
TEST_F(HostCopierTest, CopiesAcrossPinnedAndOtherMemory) {
    const std::vector<float> device = numbers(2 * kMany, 3);
    std::vector<float> host(2 * kMany);
    HostCopier copier;
    const std::shared_ptr<void> pinned = copier.pin({std::span(host).subspan(kMany / 2, kMany)});
    for (const auto& [first, count] : {std::pair<size_t, size_t>{0, 2 * kMany}, {kMany / 2 + 77, kMany}, {kMany, 5}}) {
        std::fill(host.begin(), host.end(), 0.0f);
        copier.start({{host.data() + first, device.data() + first, count * sizeof(float)}}, nullptr).get();
        EXPECT_TRUE(std::equal(host.begin() + ptrdiff_t(first), host.begin() + ptrdiff_t(first + count), device.begin() + ptrdiff_t(first)));
        EXPECT_EQ(std::accumulate(host.begin(), host.begin() + ptrdiff_t(first), 0.0), 0.0);
        EXPECT_EQ(std::accumulate(host.begin() + ptrdiff_t(first + count), host.end(), 0.0), 0.0);
    }
}

TEST_F(HostCopierTest, AllOrNothingIsPinned) {
    const std::vector<float> device = numbers(kMany, 5);
    std::vector<float> host(kMany);
    HostCopier copier;
    own.most_registered = 2;
    EXPECT_NE(error_of([&] { copier.pin({host}); }), "");
    EXPECT_TRUE(own.registered.empty());
    copier.start({{host.data(), device.data(), kMany * sizeof(float)}}, nullptr).get();
    EXPECT_EQ(host, device);
}

// A step's launches wait while memory is pinned: they get as much time as the pinning takes.
TEST_F(HostCopierTest, RestsBetweenPieces) {
    std::vector<float> host(kMany);
    HostCopier copier;
    own.registration = std::chrono::milliseconds(20);
    const std::shared_ptr<void> pinned = copier.pin({host});
    for (size_t i = 1; i < own.times.size(); ++i) EXPECT_GE(own.times[i].first - own.times[i - 1].second, own.registration) << "piece " << i;
}

// More copies than a stream takes without making its caller wait.
TEST_F(HostCopierTest, AQueueStaysShort) {
    std::vector<float> host(HostCopier::kPinnedBytes), device = numbers(kFew, 1);
    HostCopier copier;
    const std::shared_ptr<void> pinned = copier.pin({host});
    std::vector<HostCopier::Range> ranges;
    for (size_t i = 0; i < 1000; ++i) ranges.push_back({host.data() + 2000 * i, device.data(), kFew * sizeof(float)});
    copier.start(ranges, nullptr).get();
    EXPECT_LE(own.longest_queue, 100u);
    for (size_t i = 0; i < 1000; ++i) EXPECT_EQ(host[2000 * i + kFew - 1], device[kFew - 1]) << i;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

extern "C" {

cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
    const auto start = Clock::now();
    std::this_thread::sleep_for(runtime->registration);
    const std::lock_guard lock(runtime->mutex);
    if (runtime->registered.size() >= runtime->most_registered) return cudaErrorMemoryAllocation;
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory), first = at / kPage * kPage, end = (at + bytes + kPage - 1) / kPage * kPage;
    for (const auto& [begin, size] : runtime->registered)
        if (first < (begin + size + kPage - 1) / kPage * kPage && begin / kPage * kPage < end) return cudaErrorHostMemoryAlreadyRegistered;
    runtime->registered[at] = bytes;
    runtime->sizes.push_back(bytes);
    runtime->times.emplace_back(start, Clock::now());
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) {
    const std::lock_guard lock(runtime->mutex);
    return runtime->registered.erase(reinterpret_cast<uintptr_t>(memory)) == 1 ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    const std::lock_guard lock(runtime->mutex);
    const uintptr_t at = reinterpret_cast<uintptr_t>(to);
    const bool direct = holds(runtime->registered, at, bytes);
    if (!direct && (touches(runtime->registered, at, bytes) || !holds(runtime->buffers, at, bytes))) return cudaErrorInvalidValue;
    if (direct) runtime->direct_bytes += bytes, runtime->longest_queue = std::max(runtime->longest_queue, ++runtime->queue);
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** memory, size_t bytes) {
    *memory = new char[bytes];
    runtime->buffers[reinterpret_cast<uintptr_t>(*memory)] = bytes;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
    delete[] static_cast<char*>(memory);
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    const std::lock_guard lock(runtime->mutex);
    runtime->queue = 0;
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
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the test's CUDA"; }

}  // extern "C"
