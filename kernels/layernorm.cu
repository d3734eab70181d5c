// Layer normalization (Ba, Kiros, Hinton 2016, arXiv:1607.06450) with the residual addition before it; formulas in
// layernorm.h. Memory-bound: 4 bytes an element forward (8 with the addition), 8 backward, each read and written once.
//
// Forward. One warp owns a row (C <= 2048; a block above), holds it in registers as BF16 pairs, which is exact because
// the statistics are those of the rounded x, and so can afford the two-pass variance: mean first, then the centred
// squares. The grid fills the GPU once and strides over rows; the loads of a warp's next row are in flight while it
// works on this one.
//
// Backward. A block owns whole rows and a thread owns columns (the same ones in every row), so dweight and dbias add up
// without communication, in a fixed order, in shared memory that no other thread touches. Every block writes its sums
// to the workspace and a second kernel adds those up, again in a fixed order: no float atomics, the same bits each run.
// Two rows are in work at a time and the next two in flight; the row sums cost one barrier for both.
#include "kernels/layernorm.h"

#include <algorithm>

#include "kernels/common/cuda_check.h"
#include "kernels/common/dependent_launch.cuh"
#include "kernels/common/device.cuh"
#include "kernels/common/mark.h"
#include "kernels/common/sm_count.h"

namespace {

// 16 bytes: 8 columns as pairs, the first of a pair in the low half. Plain integers, because the compiler splits the
// load and store of a vector of __nv_bfloat162 into four.
using Bf16Pairs = Vec<uint32_t, 4>;
constexpr int kColumns = 8;  // of one such vector

// BF16 sum of two pairs: the exact sums, rounded once.
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
    const __nv_bfloat162 sum =
        __hadd2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(sum);
}

// Float vectors over C columns (weight, bias, their gradients) lie in shared memory as two planes: the float4 of
// columns 8v..8v+3 at [v] and that of 8v+4..8v+7 at [vectors + v]. Threads with neighbouring v then read neighbouring
// 16 bytes, which is free of bank conflicts; the plain order would be two-way conflicted.
struct EightFloats {
    float v[kColumns];
};
__device__ __forceinline__ EightFloats load_planes(const float4* planes, int v, int vectors) {
    const float4 low = planes[v], high = planes[vectors + v];
    return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}
__device__ __forceinline__ void store_planes(float4* planes, int v, int vectors, const EightFloats& x) {
    planes[v] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    planes[vectors + v] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

constexpr int kMaxThreadsForward(bool row_per_block) { return row_per_block ? 512 : 128; }

template <int VECTORS>
__device__ __forceinline__ void load_row(Bf16Pairs (&x)[VECTORS], const bf16* row, int lane, int width, int vectors) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const int v = lane + k * width;
        if (v < vectors) x[k] = load_streaming<Bf16Pairs>(row + kColumns * v);
    }
}

// Blocks a multiprocessor should hold: as many as leave a thread enough registers not to spill. Without an addition a
// thread needs a quarter fewer.
constexpr int resident_blocks_forward(int vectors, bool addition) {
    if (addition) return vectors <= 3 ? 6 : 3;
    return vectors <= 3 ? 8 : vectors <= 6 ? 5 : 4;
}

