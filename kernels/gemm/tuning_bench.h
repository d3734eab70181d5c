// What an algorithm is timed on: random operands of one shape in an allocation of their own, a stream and a clock.
#pragma once
#include <functional>
#include <optional>

#include "kernels/gemm.h"
#include "kernels/gemm/owned.h"

namespace gemm_detail {

class TuningBench {
  public:
    // `one`: device scalar, the operands' scales. False if the device memory left does not suffice.
    bool allocate(const GemmShape& shape, const float* one);

    // Microseconds a call; nothing if the algorithm does not run.
    using Enqueue = std::function<cublasStatus_t(const GemmOperands&, cudaStream_t)>;
    std::optional<float> time_us(int calls, const Enqueue& enqueue);

  private:
    DeviceBytes memory_;
    Owned<cudaStream_t> stream_;
    Owned<cudaEvent_t> events_[2];
    GemmOperands operands_{};
};

}  // namespace gemm_detail
