#include "trainer/host_copier.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <thread>

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

std::shared_future<void> HostCopier::start(const std::vector<Range>& ranges, cudaStream_t after) {
    wait();
    CUDA_CHECK(cudaEventRecord(begin_, after));
    CUDA_CHECK(cudaStreamWaitEvent(stream_, begin_));
    running_ = std::async(std::launch::async, [this, parts = parts_of(ranges)] { copy(parts); }).share();
    return running_;
}

// ---------------------------------------------------------------------------------------------------------------------
// Pinned memory

namespace {

// Cut at addresses that are multiples of the piece: no two pieces share a page.
std::vector<std::span<char>> pieces_of(std::span<float> array) {
    std::vector<std::span<char>> pieces;
    char* at = reinterpret_cast<char*>(array.data());
    for (size_t left = array.size_bytes(); left > 0;) {
        const size_t to_boundary = HostCopier::kPinnedBytes - reinterpret_cast<uintptr_t>(at) % HostCopier::kPinnedBytes;
        pieces.emplace_back(at, std::min(left, to_boundary));
        at += pieces.back().size(), left -= pieces.back().size();
    }
    return pieces;
}

}  // namespace

std::shared_ptr<void> HostCopier::pin(const std::vector<std::span<float>>& arrays) {
    CUDA_CHECK(cudaSetDevice(device_));
    std::shared_ptr<std::vector<char*>> registered(new std::vector<char*>, [this](std::vector<char*>* pieces) {
        unpin(*pieces);
        delete pieces;
    });
    for (const std::span<float> array : arrays) {
        if (array.size_bytes() < kBufferBytes) continue;
        for (const std::span<char> piece : pieces_of(array)) {
            const auto start = std::chrono::steady_clock::now();
            pin_piece(piece);
            registered->push_back(piece.data());
            std::this_thread::sleep_for(std::chrono::steady_clock::now() - start);
        }
    }
    return registered;
}

void HostCopier::pin_piece(std::span<char> piece) {
    CUDA_CHECK(cudaHostRegister(piece.data(), piece.size(), cudaHostRegisterDefault));
    const std::lock_guard lock(pinned_mutex_);
    pinned_[piece.data()] = piece.size();
}

void HostCopier::unpin(const std::vector<char*>& pieces) {
    wait();
    for (char* piece : pieces) {
        {
            const std::lock_guard lock(pinned_mutex_);
            pinned_.erase(piece);
        }
        cudaHostUnregister(piece);
    }
}

HostCopier::Part HostCopier::part_at(const char* memory, size_t bytes) const {
    const auto next = pinned_.upper_bound(memory);  // the first piece that begins behind it
    if (next != pinned_.begin())
        if (const auto& [begin, size] = *std::prev(next); memory < begin + size) return {std::min(bytes, size_t(begin + size - memory)), true};
    const size_t before_next = next == pinned_.end() ? bytes : std::min(bytes, size_t(next->first - memory));
    return {std::min(before_next, kBufferBytes), false};
}

HostCopier::Parts HostCopier::parts_of(const std::vector<Range>& ranges) const {
    const std::lock_guard lock(pinned_mutex_);
    Parts parts;
    for (const Range& range : ranges)
        for (size_t done = 0; done < range.bytes;) {
            char* to = static_cast<char*>(range.to) + done;
            const Part part = part_at(to, range.bytes - done);
            (part.pinned ? parts.direct : parts.staged).push_back({to, static_cast<const char*>(range.from) + done, part.bytes});
            done += part.bytes;
        }
    return parts;
}

// ---------------------------------------------------------------------------------------------------------------------
// Copying

void HostCopier::copy(const Parts& parts) {
    CUDA_CHECK(cudaSetDevice(device_));
    copy_directly(parts.direct);
    std::vector<std::future<void>> others;
    for (int thread = 1; thread < kThreads; ++thread)
        others.push_back(std::async(std::launch::async, [this, &parts, thread] { copy_every(parts.staged, thread); }));
    copy_every(parts.staged, 0);
    for (std::future<void>& other : others) other.get();
}

void HostCopier::copy_directly(const std::vector<Range>& parts) {
    for (size_t i = 0; i < parts.size(); ++i) {
        CUDA_CHECK(cudaMemcpyAsync(parts[i].to, parts[i].from, parts[i].bytes, cudaMemcpyDeviceToHost, stream_));
        if ((i + 1) % kDirectAtOnce != 0 && i + 1 < parts.size()) continue;
        CUDA_CHECK(cudaEventRecord(direct_, stream_));
        CUDA_CHECK(cudaEventSynchronize(direct_));
    }
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
