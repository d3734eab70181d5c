// Softmax cross-entropy: loss and gradient of the logits in place; formulas in classifier.h.
//
// Memory-bound: 2 * Vp bytes a row read and 2 * Vp written, and two exponentials an element, about half of what the
// special function units of an SM can do in that time. So the two must overlap. Up to 57344 columns, a block holds a
// row in registers, 7 vectors of 8 a thread, and meanwhile cp.async brings the block's next row into shared memory.
// Every thread copies exactly the vectors that it will work on, so the copies need no barrier. Longer rows are read
// twice, the second time mostly from L2.
//
// The softmax takes one pass and one barrier (Milakov and Gimelshein 2018, arXiv:1805.02867): every thread has a
// maximum and a sum of its own, which are merged by rescaling. The loss is log(sum exp(x - max)) - (x_target - max),
// which stays finite and exact where the probability of the target underflows.
#include "kernels/classifier.h"

#include <cuda_pipeline.h>

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/mark.h"
#include "kernels/common/sm_count.h"

namespace {

// 16 bytes: 8 columns as pairs, the first of a pair in the low half. Plain integers, because the compiler splits the
// load and store of a vector of __nv_bfloat162 into four.
using Bf16Pairs = Vec<uint32_t, 4>;
constexpr int kColumns = 8;  // of one such vector
constexpr int kVectors = 7;  // of a row, in the registers of a thread
constexpr int kMaxThreads = 1024;
constexpr uint32_t kMinusInfinityPair = 0xff80ff80u;

__device__ __forceinline__ void store_pairs(bf16* p, const Bf16Pairs& x) {
    __stcg(reinterpret_cast<uint4*>(p), make_uint4(x[0], x[1], x[2], x[3]));  // one instruction, also in branches
}
__device__ __forceinline__ uint32_t pair_max(uint32_t a, uint32_t b) {  // a number wins over a NaN
    const __nv_bfloat162 larger =
        __hmax2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(larger);
}

// exp(x - from). The subtraction comes first, and not inside a multiply-add with log2(e): for logits of some thousands
// the product would lose the low bits of the difference.
__device__ __forceinline__ float exp_difference(float x, float from) {
    constexpr float kLog2E = 1.4426950408889634f;
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"((x - from) * kLog2E));
    return result;
}

// Replaces the columns of vector v at and above V.
__device__ __forceinline__ void fill_padding(Bf16Pairs& x, int v, int V, uint32_t fill_pair) {
    if (kColumns * v + kColumns <= V) return;
    for (int i = 0; i < 4; ++i) {
        const int column = kColumns * v + 2 * i;
        if (column >= V)
            x[i] = fill_pair;
        else if (column + 1 >= V)
            x[i] = (x[i] & 0xffffu) | (fill_pair & 0xffff0000u);
    }
}

// Maximum of some logits, and the sum of exp(x - max) over them. The maximum of no logits is the lowest finite number
// and not -inf, so that a difference of two maxima is a number. A NaN or +inf among the logits makes the sum NaN.
struct SoftmaxSum {
    float max = -FLT_MAX, sum = 0;
};
__device__ __forceinline__ SoftmaxSum merge_warp(SoftmaxSum mine) {
    const float max = warp_max(mine.max);
    return {max, warp_sum(mine.sum * exp_difference(mine.max, max))};
}
// Every thread gets the result. `scratch` may be used again after one more call with other scratch.
__device__ __forceinline__ SoftmaxSum merge_block(SoftmaxSum mine, float2* scratch) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
    mine = merge_warp(mine);
    if (lane == 0) scratch[warp] = {mine.max, mine.sum};
    __syncthreads();
    SoftmaxSum other;
    if (lane < warps) other = {scratch[lane].x, scratch[lane].y};
    return merge_warp(other);
}

template <int N>
__device__ __forceinline__ SoftmaxSum softmax_sum(const Bf16Pairs (&x)[N]) {
    uint32_t max_pair = x[0][0];
#pragma unroll
    for (int k = 0; k < N; ++k)
        for (int i = 0; i < 4; ++i) max_pair = pair_max(max_pair, x[k][i]);
    const float2 both = unpack(max_pair);
    SoftmaxSum result;
    result.max = fmaxf(result.max, fmaxf(both.x, both.y));
    float even = 0, odd = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack(x[k][i]);
            even += exp_difference(pair.x, result.max);
            odd += exp_difference(pair.y, result.max);
        }
    }
    result.sum = even + odd;
    return result;
}

// Gradient of vector v, given its logits, as if the target were elsewhere. factor = gradient_scale / sum
__device__ __forceinline__ Bf16Pairs gradient_of(const Bf16Pairs& x, int v, int V, float max, float factor) {
    Bf16Pairs y;
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack(x[i]);
        y[i] = pack(exp_difference(pair.x, max) * factor, exp_difference(pair.y, max) * factor);
    }
    fill_padding(y, v, V, 0);
    return y;
}

// The thread that works on the target's vector reads its logit first, and corrects its gradient last.
__device__ __forceinline__ bool owns(int target) { return target / kColumns % int(blockDim.x) == int(threadIdx.x); }

