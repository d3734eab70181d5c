// Sum of squares of a flat FP32 gradient buffer, deterministic: a fixed grid writes one partial sum (float, of at most
// a few thousand squares each summed pairwise per thread) a block; optimizer_prepare (adamw.h) adds them in order.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

int global_norm_partials();  // number of floats that sum_of_squares writes
// n a multiple of 4, x 16-byte aligned.
void sum_of_squares(const float* x, int64_t n, float* partials, cudaStream_t stream);
