// Causal attention in double, on the GPU, by kernels as plain as the formulas in kernels/attention.h: one thread an element,
// the whole T x T matrix in memory, sums in order of their index. It shares no code with what it judges.
#pragma once
#include <vector>

#include "kernels/attention.h"

struct AttentionReference {
    std::vector<double> out, lse;  // (B, T, H head_dim), (B, H, T)
    std::vector<double> dqkv;      // (B, T, (H + 2 KV) head_dim)
};

// A forward's results as they were stored. The gradients that follow from them are what a backward is to be compared with
// closely: the rounding of out is not its error.
struct StoredForward {
    const __nv_bfloat16* out = nullptr;
    const float* lse = nullptr;
};

// qkv and dout in device memory, and stored's arrays if given (then .out and .lse of the result are empty).
AttentionReference attention_reference(const AttentionShape& shape, const __nv_bfloat16* qkv, const __nv_bfloat16* dout,
                                       StoredForward stored = {});