// A target outside the vocabulary is the caller's error: its loss is NaN, which accumulate_loss reports.
__device__ __forceinline__ float target_logit_of(const bf16* logits, int target, int V) {
    return target < V ? __bfloat162float(logits[target]) : __int_as_float(0x7fffffff);
}
__device__ __forceinline__ void finish_target(const Classifier& p, int64_t row, int target, float logit,
                                              const SoftmaxSum& softmax, float gradient_scale) {
    p.losses[row] = logf(softmax.sum) - (logit - softmax.max);
    if (!p.gradient_scale || target >= p.V) return;
    const float probability = exp_difference(logit, softmax.max) / softmax.sum;
    p.logits[row * p.Vp + target] = __float2bfloat16_rn((probability - 1.0f) * gradient_scale);
}

// A masked row
__device__ __forceinline__ void write_zeros(const Classifier& p, int64_t row) {
    if (threadIdx.x == 0) p.losses[row] = 0;
    if (!p.gradient_scale) return;
    for (int v = threadIdx.x; v < p.Vp / kColumns; v += blockDim.x)
        store_pairs(p.logits + row * p.Vp + kColumns * v, Bf16Pairs{});
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows that fit in the registers of a block

// Thread t works on vectors t, t + blockDim.x, ... of every row; vector v waits in next_row[v].
__device__ __forceinline__ void start_copy(Bf16Pairs* next_row, const bf16* logits, int vectors) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int v = threadIdx.x + k * blockDim.x;
        if (v < vectors) __pipeline_memcpy_async(next_row + v, logits + kColumns * v, sizeof(Bf16Pairs));
    }
    __pipeline_commit();
}

__global__ void __launch_bounds__(kMaxThreads, 1) row_in_registers_kernel(Classifier p) {
    extern __shared__ Bf16Pairs next_row[];
    __shared__ float2 scratch[2][kWarpSize];

    const int vectors = p.Vp / kColumns;
    const float gradient_scale = p.gradient_scale ? *p.gradient_scale : 0.0f;
    int64_t row = blockIdx.x;
    int target = p.targets[row];
    // Known one row ahead, because masked rows are not copied.
    int next_target = row + gridDim.x < p.rows ? p.targets[row + gridDim.x] : -1;
    if (target >= 0) start_copy(next_row, p.logits + row * p.Vp, vectors);

    for (int turn = 0; row < p.rows; row += gridDim.x) {
        const int64_t next = row + gridDim.x;
        const int target_after = next + gridDim.x < p.rows ? p.targets[next + gridDim.x] : -1;
        bf16* const logits = p.logits + row * p.Vp;

        if (target < 0) {
            if (next_target >= 0) start_copy(next_row, p.logits + next * p.Vp, vectors);
            write_zeros(p, row);
        } else {
            const float target_logit = owns(target) ? target_logit_of(logits, target, p.V) : 0.0f;

            // From shared memory to registers; then the next row may come.
            __pipeline_wait_prior(0);
            Bf16Pairs x[kVectors];
#pragma unroll
            for (int k = 0; k < kVectors; ++k) {
                const int v = threadIdx.x + k * blockDim.x;
                for (int i = 0; i < 4; ++i) x[k][i] = kMinusInfinityPair;
                if (v >= vectors) continue;
                x[k] = next_row[v];
                fill_padding(x[k], v, p.V, kMinusInfinityPair);
            }
            if (next_target >= 0) start_copy(next_row, p.logits + next * p.Vp, vectors);

            const SoftmaxSum softmax = merge_block(softmax_sum(x), scratch[turn]);
            turn ^= 1;
            if (p.gradient_scale) {
                const float factor = gradient_scale / softmax.sum;
#pragma unroll
                for (int k = 0; k < kVectors; ++k) {
                    const int v = threadIdx.x + k * blockDim.x;
                    if (v < vectors) store_pairs(logits + kColumns * v, gradient_of(x[k], v, p.V, softmax.max, factor));
                }
            }
            if (owns(target)) finish_target(p, row, target, target_logit, softmax, gradient_scale);
        }
        target = next_target;
        next_target = target_after;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Longer rows: two reads

constexpr int kUnroll = 4;

__device__ __forceinline__ void load_logits(Bf16Pairs (&x)[kUnroll], const bf16* logits, int first, int V,
                                            int vectors) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const int v = first + u * kMaxThreads;
        for (int i = 0; i < 4; ++i) x[u][i] = kMinusInfinityPair;
        if (v < vectors) x[u] = load<Bf16Pairs>(logits + kColumns * v);
        fill_padding(x[u], v, V, kMinusInfinityPair);
    }
}

