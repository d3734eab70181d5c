// Sum of squares of a flat FP32 buffer: 4 bytes read an element, nothing else.
//
// The grid is fixed, so the partial sums, and with them the gradient norm, do not depend on the GPU. A thread squares
// the four floats of a 16-byte load and adds them as a pair of pairs in float, then accumulates in double: one
// conversion and one double addition for four elements cost nothing beside the memory traffic, and the sum's relative
// error stays at the few float roundings of a group of four (below 2^-22), however many elements there are.
#include "kernels/global_norm.h"

#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/mark.h"

namespace {

constexpr int kBlocks = 1024;  // 8 for each multiprocessor of an H100, less 3 %
constexpr int kThreads = 256;
constexpr int kLoads = 4;      // 16-byte loads in flight a thread

__global__ void __launch_bounds__(kThreads) sum_of_squares_kernel(const float* __restrict__ x, int64_t vectors,
                                                                  float* __restrict__ partials) {
    constexpr int64_t kStride = int64_t(kBlocks) * kThreads;
    double sum = 0.0;
    for (int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x; first < vectors; first += kStride * kLoads) {
        F32x4 v[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int64_t i = first + k * kStride;
            v[k] = i < vectors ? load_streaming<F32x4>(x + 4 * i) : F32x4{};
        }
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
            sum += double((v[k][0] * v[k][0] + v[k][1] * v[k][1]) + (v[k][2] * v[k][2] + v[k][3] * v[k][3]));
    }

    __shared__ double warp_sums[kThreads / kWarpSize];
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (const double warp_total : warp_sums) total += warp_total;
        partials[blockIdx.x] = float(total);
    }
}

// One block, a result a warp.
constexpr int kFoldThreads = kFoldedPartials * kWarpSize;

__global__ void __launch_bounds__(kFoldThreads) fold_partials_kernel(const float* __restrict__ partials, int n, float* __restrict__ folded) {
    double sum = 0.0;
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += kFoldThreads) sum += double(partials[i]);
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (threadIdx.x % kWarpSize == 0) folded[threadIdx.x / kWarpSize] = float(sum);
}

}  // namespace

int global_norm_partials() { return kBlocks; }

void sum_of_squares(const float* x, int64_t n, float* partials, cudaStream_t stream) {
    const Mark mark("sum_of_squares", {.bytes = 4.0 * double(n)});
    REQUIRE(n >= 0 && n % 4 == 0, "sum_of_squares: n=%lld must be a multiple of 4", static_cast<long long>(n));
    REQUIRE(reinterpret_cast<uintptr_t>(x) % 16 == 0, "sum_of_squares: x=%p must be 16-byte aligned",
            static_cast<const void*>(x));
    sum_of_squares_kernel<<<kBlocks, kThreads, 0, stream>>>(x, n / 4, partials);
    CUDA_CHECK_LAUNCH();
}

void fold_partials(const float* partials, int n, float* folded, cudaStream_t stream) {
    const Mark mark("fold_partials");
    REQUIRE(n >= 0, "fold_partials: n=%d must not be negative", n);
    fold_partials_kernel<<<1, kFoldThreads, 0, stream>>>(partials, n, folded);
    CUDA_CHECK_LAUNCH();
}