// VECTORS: of a thread. A row belongs to a warp, or to the block: then C <= 8 * VECTORS * (threads of one of them).
template <int VECTORS, bool ROW_PER_BLOCK, bool ADDITION>
__global__ void __launch_bounds__(kMaxThreadsForward(ROW_PER_BLOCK), ROW_PER_BLOCK ? 1 : resident_blocks_forward(VECTORS, ADDITION))
    forward_kernel(LayerNormForward p) {
    extern __shared__ float4 planes[];  // weight, then bias
    __shared__ float scratch[2][kWarpSize];

    const int vectors = p.C / kColumns;
    const int width = ROW_PER_BLOCK ? blockDim.x : kWarpSize;
    const int lane = threadIdx.x % width;
    const int rows_per_block = blockDim.x / width;
    const int64_t stride = int64_t(gridDim.x) * rows_per_block;
    const float inverse_C = 1.0f / p.C;
    uint32_t most = 0;

    int64_t row = int64_t(blockIdx.x) * rows_per_block + threadIdx.x / width;
    Bf16Pairs residual[VECTORS], delta[ADDITION ? VECTORS : 1];
    if (row < p.rows) {
        load_row(residual, p.residual + row * p.C, lane, width, vectors);
        if constexpr (ADDITION) load_row(delta, p.delta + row * p.C, lane, width, vectors);
    }

    // While the first rows are on their way
    float4* const weight = planes;
    float4* const bias = planes + 2 * vectors;
    for (int i = threadIdx.x; i < 2 * vectors; i += blockDim.x) {
        const int place = (i % 2) * vectors + i / 2;
        weight[place] = load<float4>(p.weight + 4 * i);
        bias[place] = load<float4>(p.bias + 4 * i);
    }
    __syncthreads();

    for (; row < p.rows; row += stride) {
        // This row's x; then the registers that it came from are free for the next row.
        Bf16Pairs x[VECTORS];
#pragma unroll
        for (int k = 0; k < VECTORS; ++k) {
            x[k] = residual[k];
            if constexpr (ADDITION)
                for (int i = 0; i < 4; ++i) x[k][i] = add_pairs(x[k][i], delta[k][i]);
        }
        if (row + stride < p.rows) {
            load_row(residual, p.residual + (row + stride) * p.C, lane, width, vectors);
            if constexpr (ADDITION) load_row(delta, p.delta + (row + stride) * p.C, lane, width, vectors);
        }

        // Mean
        float sum = 0;
#pragma unroll
        for (int k = 0; k < VECTORS; ++k) {
            const int v = lane + k * width;
            if (v >= vectors) continue;
            if constexpr (ADDITION) store_streaming(p.residual_out + row * p.C + kColumns * v, x[k]);
            for (int i = 0; i < 4; ++i) {
                const float2 pair = unpack(x[k][i]);
                sum += pair.x + pair.y;
            }
        }
        const float mean = (ROW_PER_BLOCK ? block_sum(sum, scratch[0]) : warp_sum(sum)) * inverse_C;

        // Variance
        float squares = 0;
#pragma unroll
        for (int k = 0; k < VECTORS; ++k) {
            if (lane + k * width >= vectors) continue;
            for (int i = 0; i < 4; ++i) {
                const float2 pair = unpack(x[k][i]);
                squares += (pair.x - mean) * (pair.x - mean);
                squares += (pair.y - mean) * (pair.y - mean);
            }
        }
        const float variance = (ROW_PER_BLOCK ? block_sum(squares, scratch[1]) : warp_sum(squares)) * inverse_C;
        const float rstd = rsqrtf(variance + p.eps);
        if (lane == 0) {
            p.mean[row] = mean;
            p.rstd[row] = rstd;
        }

        // Output
#pragma unroll
        for (int k = 0; k < VECTORS; ++k) {
            const int v = lane + k * width;
            if (v >= vectors) continue;
            const EightFloats w = load_planes(weight, v, vectors), b = load_planes(bias, v, vectors);
            Bf16Pairs y;
            for (int i = 0; i < 4; ++i) {
                const float2 pair = unpack(x[k][i]);
                y[i] = pack((pair.x - mean) * rstd * w.v[2 * i] + b.v[2 * i],
                                             (pair.y - mean) * rstd * w.v[2 * i + 1] + b.v[2 * i + 1]);
                most = pair_amax(most, y[i]);
            }
            store_streaming(p.out + row * p.C + kColumns * v, y);
        }
    }
    if (p.amax) block_amax_to_slot(amax_bits_of_pair(most), p.amax);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

constexpr int kMaxThreadsBackward = 512;
constexpr int kMaxWarpsBackward = kMaxThreadsBackward / kWarpSize;

// What a thread holds of ROWS rows: VECTORS vectors of each. Rows past the end and columns past C are zeros, and add
// nothing to any sum.
template <int VECTORS, int ROWS>
struct HeldRows {
    Bf16Pairs x[ROWS][VECTORS], dout[ROWS][VECTORS], dresidual[ROWS][VECTORS];
    float mean[ROWS], rstd[ROWS];

    __device__ __forceinline__ void load_from(const LayerNormBackward& p, int64_t first_row, int vectors) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int64_t row = first_row + r;
#pragma unroll
            for (int k = 0; k < VECTORS; ++k) {
                const int v = threadIdx.x + k * blockDim.x;
                const int64_t at = row * p.C + kColumns * v;
                const bool inside = row < p.rows && v < vectors;
                x[r][k] = inside ? load<Bf16Pairs>(p.x + at) : Bf16Pairs{};
                dout[r][k] = inside ? load<Bf16Pairs>(p.dout + at) : Bf16Pairs{};
                dresidual[r][k] =
                    inside && p.dresidual_in ? load<Bf16Pairs>(p.dresidual_in + at) : Bf16Pairs{};
            }
            mean[r] = row < p.rows ? p.mean[row] : 0.0f;
            rstd[r] = row < p.rows ? p.rstd[row] : 0.0f;
        }
    }
};

