// Copies device arrays to host memory beside the work of a step, on a stream of its own: into pinned memory (pin) at the
// speed of the link; into other memory by way of a few pinned buffers, from where threads move them on, so that a state of
// many gigabytes needs 128 MiB of pinned memory. No second copy on the device.
#pragma once
#include <cuda_runtime.h>

#include <future>
#include <map>
#include <memory>
#include <mutex>
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
    std::shared_future<void> start(const std::vector<Range>& ranges, cudaStream_t after);
    void wait() const;  // until the sources are read

    // Pins arrays, from any thread, until the result goes; arrays below the size of a buffer stay as they are. An Error where
    // the system allows no more pinned memory: then none of them is. The pages should have been touched: faster, by far.
    //
    // While memory is being pinned, every other call of the process waits, also those that launch a step's work. So it is done in
    // pieces of kPinnedBytes, about 18 ms each, with a rest as long as the piece took: a call waits for one piece at most.
    // Smaller ones (32 MiB) hardly advance beside running steps: each waits for a launch to end.
    std::shared_ptr<void> pin(const std::vector<std::span<float>>& arrays);

    static constexpr size_t kPinnedBytes = size_t(256) << 20;
    static constexpr size_t kBufferBytes = size_t(16) << 20;

  private:
    static constexpr int kThreads = 4;  // one moves about 8 GB/s, a PCIe 5 link brings 50
    static constexpr int kBuffers = 2;  // of a thread: one fills while the other is emptied
    static constexpr size_t kDirectAtOnce = 64;  // a stream that holds very many copies makes the next call wait
    struct Buffer {
        char* memory = nullptr;
        cudaEvent_t filled = nullptr;
    };
    struct Parts {
        std::vector<Range> direct, staged;  // each in one pinned piece; of a buffer at most
    };
    // What begins at `memory` and lies in one pinned piece, or in none.
    struct Part {
        size_t bytes;
        bool pinned;
    };
    Part part_at(const char* memory, size_t bytes) const;
    Parts parts_of(const std::vector<Range>& ranges) const;
    void pin_piece(std::span<char> piece);
    void unpin(const std::vector<char*>& pieces);

    void copy(const Parts& parts);
    void copy_directly(const std::vector<Range>& parts);
    void copy_every(const std::vector<Range>& parts, int thread);

    int device_ = 0;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t begin_ = nullptr, direct_ = nullptr;  // before the copies; after those into pinned memory
    Buffer buffers_[kThreads][kBuffers];
    mutable std::mutex pinned_mutex_;
    std::map<const char*, size_t> pinned_;  // a piece's begin: its bytes. CUDA copies to one at a time, not across two
    std::shared_future<void> running_;
};
