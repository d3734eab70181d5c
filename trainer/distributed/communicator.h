// Collectives among the ranks of a run, or of a group of them. Every rank of a communicator makes the same calls in the
// same order. All work in place; a communicator of one rank does nothing.
//
// Two kinds: host communicators (host_communicator.h: pointers to host memory, over MPI or TCP, blocking) and NCCL
// (nccl_communicator.h: device memory, enqueued on a stream, capturable). `trainer/distributed` knows bytes, never layers.
//
// Host communicators add in the order of ranks, in float: every rank gets the same bits, over MPI and over TCP.
#pragma once
#include <cstdint>
#include <memory>

#include "kernels/common/check.h"

enum class Element : uint8_t { f32, bf16, u32 };
constexpr int64_t bytes_of(Element e) { return e == Element::bf16 ? 2 : 4; }

enum class Reduction : uint8_t { sum, max };  // max: u32 only; sum: f32 and bf16 (rounded once at the end on the host)

struct CUstream_st;  // cudaStream_t, without CUDA's headers

// Bytes that this rank received, by collective; a captured call counts once, when it is captured.
struct Traffic {
    int64_t gathered = 0, scattered = 0, reduced = 0, broadcast = 0;
    int64_t calls = 0;
};

class Communicator {
  public:
    // `alone_too`: one rank's calls reach the implementation as well, which tests want.
    Communicator(int rank, int size, bool alone_too = false) : rank_(rank), size_(size), silent_(size == 1 && !alone_too) {}
    virtual ~Communicator() = default;
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    int rank() const { return rank_; }
    int size() const { return size_; }
    bool silent() const { return silent_; }  // no call does anything
    const Traffic& traffic() const { return traffic_; }

    // Memory from which collectives of this communicator are faster, or null where it makes no difference. Every rank calls it
    // with as many bytes. It must be given back before the communicator is.
    std::shared_ptr<void> memory(int64_t bytes) { return silent_ ? nullptr : do_memory(bytes); }
    // Copy engines carry all_gather and all_to_all within memory(): compute beside them loses no SM. The same on every rank.
    virtual bool copies() const { return false; }

    // data: `count` elements; every rank gets the reduction over all ranks.
    void all_reduce(void* data, int64_t count, Element element, Reduction reduction, CUstream_st* stream = nullptr) {
        if (silent_ || count == 0) return;
        REQUIRE((reduction == Reduction::max) == (element == Element::u32), "all_reduce: max of u32 or sum of f32 or bf16 only");
        note(traffic_.reduced, 2 * (size_ - 1) * count * bytes_of(element) / size_);
        do_all_reduce(data, count, element, reduction, stream);
    }
    // data: size() slices of `count` elements; afterwards slice rank() holds the sum over all ranks, the others anything.
    void reduce_scatter(void* data, int64_t count, Element element, CUstream_st* stream = nullptr) {
        if (silent_ || count == 0) return;
        REQUIRE(element != Element::u32, "reduce_scatter: sum of f32 or bf16 only");
        note(traffic_.scattered, (size_ - 1) * count * bytes_of(element));
        do_reduce_scatter(data, count, element, stream);
    }
    // from, to: size() slices of `bytes`; slice r of `to` is what rank r has in slice rank() of `from`. The two must not overlap.
    // What a reduce_scatter moves, without its sum. Device communicators only.
    void all_to_all(const void* from, void* to, int64_t bytes, CUstream_st* stream) {
        if (silent_ || bytes == 0) return;
        note(traffic_.scattered, (size_ - 1) * bytes);
        do_all_to_all(from, to, bytes, stream);
    }
    // data: size() slices of `bytes`; slice rank() is sent, the others are received.
    void all_gather(void* data, int64_t bytes, CUstream_st* stream = nullptr) {
        if (silent_ || bytes == 0) return;
        note(traffic_.gathered, (size_ - 1) * bytes);
        do_all_gather(data, bytes, stream);
    }
    void broadcast(void* data, int64_t bytes, int root, CUstream_st* stream = nullptr) {
        if (silent_ || bytes == 0) return;
        REQUIRE(root >= 0 && root < size_, "broadcast from rank %d of %d", root, size_);
        note(traffic_.broadcast, rank_ == root ? 0 : bytes);
        do_broadcast(data, bytes, root, stream);
    }

  protected:
    virtual std::shared_ptr<void> do_memory(int64_t) { return nullptr; }
    virtual void do_all_to_all(const void*, void*, int64_t, CUstream_st*) { throw Error("all_to_all: device communicators only"); }
    virtual void do_all_reduce(void* data, int64_t count, Element element, Reduction reduction, CUstream_st* stream) = 0;
    virtual void do_reduce_scatter(void* data, int64_t count, Element element, CUstream_st* stream) = 0;
    virtual void do_all_gather(void* data, int64_t bytes, CUstream_st* stream) = 0;
    virtual void do_broadcast(void* data, int64_t bytes, int root, CUstream_st* stream) = 0;

  private:
    void note(int64_t& counter, int64_t bytes) {
        counter += bytes;
        ++traffic_.calls;
    }
    int rank_, size_;
    bool silent_;
    Traffic traffic_;
};

// One rank: no call reaches an implementation.
class SingleCommunicator final : public Communicator {
  public:
    SingleCommunicator() : Communicator(0, 1) {}

  private:
    void do_all_reduce(void*, int64_t, Element, Reduction, CUstream_st*) override {}
    void do_reduce_scatter(void*, int64_t, Element, CUstream_st*) override {}
    void do_all_gather(void*, int64_t, CUstream_st*) override {}
    void do_broadcast(void*, int64_t, int, CUstream_st*) override {}
};

// A rank of a run that is only planned: has a number and a size, and cannot communicate.
class PlannedCommunicator final : public Communicator {
  public:
    PlannedCommunicator(int rank, int size, bool copies = false) : Communicator(rank, size), copies_(copies) {}
    bool copies() const override { return copies_; }

  private:
    const bool copies_;
    void do_all_reduce(void*, int64_t, Element, Reduction, CUstream_st*) override { refuse(); }
    void do_reduce_scatter(void*, int64_t, Element, CUstream_st*) override { refuse(); }
    void do_all_gather(void*, int64_t, CUstream_st*) override { refuse(); }
    void do_broadcast(void*, int64_t, int, CUstream_st*) override { refuse(); }
    [[noreturn]] static void refuse() { throw Error("a collective of a run that is only planned"); }
};
