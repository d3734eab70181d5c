// Collectives of host memory. A transport only moves bytes (MPI, or TCP through rank 0); all sums are done here, in float
// and in the order of ranks, so results do not depend on the transport and are the same bits on every rank.
#pragma once
#include <memory>
#include <vector>

#include "trainer/distributed/communicator.h"
#include "trainer/distributed/watch.h"

class Transport {
  public:
    virtual ~Transport() = default;
    virtual const char* name() const = 0;
    virtual void all_gather(void* data, int64_t bytes) = 0;  // as Communicator::all_gather
    virtual void all_to_all(void* data, int64_t bytes) = 0;  // size() slices of `bytes`: slice r goes to rank r, in place
};

class HostCommunicator final : public Communicator {
  public:
    HostCommunicator(int rank, int size, std::unique_ptr<Transport> transport, Watch* watch);

  private:
    void do_all_reduce(void* data, int64_t count, Element element, Reduction reduction, CUstream_st*) override;
    void do_reduce_scatter(void* data, int64_t count, Element element, CUstream_st*) override;
    void do_all_gather(void* data, int64_t bytes, CUstream_st*) override;
    void do_broadcast(void* data, int64_t bytes, int root, CUstream_st*) override;

    std::unique_ptr<Transport> transport_;
    Watch* watch_;
    std::vector<char> buffer_;
};
