// GELU, tanh form: gelu(h) = 0.5 h (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3))).
//
// Pointwise over n BF16 values (multiple of 8, pointers 16-byte aligned), computed in float, rounded once.
// amax (optional) is that of the BF16-rounded result.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/quant_slot.h"

// out = gelu(h); `out` may alias h.
void gelu_forward(const __nv_bfloat16* h, __nv_bfloat16* out, int64_t n, QuantSlot* amax, cudaStream_t stream);

// amax of bf16(gelu(h)) without storing it: the first pass of a fused GELU + quantization (quantize.h).
void gelu_amax(const __nv_bfloat16* h, int64_t n, QuantSlot* amax, cudaStream_t stream);

// dh = dout * gelu'(h); `dh` may alias dout.
void gelu_backward(const __nv_bfloat16* h, const __nv_bfloat16* dout, __nv_bfloat16* dh, int64_t n, QuantSlot* amax,
                   cudaStream_t stream);
