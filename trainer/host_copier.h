// Copies device arrays to host memory beside the work of a step, on a stream of its own: into pinned memory (pin) at the
// speed of the link; into other memory by way of a few pinned buffers, from where threads move them on, so that a state of
// many gigabytes needs 128 MiB of pinned memory. No second copy on the device.
#pragma once
#include <cuda_runtime.h>

#include <future>
#include <memory>
#include <span>
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

    // Pins arrays, from any thread, until the result goes; arrays below the size of a buffer stay as they are. An Error where
    // the system allows no more pinned memory: then none of them is. The pages should have been touched: faster, by far.
    std::shared_ptr<void> pin(const std::vector<std::span<float>>& arrays);

  private:
    static constexpr int kThreads = 4;  // one moves about 8 GB/s, a PCIe 5 link brings 50
    static constexpr int kBuffers = 2;  // of a thread: one fills while the other is emptied
    static constexpr size_t kBufferBytes = size_t(16) << 20;
    struct Buffer {
        char* memory = nullptr;
        cudaEvent_t filled = nullptr;
    };
    static bool pinned(const Range& range);
    void copy(const std::vector<Range>& pieces);
    void copy_every(const std::vector<Range>& pieces, int thread);

    int device_ = 0;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t begin_ = nullptr, direct_ = nullptr;  // before the copies; after those into pinned memory
    Buffer buffers_[kThreads][kBuffers];
    std::shared_future<void> running_;
};
