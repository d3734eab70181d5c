// Sums of gradients that arrive in pieces, and their rounding before they travel: what a reduction over ranks leaves, added to
// the FP32 shard; FP32 gradients rounded to the BF16 of the wire.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/dtype.h"

// sum[i] = sum[i] + add[i] + add[stride + i] + ..., or the parts alone (sum is not read then, and may hold anything). Additions in
// float from left to right, so the result does not depend on anything else. Any n >= 0; sum, add and every part 16-byte aligned; add
// must not overlap sum.
struct Accumulate {
    float* sum;
    const void* add;   // float or BF16, after dtype
    Dtype dtype;       // f32 or bf16
    bool add_to_sum;   // false: the first of several, which overwrites
    int64_t n;
    int parts = 1;
    int64_t stride = 0;  // elements from a part to the next
};
void accumulate(const Accumulate& p, cudaStream_t stream);

// y[i] = round to nearest even of x[i]; NaN stays NaN. Any n >= 0; both 16-byte aligned; y must not overlap x.
void round_to_bf16(const float* x, __nv_bfloat16* y, int64_t n, cudaStream_t stream);
