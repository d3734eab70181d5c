// Copies device arrays to ordinary host memory beside the work of a step: a stream of its own brings them into a few
// pinned buffers, and threads move them on from there. A state of many gigabytes so needs 128 MiB of pinned memory, and
// no second copy on the device.
#pragma once
#include <cuda_runtime.h>

#include <future>
#include <vector>

class HostCopier {
  public:
    HostCopier();
    ~HostCopier();
    HostCopier(const HostCopier&) = delete;
    HostCopier& operator=(const HostCopier&) = delete;

    struct Range {
        void* to;  // host
        const void* from;  // device
        size_t bytes;
    };
    // Starts after the work that is enqueued on `after`, and does not hold that stream up: whoever enqueues something there
    // that writes to a source calls wait() first. Waits for the copy started before. The future carries errors.
    std::shared_future<void> start(std::vector<Range> ranges, cudaStream_t after);
    void wait() const;  // until the sources are read

  private:
    static constexpr int kThreads = 4;  // one moves about 8 GB/s, a PCIe 5 link brings 50
    static constexpr int kBuffers = 2;  // of a thread: one fills while the other is emptied
    static constexpr size_t kBufferBytes = size_t(16) << 20;
    struct Buffer {
        char* memory = nullptr;
        cudaEvent_t filled = nullptr;
    };
    void copy(const std::vector<Range>& pieces);
    void copy_every(const std::vector<Range>& pieces, int thread);

    int device_ = 0;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t begin_ = nullptr;
    Buffer buffers_[kThreads][kBuffers];
    std::shared_future<void> running_;
};