__global__ void __launch_bounds__(kMaxThreads, 1) row_read_twice_kernel(Classifier p) {
    __shared__ float2 scratch[2][kWarpSize];

    const int vectors = p.Vp / kColumns;
    const float gradient_scale = p.gradient_scale ? *p.gradient_scale : 0.0f;
    int turn = 0;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        bf16* const logits = p.logits + row * p.Vp;
        const int target = p.targets[row];
        if (target < 0) {
            write_zeros(p, row);
            continue;
        }
        const float target_logit = owns(target) ? target_logit_of(logits, target, p.V) : 0.0f;

        SoftmaxSum mine;
        for (int first = threadIdx.x; first < vectors; first += kUnroll * kMaxThreads) {
            Bf16Pairs x[kUnroll];
            load_logits(x, logits, first, p.V, vectors);
            const SoftmaxSum more = softmax_sum(x);
            const float max = fmaxf(mine.max, more.max);
            mine.sum = mine.sum * exp_difference(mine.max, max) + more.sum * exp_difference(more.max, max);
            mine.max = max;
        }
        const SoftmaxSum softmax = merge_block(mine, scratch[turn]);
        turn ^= 1;
        if (p.gradient_scale) {
            const float factor = gradient_scale / softmax.sum;
            for (int first = threadIdx.x; first < vectors; first += kUnroll * kMaxThreads) {
                Bf16Pairs x[kUnroll];
                load_logits(x, logits, first, p.V, vectors);
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    const int v = first + u * kMaxThreads;
                    if (v < vectors) store_pairs(logits + kColumns * v, gradient_of(x[u], v, p.V, softmax.max, factor));
                }
            }
        }
        if (owns(target)) finish_target(p, row, target, target_logit, softmax, gradient_scale);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sum of the losses: one block; in double, so that the order of additions hardly matters, and in a fixed order

__global__ void __launch_bounds__(kMaxThreads)
    accumulate_loss_kernel(const float* losses, int n, const float* scale, float* sum, uint32_t* nonfinite) {
    __shared__ double warp_sums[kWarpSize];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    double total = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < n; i += kMaxThreads) total += losses[i];
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (lane == 0) warp_sums[warp] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    total = 0;
    for (int w = 0; w < kMaxThreads / kWarpSize; ++w) total += warp_sums[w];
    const float result = float(*sum + (scale ? double(*scale) : 1.0) * total);
    *sum = result;
    if (nonfinite && !isfinite(result)) *nonfinite = 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// Bytes of dynamic shared memory that a block of row_in_registers_kernel can have: all that the GPU gives a block (227 KB
// on Hopper, 99 KB on sm_86 and sm_89) less what the kernel declares.
int row_shared_bytes() {
    static const int bytes = [] {
        int device = 0, most = 0;
        cudaFuncAttributes kernel{};
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        CUDA_CHECK(cudaFuncGetAttributes(&kernel, row_in_registers_kernel));
        most -= int(kernel.sharedSizeBytes);
        CUDA_CHECK(cudaFuncSetAttribute(row_in_registers_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
        return most;
    }();
    return bytes;
}

void launch_row_in_registers(const Classifier& p, int shared_bytes, cudaStream_t stream) {
    const int threads = int(ceil_div(ceil_div(p.Vp / kColumns, kVectors), kWarpSize)) * kWarpSize;
    int blocks_per_sm = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, row_in_registers_kernel, threads,
                                                             shared_bytes));
    const int blocks = std::min(p.rows, sm_count() * blocks_per_sm);
    row_in_registers_kernel<<<blocks, threads, shared_bytes, stream>>>(p);
    CUDA_CHECK_LAUNCH();
}

}  // namespace

void classifier(const Classifier& p, cudaStream_t stream) {
    const Mark mark("classifier", {.bytes = 2.0 * p.rows * p.V * (p.gradient_scale ? 2 : 1)});
    REQUIRE(p.rows > 0, "classifier: rows=%d must be positive", p.rows);
    REQUIRE(p.V > 0 && p.V <= p.Vp, "classifier: V=%d must be positive and at most Vp=%d", p.V, p.Vp);
    REQUIRE(p.Vp % kColumns == 0, "classifier: Vp=%d must be a multiple of %d", p.Vp, kColumns);
    REQUIRE(p.logits && p.targets && p.losses, "classifier: logits, targets and losses must not be null");
    REQUIRE(reinterpret_cast<uintptr_t>(p.logits) % 16 == 0, "classifier: logits must be 16-byte aligned");

    const int row_bytes = p.Vp * int(sizeof(bf16));
    if (p.Vp <= kColumns * kVectors * kMaxThreads && row_bytes <= row_shared_bytes())
        return launch_row_in_registers(p, row_bytes, stream);
    // One block an SM: more rows at a time would not stay in L2 until their second read.
    row_read_twice_kernel<<<std::min(p.rows, sm_count()), kMaxThreads, 0, stream>>>(p);
    CUDA_CHECK_LAUNCH();
}

void accumulate_loss(const float* losses, int n, const float* scale, float* sum, uint32_t* nonfinite,
                     cudaStream_t stream) {
    const Mark mark("accumulate_loss", {.bytes = 4.0 * n});
    REQUIRE(n > 0, "accumulate_loss: n=%d must be positive", n);
    REQUIRE(losses && sum, "accumulate_loss: losses and sum must not be null");
    accumulate_loss_kernel<<<1, kMaxThreads, 0, stream>>>(losses, n, scale, sum, nonfinite);
    CUDA_CHECK_LAUNCH();
}
