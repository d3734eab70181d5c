// All-gathers by copy engines, which take no SM from compute: NCCL's own in its registered memory (2.28 and later), and plain
// copies into the other ranks' buffers, which each rank has mapped (CUDA IPC). Of ranks on one machine.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>

#include "trainer/distributed/world.h"

class CopyGather {
  public:
    virtual ~CopyGather() = default;
    virtual const char* name() const = 0;
    // size() slices of `bytes`, of which this rank's is sent; capturable. When it is done on this rank's stream, its own slice has been sent;
    // that others' have arrived, only gathers() promises.
    virtual void run(int64_t bytes, cudaStream_t stream) = 0;
    virtual bool gathers() const = 0;
    uint8_t* data() const { return data_; }

  protected:
    uint8_t* data_ = nullptr;
};

// Each of `most_bytes` in all; null, with the reason in `obstacle`, where it cannot be. All ranks call it and get the same.
std::unique_ptr<CopyGather> nccl_copy_gather(World& world, int64_t most_bytes, std::string& obstacle);
std::unique_ptr<CopyGather> peer_copy_gather(World& world, int64_t most_bytes, std::string& obstacle);
// As the second, and every slice is followed by a number that its receiver waits for: gathers() holds. Not capturable, as the number is
// another one each time.
std::unique_ptr<CopyGather> flagged_copy_gather(World& world, int64_t most_bytes, std::string& obstacle);
