// Runs schedules (sharding_schedule.h) on the caller's compute stream and on a communication stream of the highest priority,
// which forks from it and joins it again: eagerly, or while the compute stream is being captured into a graph. A schedule in
// which nothing communicates is enqueued as it stands, with no event.
#pragma once
#include <cuda_runtime.h>

#include <functional>
#include <vector>

#include "trainer/sharding_schedule.h"

class TwoStreams {
  public:
    TwoStreams() = default;
    ~TwoStreams();
    TwoStreams(const TwoStreams&) = delete;
    TwoStreams& operator=(const TwoStreams&) = delete;

    // Makes stream and events, if the schedule needs them: for it and all that are no longer.
    void prepare(const Schedule& schedule);
    // `work` enqueues one operation on the stream that it gets.
    using Work = std::function<void(const Operation&, cudaStream_t)>;
    void run(const Schedule& schedule, cudaStream_t compute, const Work& work);

  private:
    cudaStream_t communication_ = nullptr;
    cudaEvent_t forked_ = nullptr, joined_ = nullptr;
    std::vector<cudaEvent_t> ended_;  // by operation
};
