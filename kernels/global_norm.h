// Sum of squares of a flat FP32 gradient buffer, deterministic: a fixed grid writes one partial sum (float, of at most
// a few thousand squares each summed pairwise per thread) a block; optimizer_prepare (adamw.h) adds them in order.
// Many partial sums, of many ranges, can be folded into kFoldedPartials first: what ranks exchange.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

int global_norm_partials();  // number of floats that sum_of_squares writes
// n a multiple of 4, x 16-byte aligned.
void sum_of_squares(const float* x, int64_t n, float* partials, cudaStream_t stream);

constexpr int kFoldedPartials = 32;
// Each of `folded` is the sum of some of the n partials, together of all; in an order that n alone decides, added in double.
// The two must not overlap.
void fold_partials(const float* partials, int n, float* folded, cudaStream_t stream);
