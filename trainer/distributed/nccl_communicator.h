// Collectives of device memory over NCCL: enqueued on a stream, so that they can be captured in a CUDA graph.
//
// A reduce_scatter writes the rank's own slice alone: the others stay as they were sent.
//
// NCCL is loaded when the first communicator is made, so the program starts without it. Reductions are NCCL's: every rank
// gets the same bits, in an order that is NCCL's own.
#pragma once
#include <memory>
#include <string>

#include "trainer/distributed/communicator.h"

class World;
class Watch;

// Why there can be none: built without NCCL's header, or no library here; "" when there can.
std::string nccl_obstacle();
std::string nccl_version();  // of the loaded library, "2.28.9"

struct NcclOptions {
    int most_ctas = 0;          // bound on the SMs that a collective takes; 0: NCCL's choice
    bool copy_engines = false;  // all_gather and all_to_all within memory() take none, where NCCL can: 2.28, all ranks on one machine
};
// Of the ranks that give the same color, like World::split; all ranks call it, each with its GPU current. The id travels over
// the host communicator. `of_one_too`: NCCL also where there is one rank, which tests use.
std::unique_ptr<Communicator> nccl_split(World& world, int color, const NcclOptions& options, bool of_one_too = false);
