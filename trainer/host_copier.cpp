#include "trainer/host_copier.h"

#include <algorithm>
#include <cstring>

#include "kernels/common/cuda_check.h"

HostCopier::HostCopier() {
    CUDA_CHECK(cudaGetDevice(&device_));
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreateWithFlags(&begin_, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&direct_, cudaEventDisableTiming | cudaEventBlockingSync));
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
    cudaEventDestroy(direct_);
    cudaStreamDestroy(stream_);
}

void HostCopier::wait() const {
    if (running_.valid()) running_.wait();
}

std::shared_future<void> HostCopier::start(std::vector<Range> ranges, cudaStream_t after) {
    wait();
    CUDA_CHECK(cudaEventRecord(begin_, after));
    CUDA_CHECK(cudaStreamWaitEvent(stream_, begin_));
    std::vector<Range> pieces;
    for (const Range& range : ranges)
        if (pinned(range)) CUDA_CHECK(cudaMemcpyAsync(range.to, range.from, range.bytes, cudaMemcpyDeviceToHost, stream_));
        else for (size_t done = 0; done < range.bytes; done += kBufferBytes)
            pieces.push_back({static_cast<char*>(range.to) + done, static_cast<const char*>(range.from) + done,
                              std::min(kBufferBytes, range.bytes - done)});
    CUDA_CHECK(cudaEventRecord(direct_, stream_));
    running_ = std::async(std::launch::async, [this, pieces = std::move(pieces)] { copy(pieces); }).share();
    return running_;
}

std::shared_ptr<void> HostCopier::pin(const std::vector<std::span<float>>& arrays) {
    CUDA_CHECK(cudaSetDevice(device_));
    const auto unpin = [this](std::vector<void*>* registered) {
        wait();
        for (void* memory : *registered) cudaHostUnregister(memory);
        delete registered;
    };
    std::shared_ptr<std::vector<void*>> registered(new std::vector<void*>, unpin);
    for (const std::span<float> array : arrays) {
        if (array.size_bytes() < kBufferBytes) continue;
        CUDA_CHECK(cudaHostRegister(array.data(), array.size_bytes(), cudaHostRegisterDefault));
        registered->push_back(array.data());
    }
    return registered;
}

bool HostCopier::pinned(const Range& range) {
    for (const size_t at : {size_t(0), range.bytes - 1}) {
        cudaPointerAttributes attributes{};
        CUDA_CHECK(cudaPointerGetAttributes(&attributes, static_cast<char*>(range.to) + at));
        if (attributes.type != cudaMemoryTypeHost) return false;
    }
    return true;
}

void HostCopier::copy(const std::vector<Range>& pieces) {
    CUDA_CHECK(cudaSetDevice(device_));
    std::vector<std::future<void>> others;
    for (int thread = 1; thread < kThreads; ++thread)
        others.push_back(std::async(std::launch::async, [this, &pieces, thread] { copy_every(pieces, thread); }));
    copy_every(pieces, 0);
    for (std::future<void>& other : others) other.get();
    CUDA_CHECK(cudaEventSynchronize(direct_));
}

// Pieces thread, thread + kThreads, ...: the next one is on its way while this one is moved on.
void HostCopier::copy_every(const std::vector<Range>& pieces, int thread) {
    CUDA_CHECK(cudaSetDevice(device_));
    const auto fetch = [&](size_t piece, int turn) {
        if (piece >= pieces.size()) return;
        const Buffer& buffer = buffers_[thread][turn % kBuffers];
        CUDA_CHECK(cudaMemcpyAsync(buffer.memory, pieces[piece].from, pieces[piece].bytes, cudaMemcpyDeviceToHost, stream_));
        CUDA_CHECK(cudaEventRecord(buffer.filled, stream_));
    };
    int turn = 0;
    fetch(size_t(thread), turn);
    for (size_t piece = size_t(thread); piece < pieces.size(); piece += kThreads, ++turn) {
        fetch(piece + kThreads, turn + 1);
        const Buffer& buffer = buffers_[thread][turn % kBuffers];
        CUDA_CHECK(cudaEventSynchronize(buffer.filled));
        std::memcpy(pieces[piece].to, buffer.memory, pieces[piece].bytes);
    }
}
