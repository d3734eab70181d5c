// Gradient norm, clipping and AdamW over ranges of the flat parameter arrays: formulas and the rule for non-finite steps are those
// of kernels/adamw.h.
#pragma once
#include <cstdint>

#include "kernels/common/step_state.h"

namespace reference {

// In double, over fixed blocks.
double sum_of_squares(const float* x, int64_t n);

// Decides whether the step is skipped and derives its scalars. `state` holds the loss and the counters of the last step.
void optimizer_prepare(const AdamWConfig& config, float grad_norm, StepState& state);

// A range of one parameter's elements.
struct AdamWUpdate {
    float* params;
    const float* grads;
    float* m;
    float* v;
    int64_t count;
    float weight_decay;
};
void adamw_update(const AdamWConfig& config, const StepState& state, const AdamWUpdate& p);

}  // namespace reference
