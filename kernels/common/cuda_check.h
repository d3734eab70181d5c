// Checked CUDA calls: CUDA_CHECK(cudaMalloc(...)) throws Error naming the expression and the place.
#pragma once
#include <cuda_runtime.h>

#include "kernels/common/check.h"

inline void cuda_check(cudaError_t status, const char* expression, const char* file, int line) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clear it, or the next unrelated call would report it again
    throw Error(message("%s failed: %s (%s:%d)", expression, cudaGetErrorString(status), file, line));
}

#define CUDA_CHECK(expression) cuda_check((expression), #expression, __FILE__, __LINE__)

// After every <<<>>>: a refused launch is reported here and not by a later, innocent call.
#define CUDA_CHECK_LAUNCH() cuda_check(cudaGetLastError(), "kernel launch", __FILE__, __LINE__)
