// AdamW over all parameters at once (multi-tensor), FP32 master weights and moments.
//
//   g' = g * clip_scale;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2
//   p -= lr * ( (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps) + decay * p )            torch.optim.AdamW (Loshchilov-Hutter)
//
// The step's scalars are in device memory (StepState), so one captured graph serves every step:
// optimizer_prepare derives them, adamw_update applies them. When a non-finite amax, loss or norm was seen, prepare sets
// skip_update and nothing but the step's own bookkeeping changes: not t, not the moments, not the weights.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/quant_slot.h"
#include "kernels/common/step_state.h"

// One parameter, or a rank's part of one: a slice of the flat arrays. `offset` and padded size are multiples of 64 elements.
struct AdamWTensor {
    int64_t offset;           // in elements, into params, m, v
    int64_t grad_offset;      // into grads, which may be laid out in another way; a multiple of 4
    int64_t count;            // elements
    __nv_bfloat16* bf16_copy; // rounded copy for BF16 consumers, or null
    QuantSlot* slot;          // amax of the updated weights is raised here (zeroed by optimizer_prepare), or null
    float weight_decay;       // 0 for norms and biases
    int first_block;          // filled in by adamw_plan
};
// Fills in first_block of the host copy and returns the number of blocks of the update's grid.
int adamw_plan(AdamWTensor* tensors, int count);

// One block: grad_norm = sqrt(sum of partials); raises nonfinite for a non-finite norm or loss_sum; decides skip_update
// (nonfinite, or loss_sum or norm above the step's limits);
// clip_scale = min(1, max_grad_norm / (grad_norm + 1e-6))  (torch.nn.utils.clip_grad_norm_); advances adam_t or
// skipped_steps; bias corrections; zeroes amax_bits of every tensor's slot unless the update is skipped.
struct OptimizerPrepare {
    StepState* state;
    const float* norm_partials;
    int n_partials;
    const AdamWTensor* tensors;  // device
    int n_tensors;
    AdamWConfig config;
};
void optimizer_prepare(const OptimizerPrepare& p, cudaStream_t stream);

struct AdamWUpdate {
    const AdamWTensor* tensors;  // device
    int n_tensors, blocks;
    float* params;
    const float* grads;
    float* m;
    float* v;
    const StepState* state;
    AdamWConfig config;
};
void adamw_update(const AdamWUpdate& p, cudaStream_t stream);

// The part of an update that follows new weights (after initialization or loading): BF16 copies and amaxes, which must
// have been zeroed. p.grads, m, v and state are not used.
void adamw_refresh_copies(const AdamWUpdate& p, cudaStream_t stream);
