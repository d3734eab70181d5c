// The CUDA runtime of tests/fake_gpu/streams.h.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include "kernels/common/check.h"
#include "tests/fake_gpu/streams.h"

namespace {

struct Item {
    std::function<void()> work;     // or, when empty, an event:
    int64_t records = 0, waits = 0;  // number of the record that it makes or waits for; 0: none
};

struct Device {
    std::map<cudaStream_t, std::deque<Item>> streams;
    std::map<cudaEvent_t, int64_t> last_record;  // of each event, by number
    std::vector<bool> recorded{true};            // by number
    uintptr_t handles = 1;
    std::mt19937 random{1};
};
Device& device() {
    static Device one;  // a process has one GPU
    return one;
}

bool runnable(const std::deque<Item>& stream) { return !stream.empty() && (stream.front().waits == 0 || device().recorded[size_t(stream.front().waits)]); }

void run_one(std::deque<Item>& stream) {
    const Item item = std::move(stream.front());
    stream.pop_front();
    if (item.work) item.work();
    if (item.records) device().recorded[size_t(item.records)] = true;
}

}  // namespace

namespace fake_gpu {

void enqueue(cudaStream_t stream, std::function<void()> work) { device().streams[stream].push_back({.work = std::move(work)}); }

void seed(uint32_t value) { device().random.seed(value); }

void run_all() {
    while (true) {
        std::vector<std::deque<Item>*> ready;
        bool waiting = false;
        for (auto& [stream, items] : device().streams) {
            waiting = waiting || !items.empty();
            if (runnable(items)) ready.push_back(&items);
        }
        REQUIRE(!ready.empty() || !waiting, "a stream waits for an event that no stream will record");
        if (ready.empty()) return;
        // Mostly one stream for a while: orders in which one is far ahead of the other come too.
        std::deque<Item>& chosen = *ready[device().random() % ready.size()];
        for (uint32_t more = device().random() % 8; runnable(chosen) && more < 8; ++more) run_one(chosen);
    }
}

}  // namespace fake_gpu

using fake_gpu::enqueue;
using fake_gpu::run_all;

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    constexpr size_t kAlignment = 512;
    *pointer = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* pointer) {
    std::free(pointer);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* all) {
    *free_bytes = *all = size_t(1) << 34;
    return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    run_all();
    std::memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    run_all();
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    enqueue(stream, [=] { std::memset(to, value, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    enqueue(stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    *stream = reinterpret_cast<cudaStream_t>(++device().handles);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    run_all();
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    run_all();
    device().streams.erase(stream);
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(++device().handles);
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    device().last_record.erase(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const int64_t number = int64_t(device().recorded.size());
    device().recorded.push_back(false);
    device().last_record[event] = number;
    device().streams[stream].push_back({.work = {}, .records = number});
    return cudaSuccess;
}
// Of what was recorded last when it is called; an event that never was is no wait.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    device().streams[stream].push_back({.work = {}, .waits = device().last_record[event]});
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
    *lowest = 0, *highest = -5;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in for the GPU"; }

}  // extern "C"
