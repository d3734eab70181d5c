// Layer normalization over the last dimension, fused with the residual addition before it.
//
//   forward    x = residual + delta            (BF16; only when delta is given)
//              y = (x - mean) * rstd * weight + bias,   mean and rstd of the BF16-rounded x, in float
//              amax of the BF16-rounded y into `amax`   (optional)
//   backward   dx_norm = rstd * (g - mean(g) - xhat * mean(g * xhat)),   g = dout * weight
//              dresidual_out = dresidual_in + dx_norm   (BF16), amax of it into `amax` (optional)
//              dweight += sum over rows of dout * xhat,  dbias += sum over rows of dout    (float, deterministic)
//
// C must be a multiple of 8, at most 16384. All pointers 16-byte aligned.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/quant_slot.h"

struct LayerNormForward {
    const __nv_bfloat16* residual;   // (rows, C)
    const __nv_bfloat16* delta;      // (rows, C), or null: x = residual and residual_out is not written
    __nv_bfloat16* residual_out;     // (rows, C), may alias residual or delta
    const float* weight;             // (C)
    const float* bias;               // (C)
    __nv_bfloat16* out;              // (rows, C)
    float* mean;                     // (rows)
    float* rstd;                     // (rows)
    QuantSlot* amax;                 // or null
    int rows, C;
    float eps = 1e-5f;
};
void layernorm_forward(const LayerNormForward& p, cudaStream_t stream);

struct LayerNormBackward {
    const __nv_bfloat16* x;             // (rows, C): what forward normalized
    const __nv_bfloat16* dout;          // (rows, C)
    const float* weight;                // (C)
    const float* mean;                  // (rows)
    const float* rstd;                  // (rows)
    const __nv_bfloat16* dresidual_in;  // (rows, C), or null for zero
    __nv_bfloat16* dresidual_out;       // (rows, C), may alias dresidual_in or dout
    float* dweight;                     // (C), accumulated into
    float* dbias;                       // (C), accumulated into
    QuantSlot* amax;                    // or null
    void* workspace;                    // layernorm_backward_workspace_bytes(C), 256-byte aligned
    int rows, C;
};
size_t layernorm_backward_workspace_bytes(int C);
void layernorm_backward(const LayerNormBackward& p, cudaStream_t stream);
