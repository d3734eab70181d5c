// Gradient norm, clipping and AdamW over the flat parameter arrays: formulas and the rule for non-finite steps are those
// of kernels/adamw.h.
#pragma once
#include <cstdint>

#include "kernels/common/step_state.h"
#include "trainer/parameters.h"

namespace reference {

// sqrt of the sum of squares, in double over fixed blocks.
float global_norm(const float* grads, int64_t n);

// Decides whether the step is skipped and derives its scalars. `state` holds the loss and the counters of the last step.
void optimizer_prepare(const AdamWConfig& config, float grad_norm, StepState& state);

struct AdamWUpdate {
    float* params;
    const float* grads;
    float* m;
    float* v;
};
void adamw_update(const ParameterList& list, const AdamWConfig& config, const StepState& state, const AdamWUpdate& p);

}  // namespace reference