template <int VECTORS, int ROWS>
__global__ void __launch_bounds__(kMaxThreadsBackward, 1) backward_kernel(LayerNormBackward p) {
    allow_dependent_launch();
    extern __shared__ float4 planes[];  // this block's dweight, then dbias; a thread touches its own columns only
    // Row sums of the warps; two copies in turn, so that one barrier a turn is enough: who writes a copy again has
    // passed the barrier of the turn between, and so has everybody who read it.
    using RowSums = Vec<float, 2 * ROWS>;  // of g and of g * xhat, for each row in work
    __shared__ RowSums scratch[2][kMaxWarpsBackward];
    constexpr bool kPrefetch = VECTORS <= 2;  // with four vectors, two sets of rows do not fit in 128 registers

    const int vectors = p.C / kColumns;
    float4* const dweight = planes;
    float4* const dbias = planes + 2 * vectors;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
    const float inverse_C = 1.0f / p.C;

    EightFloats weight[VECTORS];
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const int v = threadIdx.x + k * blockDim.x;
        weight[k] = {};
        if (v >= vectors) continue;
        const F32x4 low = load<F32x4>(p.weight + kColumns * v), high = load<F32x4>(p.weight + kColumns * v + 4);
        for (int i = 0; i < 4; ++i) weight[k].v[i] = low[i], weight[k].v[4 + i] = high[i];
        store_planes(dweight, v, vectors, {});
        store_planes(dbias, v, vectors, {});
    }

    uint32_t most = 0;
    int turn = 0;
    const int64_t stride = int64_t(gridDim.x) * ROWS;
    int64_t first_row = int64_t(blockIdx.x) * ROWS;
    HeldRows<VECTORS, ROWS> held;
    held.load_from(p, first_row, vectors);
    for (; first_row < p.rows; first_row += stride, turn ^= 1) {
        HeldRows<VECTORS, ROWS> next;
        if constexpr (kPrefetch) next.load_from(p, first_row + stride, vectors);

        // xhat = x * rstd + offset
        float offset[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) offset[r] = -held.mean[r] * held.rstd[r];

        // Sums over the columns of this thread, and over the rows in work
        RowSums sums = {};
#pragma unroll
        for (int k = 0; k < VECTORS; ++k) {
            const int v = threadIdx.x + k * blockDim.x;
            if (v >= vectors) continue;
            EightFloats dw = load_planes(dweight, v, vectors), db = load_planes(dbias, v, vectors);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const auto add = [&](int column, float x, float dout) {
                    const float xhat = x * held.rstd[r] + offset[r], g = dout * weight[k].v[column];
                    sums[2 * r] += g;
                    sums[2 * r + 1] += g * xhat;
                    dw.v[column] += dout * xhat;
                    db.v[column] += dout;
                };
                for (int i = 0; i < 4; ++i) {
                    const float2 x = unpack(held.x[r][k][i]), dout = unpack(held.dout[r][k][i]);
                    add(2 * i, x.x, dout.x);
                    add(2 * i + 1, x.y, dout.y);
                }
            }
            store_planes(dweight, v, vectors, dw);
            store_planes(dbias, v, vectors, db);
        }

        // Sums over the row
#pragma unroll
        for (int j = 0; j < 2 * ROWS; ++j) sums[j] = warp_sum(sums[j]);
        if (lane == 0) scratch[turn][warp] = sums;
        __syncthreads();
        sums = scratch[turn][0];
        for (int w = 1; w < warps; ++w) {
            const RowSums other = scratch[turn][w];
#pragma unroll
            for (int j = 0; j < 2 * ROWS; ++j) sums[j] += other[j];
        }

        // Gradient of the residual stream: rstd * (g - mean(g) - xhat * mean(g * xhat)) = rstd * g + slope * x + level
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (first_row + r >= p.rows) continue;
            const float rstd = held.rstd[r];
            const float mean_g = sums[2 * r] * inverse_C, mean_g_xhat = sums[2 * r + 1] * inverse_C;
            const float slope = -rstd * rstd * mean_g_xhat;
            const float level = -rstd * (mean_g + offset[r] * mean_g_xhat);
