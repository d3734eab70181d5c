// Softmax cross-entropy on a chunk of tokens: loss and gradient of the logits in one read and one write.
//
//   lse = log(sum over v < V of exp(logits[r,v]))
//   losses[r] = lse - logits[r, target[r]]
//   logits[r,v] <- (exp(logits[r,v] - lse) - (v == target[r])) * gradient_scale     (in place, BF16; 0 for v >= V)
//
// A negative target masks its row: loss 0, gradient 0. gradient_scale is read from device memory: 1 / valid tokens of
// the global batch. Vp (padded vocabulary) must be a multiple of 8; pointers 16-byte aligned.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

struct Classifier {
    __nv_bfloat16* logits;        // (rows, Vp)
    const int* targets;           // (rows)
    float* losses;                // (rows)
    const float* gradient_scale;  // device scalar; null: losses only, logits stay untouched
    int rows, V, Vp;
};
void classifier(const Classifier& p, cudaStream_t stream);

// *sum += scale * (losses[0] + ... + losses[n-1]) in a fixed order; raises *nonfinite if the result is inf or NaN.
// `scale` is a device scalar or null for 1; `nonfinite` may be null.
void accumulate_loss(const float* losses, int n, const float* scale, float* sum, uint32_t* nonfinite, cudaStream_t stream);
