// How a run is spread over ranks: data parallel, with what is sharded inside a group of ranks and replicated across groups.
//
//   --shard     masters, moments   gradients                        weights as multiplied
//   none        all                all, reduced once a step         all
//   optimizer   a slice (ZeRO-1)   all, reduced once a step         all, gathered once a step
//   gradients   a slice (ZeRO-2)   a slice, reduced a micro-batch   all, gathered once a step
//   full        a slice (ZeRO-3)   a slice, reduced a micro-batch   a slice, a block gathered when it is used
//
// "All" but for the slices is what one rank has: with `none`, and on one rank, the group has one rank, a slice is the whole
// and the collectives of the group do nothing. The same code runs everywhere.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "trainer/distributed/communicator.h"
#include "trainer/distributed/watch.h"

enum class Shard : uint8_t { none, optimizer, gradients, full };
Shard find_shard(const std::string& name);  // Error lists the names

struct Parallel {
    Shard shard = Shard::none;
    Element gradient_element = Element::f32;  // in which gradients travel: f32 or bf16
    std::shared_ptr<Communicator> world = std::make_shared<SingleCommunicator>();
    std::shared_ptr<Communicator> group = std::make_shared<SingleCommunicator>();     // over which slices are cut
    std::shared_ptr<Communicator> replicas = std::make_shared<SingleCommunicator>();  // ranks that hold the same slice
    Watch* watch = nullptr;  // told whenever a device waits for other ranks'

    bool reduces_every_micro_batch() const { return shard == Shard::gradients || shard == Shard::full; }
    bool gathers_every_use() const { return shard == Shard::full; }
};

class World;
struct ParallelOptions {
    Shard shard = Shard::none;
    int replicate = 1;  // groups that hold copies; with `none` every rank is one
    Element gradient_element = Element::f32;
};
// Of host communicators. Ranks of a group are neighbours, so that a group can be one machine.
Parallel make_parallel(World& world, const ParallelOptions& options);
// The same of NCCL's; the GPU is current.
Parallel make_gpu_parallel(World& world, const ParallelOptions& options);
// Of rank 0 among `ranks` that do not run: to plan memory.
Parallel planned_parallel(int ranks, const ParallelOptions& options);