#pragma unroll
            for (int k = 0; k < VECTORS; ++k) {
                const int v = threadIdx.x + k * blockDim.x;
                if (v >= vectors) continue;
                const auto result = [&](int column, float before, float x, float dout) {
                    return before + (dout * weight[k].v[column] * rstd + (x * slope + level));
                };
                Bf16Pairs y;
                for (int i = 0; i < 4; ++i) {
                    const float2 before = unpack(held.dresidual[r][k][i]);
                    const float2 x = unpack(held.x[r][k][i]), dout = unpack(held.dout[r][k][i]);
                    y[i] = pack(result(2 * i, before.x, x.x, dout.x), result(2 * i + 1, before.y, x.y, dout.y));
                    most = pair_amax(most, y[i]);
                }
                store(p.dresidual_out + (first_row + r) * p.C + kColumns * v, y);
            }
        }
        if constexpr (kPrefetch)
            held = next;
        else
            held.load_from(p, first_row + stride, vectors);
    }

    // This block's sums: (2, C) floats, dweight then dbias
    float* const partial = static_cast<float*>(p.workspace) + int64_t(blockIdx.x) * 2 * p.C;
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const int v = threadIdx.x + k * blockDim.x;
        if (v >= vectors) continue;
        for (int half = 0; half < 2; ++half) {
            store(partial + kColumns * v + 4 * half, dweight[half * vectors + v]);
            store(partial + p.C + kColumns * v + 4 * half, dbias[half * vectors + v]);
        }
    }
    if (p.amax) block_amax_to_slot(amax_bits_of_pair(most), p.amax);
}

// Adds up the partial sums (partials, 2, C) column by column: lane = column, warp w adds partials w, w + 32, ..., and
// then the 32 sums are added in order.
constexpr int kSumWarps = 32;
__global__ void __launch_bounds__(kWarpSize* kSumWarps)
    sum_partials_kernel(const float* partial, int partials, int C, float* dweight, float* dbias) {
    __shared__ float sums[kSumWarps][kWarpSize];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int column = blockIdx.x * kWarpSize + lane;
    float sum = 0;
    wait_for_previous_kernel();
    if (column < 2 * C)
#pragma unroll 8
        for (int i = warp; i < partials; i += kSumWarps) sum += partial[int64_t(i) * 2 * C + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= 2 * C) return;
    float total = 0;
    for (int w = 0; w < kSumWarps; ++w) total += sums[w][lane];
    float& destination = column < C ? dweight[column] : dbias[column - C];
    destination += total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

constexpr int kMaxColumns = 16384;
constexpr int kDefaultSharedBytes = 48 * 1024;  // above it, a kernel has to ask

bool aligned(const void* pointer, uintptr_t bytes = 16) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int whole_warps(int64_t threads) { return int(ceil_div(threads, kWarpSize)) * kWarpSize; }

template <class Kernel>
void allow_shared_bytes(Kernel* kernel, int bytes) {
    if (bytes > kDefaultSharedBytes)
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

void require_shape(const char* name, int rows, int C) {
    REQUIRE(rows > 0, "%s: rows=%d must be positive", name, rows);
    REQUIRE(C > 0 && C <= kMaxColumns && C % kColumns == 0, "%s: C=%d must be a multiple of %d, at most %d", name, C,
            kColumns, kMaxColumns);
}

template <int VECTORS, bool ROW_PER_BLOCK>
void launch_forward(const LayerNormForward& p, int threads, cudaStream_t stream) {
    const auto kernel = p.delta ? forward_kernel<VECTORS, ROW_PER_BLOCK, true> : forward_kernel<VECTORS, ROW_PER_BLOCK, false>;
    const int shared_bytes = 2 * p.C * int(sizeof(float));
    allow_shared_bytes(kernel, shared_bytes);
    int blocks_per_sm = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, threads, shared_bytes));
    const int rows_per_block = ROW_PER_BLOCK ? 1 : threads / kWarpSize;
    const int64_t blocks = std::min(ceil_div(p.rows, rows_per_block), int64_t(sm_count()) * blocks_per_sm);
    kernel<<<unsigned(blocks), threads, shared_bytes, stream>>>(p);
    CUDA_CHECK_LAUNCH();
}

// Threads of a backward block: one a vector of a row, up to 512; then two or four vectors a thread.
int backward_threads(int C) {
    const int vectors = C / kColumns;
    const int vectors_per_thread = vectors <= kMaxThreadsBackward ? 1 : vectors <= 2 * kMaxThreadsBackward ? 2 : 4;
    return whole_warps(ceil_div(vectors, vectors_per_thread));
}

