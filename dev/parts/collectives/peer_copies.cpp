#include <cuda.h>

#include <exception>
#include <vector>

#include "dev/parts/collectives/copy_engines.h"
#include "kernels/common/cuda_check.h"

namespace {

// "" if all ranks' are; else the first that is not.
std::string first_of_all(World& world, const std::string& mine) {
    for (const std::string& text : world.all_texts(mine))
        if (!text.empty()) return text;
    return "";
}

std::string error_of(cudaError_t status) {
    if (status == cudaSuccess) return "";
    cudaGetLastError();
    return cudaGetErrorString(status);
}

// The driver's function; the program does not link the driver's library.
using WaitValue = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
WaitValue wait_value() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuStreamWaitValue32", &function, 12000, cudaEnableDefault, &found));
    REQUIRE(function != nullptr && found == cudaDriverEntryPointSuccess, "the driver has no cuStreamWaitValue32");
    return reinterpret_cast<WaitValue>(function);
}

// The memory of a rank, mapped by all: slices, then a flag a sender. Copies to each peer have a stream of their own, forked from
// the caller's and joined again, so that several copy engines work at a time.
class PeerCopies final : public CopyGather {
  public:
    PeerCopies(World& world, int64_t most_bytes, bool flagged) : world_(world), flags_at_(most_bytes), flagged_(flagged) {
        const size_t size = size_t(world.size());
        CUDA_CHECK(cudaMalloc(&data_, size_t(most_bytes) + size * sizeof(uint32_t)));
        CUDA_CHECK(cudaMemset(data_, 0, size_t(most_bytes) + size * sizeof(uint32_t)));
        std::vector<uint32_t> numbers(kMostCalls);
        for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = uint32_t(i + 1);
        CUDA_CHECK(cudaMalloc(&numbers_, numbers.size() * sizeof(uint32_t)));
        CUDA_CHECK(cudaMemcpy(numbers_, numbers.data(), numbers.size() * sizeof(uint32_t), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming));
        for (size_t i = 0; i < size; ++i) {
            streams_.emplace_back(), joined_.emplace_back(), peers_.push_back(nullptr);
            CUDA_CHECK(cudaStreamCreateWithFlags(&streams_.back(), cudaStreamNonBlocking));
            CUDA_CHECK(cudaEventCreateWithFlags(&joined_.back(), cudaEventDisableTiming));
        }
        if (flagged_) wait_ = wait_value();
    }
    ~PeerCopies() override {
        cudaDeviceSynchronize();
        const bool together = std::uncaught_exceptions() == 0;  // otherwise the other ranks are elsewhere, and the job ends
        if (together) world_.all_texts("");                     // nobody copies any more
        for (uint8_t* peer : peers_)
            if (peer != nullptr) cudaIpcCloseMemHandle(peer);
        if (together) world_.all_texts("");
        for (size_t i = 0; i < streams_.size(); ++i) cudaStreamDestroy(streams_[i]), cudaEventDestroy(joined_[i]);
        cudaEventDestroy(forked_);
        cudaFree(numbers_), cudaFree(data_);
    }

    // "" or why this rank cannot map another's memory.
    std::string map() {
        std::vector<cudaIpcMemHandle_t> handles(peers_.size());
        std::string problem = first_of_all(world_, error_of(cudaIpcGetMemHandle(&handles[size_t(world_.rank())], data_)));
        if (!problem.empty()) return problem;
        world_.host().all_gather(handles.data(), sizeof handles[0]);
        for (size_t i = 0; i < peers_.size() && problem.empty(); ++i) {
            void* mapped = nullptr;
            if (int(i) == world_.rank()) continue;
            problem = error_of(cudaIpcOpenMemHandle(&mapped, handles[i], cudaIpcMemLazyEnablePeerAccess));
            peers_[i] = static_cast<uint8_t*>(mapped);
        }
        return first_of_all(world_, problem);
    }

    const char* name() const override { return flagged_ ? "peer copies, flags" : "peer copies"; }
    bool gathers() const override { return flagged_; }

    void run(int64_t bytes, cudaStream_t stream) override {
        const int64_t at = bytes * world_.rank();
        REQUIRE(!flagged_ || calls_ < kMostCalls, "peer copies: more than %zu calls", kMostCalls);
        CUDA_CHECK(cudaEventRecord(forked_, stream));
        for (size_t i = 0; i < peers_.size(); ++i) {
            if (peers_[i] == nullptr) continue;
            CUDA_CHECK(cudaStreamWaitEvent(streams_[i], forked_));
            CUDA_CHECK(cudaMemcpyAsync(peers_[i] + at, data_ + at, size_t(bytes), cudaMemcpyDeviceToDevice, streams_[i]));
            if (flagged_) CUDA_CHECK(cudaMemcpyAsync(flag(peers_[i], world_.rank()), numbers_ + calls_, sizeof(uint32_t), cudaMemcpyDeviceToDevice, streams_[i]));
            CUDA_CHECK(cudaEventRecord(joined_[i], streams_[i]));
            CUDA_CHECK(cudaStreamWaitEvent(stream, joined_[i]));
        }
        if (flagged_) wait_for_all(stream);
    }

  private:
    static constexpr size_t kMostCalls = 1 << 20;

    uint8_t* flag(uint8_t* of, int sender) const { return of + flags_at_ + int64_t(sizeof(uint32_t)) * sender; }
    void wait_for_all(cudaStream_t stream) {
        ++calls_;
        for (size_t i = 0; i < peers_.size(); ++i) {
            if (peers_[i] == nullptr) continue;
            const CUresult status = wait_(stream, reinterpret_cast<CUdeviceptr>(flag(data_, int(i))), cuuint32_t(calls_), CU_STREAM_WAIT_VALUE_GEQ);
            REQUIRE(status == CUDA_SUCCESS, "cuStreamWaitValue32 failed: error %d", int(status));
        }
    }

    World& world_;
    const int64_t flags_at_;
    const bool flagged_;
    WaitValue wait_ = nullptr;
    size_t calls_ = 0;
    uint32_t* numbers_ = nullptr;  // 1, 2, 3 ...
    cudaEvent_t forked_ = nullptr;
    std::vector<cudaStream_t> streams_;
    std::vector<cudaEvent_t> joined_;
    std::vector<uint8_t*> peers_;  // of this rank: null
};

std::unique_ptr<CopyGather> mapped(World& world, int64_t most_bytes, bool flagged, std::string& obstacle) {
    auto copies = std::make_unique<PeerCopies>(world, most_bytes, flagged);
    obstacle = copies->map();
    if (!obstacle.empty()) copies.reset();
    return copies;
}

}  // namespace

std::unique_ptr<CopyGather> peer_copy_gather(World& world, int64_t most_bytes, std::string& obstacle) { return mapped(world, most_bytes, false, obstacle); }
std::unique_ptr<CopyGather> flagged_copy_gather(World& world, int64_t most_bytes, std::string& obstacle) { return mapped(world, most_bytes, true, obstacle); }
