#include "trainer/host_copier.h"

#include <algorithm>
#include <cstring>

#include "kernels/common/cuda_check.h"

HostCopier::HostCopier() {
    CUDA_CHECK(cudaGetDevice(&device_));
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreateWithFlags(&begin_, cudaEventDisableTiming));
    for (auto& of_thread : buffers_)
        for (Buffer& buffer : of_thread) {
            CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&buffer.memory), kBufferBytes));
            CUDA_CHECK(cudaEventCreateWithFlags(&buffer.filled, cudaEventDisableTiming | cudaEventBlockingSync));
        }
}

HostCopier::~HostCopier() {
    wait();
    for (auto& of_thread : buffers_)
        for (Buffer& buffer : of_thread) {
            cudaFreeHost(buffer.memory);
            cudaEventDestroy(buffer.filled);
        }
    cudaEventDestroy(begin_);
    cudaStreamDestroy(stream_);
}

void HostCopier::wait() const {
    if (running_.valid()) running_.wait();
}

namespace {

// Of a buffer's size at most.
std::vector<HostCopier::Range> parts_of(const std::vector<HostCopier::Range>& ranges) {
    std::vector<HostCopier::Range> parts;
    for (const HostCopier::Range& range : ranges)
        for (size_t done = 0; done < range.bytes; done += HostCopier::kBufferBytes)
            parts.push_back({static_cast<char*>(range.to) + done, static_cast<const char*>(range.from) + done,
                             std::min(HostCopier::kBufferBytes, range.bytes - done)});
    return parts;
}

}  // namespace

std::shared_future<void> HostCopier::start(const std::vector<Range>& ranges, cudaStream_t after) {
    wait();
    CUDA_CHECK(cudaEventRecord(begin_, after));
    CUDA_CHECK(cudaStreamWaitEvent(stream_, begin_));
    running_ = std::async(std::launch::async, [this, parts = parts_of(ranges)] { copy(parts); }).share();
    return running_;
}

void HostCopier::copy(const std::vector<Range>& parts) {
    std::vector<std::future<void>> others;
    for (int thread = 1; thread < kThreads; ++thread)
        others.push_back(std::async(std::launch::async, [this, &parts, thread] { copy_every(parts, thread); }));
    copy_every(parts, 0);
    for (std::future<void>& other : others) other.get();
}

// Parts thread, thread + kThreads, ...: the next one is on its way while this one is moved on.
void HostCopier::copy_every(const std::vector<Range>& parts, int thread) {
    CUDA_CHECK(cudaSetDevice(device_));
    const auto fetch = [&](size_t part, int turn) {
        if (part >= parts.size()) return;
        const Buffer& buffer = buffers_[thread][turn % kBuffers];
        CUDA_CHECK(cudaMemcpyAsync(buffer.memory, parts[part].from, parts[part].bytes, cudaMemcpyDeviceToHost, stream_));
        CUDA_CHECK(cudaEventRecord(buffer.filled, stream_));
    };
    int turn = 0;
    fetch(size_t(thread), turn);
    for (size_t part = size_t(thread); part < parts.size(); part += kThreads, ++turn) {
        fetch(part + kThreads, turn + 1);
        const Buffer& buffer = buffers_[thread][turn % kBuffers];
        CUDA_CHECK(cudaEventSynchronize(buffer.filled));
        std::memcpy(parts[part].to, buffer.memory, parts[part].bytes);
    }
}
