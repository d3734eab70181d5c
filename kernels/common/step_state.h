// What changes from step to step, in device memory, so that every graph is captured once.
//
// There is no random offset beside `step`: every draw is keyed by (seed, step, tensor, index), the seed is fixed for a run
// and captured by value, so a second counter could only repeat the step or contradict it after a resume.
#pragma once
#include <cstdint>
#include <limits>

// Written by the host before a step (one small copy from pinned memory, ahead of the graphs).
struct StepInputs {
    int64_t step;                // number of the step being run, from 0
    float learning_rate;
    float inverse_valid_tokens;  // 1 / (unmasked target tokens of the global batch)
    // A loss or norm above these leaves the weights as they are, like one that is not finite.
    float loss_limit = std::numeric_limits<float>::infinity();
    float grad_norm_limit = std::numeric_limits<float>::infinity();
};

// Hyperparameters of the optimizer graph: fixed for a run, captured by value.
struct AdamWConfig {
    float beta1, beta2, eps, weight_decay;
    float max_grad_norm;  // clip; <= 0: no clipping
};

// Written by the kernels of a step; copied to the host after the optimizer graph.
struct StepState {
    StepInputs in;
    float loss_sum;         // sum over tokens of the global batch, already times inverse_valid_tokens
    float grad_norm;        // before clipping
    float clip_scale;       // what AdamW multiplies gradients by
    float bias_correction1, bias_correction2;  // 1 - beta^t
    uint32_t nonfinite;     // raised by any kernel that sees a non-finite amax, loss or norm; cleared with the step
    uint32_t skip_update;   // decided once, by optimizer_prepare
    int64_t adam_t;         // optimizer steps really taken (skipped steps do not count)
    int64_t skipped_steps;
};