// The most blocks of a backward launch, from C and the device alone, because it fixes the order of additions. 512
// threads of 128 registers are what an SM holds.
int backward_blocks(int C) { return sm_count() * (kMaxThreadsBackward / backward_threads(C)); }

template <int VECTORS, int ROWS>
int launch_backward(const LayerNormBackward& p, int threads, cudaStream_t stream) {
    const auto kernel = backward_kernel<VECTORS, ROWS>;
    const int shared_bytes = 2 * p.C * int(sizeof(float));
    allow_shared_bytes(kernel, shared_bytes);
    const int blocks = int(std::min(ceil_div(p.rows, ROWS), int64_t(backward_blocks(p.C))));
    kernel<<<blocks, threads, shared_bytes, stream>>>(p);
    CUDA_CHECK_LAUNCH();
    return blocks;
}

}  // namespace

void layernorm_forward(const LayerNormForward& p, cudaStream_t stream) {
    const Mark mark("layernorm_forward", {.bytes = 2.0 * p.rows * p.C * (p.delta ? 4 : 2)});
    require_shape("layernorm_forward", p.rows, p.C);
    REQUIRE(p.residual && p.weight && p.bias && p.out && p.mean && p.rstd && (!p.delta || p.residual_out),
            "layernorm_forward: a required pointer is null");
    REQUIRE(aligned(p.residual) && aligned(p.delta) && aligned(p.residual_out) && aligned(p.weight) &&
                aligned(p.bias) && aligned(p.out),
            "layernorm_forward: pointers must be 16-byte aligned");

    constexpr int kWarpRowThreads = kMaxThreadsForward(false);
    const int64_t vectors_per_lane = ceil_div(p.C, kColumns * kWarpSize);
    if (vectors_per_lane <= 2) return launch_forward<2, false>(p, kWarpRowThreads, stream);
    if (vectors_per_lane <= 3) return launch_forward<3, false>(p, kWarpRowThreads, stream);
    if (vectors_per_lane <= 4) return launch_forward<4, false>(p, kWarpRowThreads, stream);
    if (vectors_per_lane <= 6) return launch_forward<6, false>(p, kWarpRowThreads, stream);
    if (vectors_per_lane <= 7) return launch_forward<7, false>(p, kWarpRowThreads, stream);
    if (vectors_per_lane <= 8) return launch_forward<8, false>(p, kWarpRowThreads, stream);
    static_assert(kMaxColumns <= kColumns * 4 * kMaxThreadsForward(true));
    launch_forward<4, true>(p, whole_warps(ceil_div(p.C, kColumns * 4)), stream);
}

size_t layernorm_backward_workspace_bytes(int C) {
    require_shape("layernorm_backward_workspace_bytes", 1, C);
    return size_t(backward_blocks(C)) * 2 * C * sizeof(float);
}

void layernorm_backward(const LayerNormBackward& p, cudaStream_t stream) {
    const Mark mark("layernorm_backward", {.bytes = 2.0 * p.rows * p.C * (p.dresidual_in ? 4 : 3)});
    require_shape("layernorm_backward", p.rows, p.C);
    REQUIRE(p.x && p.dout && p.weight && p.mean && p.rstd && p.dresidual_out && p.dweight && p.dbias && p.workspace,
            "layernorm_backward: a required pointer is null");
    REQUIRE(aligned(p.x) && aligned(p.dout) && aligned(p.weight) && aligned(p.dresidual_in) &&
                aligned(p.dresidual_out) && aligned(p.workspace, 256),
            "layernorm_backward: pointers must be 16-byte aligned, the workspace 256-byte");

    const int threads = backward_threads(p.C);
    const int64_t vectors_per_thread = ceil_div(p.C, int64_t(kColumns) * threads);
    static_assert(kMaxColumns <= kColumns * 4 * kMaxThreadsBackward);
    const int partials = vectors_per_thread <= 1   ? launch_backward<1, 2>(p, threads, stream)
                         : vectors_per_thread <= 2 ? launch_backward<2, 1>(p, threads, stream)
                                                   : launch_backward<4, 1>(p, threads, stream);

    const unsigned sum_blocks = unsigned(ceil_div(2 * p.C, kWarpSize));
    launch_dependent(sum_partials_kernel, sum_blocks, kWarpSize * kSumWarps, stream, static_cast<const float*>(p.workspace),
                     partials, p.C, p.dweight, p.dbias);
}
