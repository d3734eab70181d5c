// Do all ranks train on the same data? What they have is compared in full at the start only where it is small (agreement.h); what a
// step trains on is compared always: a rank also reads the slice of the rank half the job further on, which is on another machine where
// there are several, and both say what they found. It costs the reading, beside the device's work.
#pragma once
#include <cstdint>
#include <vector>

#include "data/loader.h"
#include "trainer/distributed/world.h"

class BatchCheck {
  public:
    // `samples` of each rank in a step's global batch.
    BatchCheck(const DataLoader& train, World& world, int64_t samples);

    // inputs, targets: what this rank read for the step. JobError that names two ranks with different data. All ranks call it.
    void compare(int64_t step, const std::vector<int>& inputs, const std::vector<int>& targets);

  private:
    const DataLoader& train_;
    World& world_;
    const int64_t samples_;
    std::vector<int> inputs_, targets_;  // of the other rank
};
