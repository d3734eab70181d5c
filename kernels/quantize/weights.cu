// FP8 weights and their transposes from the FP32 master: one tile a block, many matrices a launch. 6 bytes an element move
// (4 read, 1 written to each of q and qt), and the kernel is bound by that.
#include "kernels/common/cuda_check.h"
#include "kernels/common/mark.h"
#include "kernels/quantize.h"
#include "kernels/quantize/tile.cuh"

namespace {

using namespace quantize_tile;

template <Dtype F, bool kAligned>
__device__ __forceinline__ void cast_weight_tile(const QuantizeWeight& w, int64_t row0, int64_t col0, float scale,
                                                 uint8_t* tile) {
    const int64_t row = row0 + threadIdx.x / kSide * kPatch, col = col0 + threadIdx.x % kSide * kPatch;
    const bool inside = row < w.N && col < w.K;
    const float* from = w.master + row * w.K + col;
    float value[kPatch][kPatch];
#pragma unroll
    for (int i = 0; i < kPatch; ++i, from += w.K) {
        if constexpr (kAligned) {
#pragma unroll
            for (int j = 0; j < kPatch; j += 4) {
                const F32x4 v = inside ? load<F32x4>(from + j) : F32x4{};
#pragma unroll
                for (int k = 0; k < 4; ++k) value[i][j + k] = v[k];
            }
        } else {
#pragma unroll
            for (int j = 0; j < kPatch; ++j) value[i][j] = row + i < w.N && col + j < w.K ? from[j] : 0.0f;
        }
    }
    Codes codes;
#pragma unroll
    for (int i = 0; i < kPatch; ++i) encode_row<F>(value[i], scale, codes.word[i]);
    write_rows<kAligned>(codes, w.q, row, col, w.N, w.K);
    put_transposed(codes, tile);
    __syncthreads();
    write_transposed<kAligned>(tile, w.qt, row0, col0, w.N, w.K);
}

template <Dtype F>
__global__ void __launch_bounds__(kThreads, 2)
    quantize_weights_kernel(const QuantizeWeight* __restrict__ tensors, int count, const uint32_t* skip,
                            uint32_t* nonfinite) {
    __shared__ alignas(16) uint8_t tile[kTile * kTile];
    if (skip != nullptr && *skip != 0) return;

    // The block's tensor is the last one that starts at or before the block. Counting those with all threads at once
    // costs one round trip to memory; a binary search would cost log2(count) of them.
    int started = 0;
    for (int base = 0; base < count; base += kThreads) {
        const int i = base + threadIdx.x;
        started += __syncthreads_count(i < count && tensors[i].first_tile <= int64_t(blockIdx.x));
    }
    const QuantizeWeight w = tensors[started - 1];
    const int64_t index = blockIdx.x - w.first_tile, column_tiles = ceil_div(w.K, kTile);
    const float scale = block_scale<F>(w.slot, nonfinite, index == 0);
    const int64_t row0 = index / column_tiles * kTile, col0 = index % column_tiles * kTile;
    if (w.N % 16 == 0 && w.K % 16 == 0 && is_aligned(w.master) && is_aligned(w.q) && is_aligned(w.qt))
        cast_weight_tile<F, true>(w, row0, col0, scale, tile);
    else
        cast_weight_tile<F, false>(w, row0, col0, scale, tile);
}

}  // namespace

int64_t quantize_weights_plan(QuantizeWeight* tensors, int count) {
    int64_t tiles = 0;
    for (int i = 0; i < count; ++i) {
        REQUIRE(tensors[i].N > 0 && tensors[i].K > 0, "quantize_weights: tensor %d: N=%d, K=%d must be positive", i,
                tensors[i].N, tensors[i].K);
        tensors[i].first_tile = tiles;
        tiles += ceil_div(tensors[i].N, kTile) * ceil_div(tensors[i].K, kTile);
    }
    return tiles;
}

void quantize_weights(const QuantizeWeight* device_tensors, int count, int64_t tiles, Dtype format,
                      const uint32_t* skip, uint32_t* nonfinite, cudaStream_t stream) {
    const Mark mark("quantize_weights", {.bytes = 6.0 * double(tiles) * kTile * kTile});  // tiles at an edge count as full
    REQUIRE(is_fp8(format), "quantize_weights: format %s must be e4m3 or e5m2", name_of(format));
    REQUIRE(count >= 0 && tiles >= count && tiles < (int64_t(1) << 31), "quantize_weights: %d tensors of %lld tiles",
            count, static_cast<long long>(tiles));
    if (count == 0) return;
    const auto blocks = static_cast<unsigned>(tiles);
    if (format == Dtype::e4m3)
        quantize_weights_kernel<Dtype::e4m3><<<blocks, kThreads, 0, stream>>>(device_tensors, count, skip, nonfinite);
    else
        quantize_weights_kernel<Dtype::e5m2><<<blocks, kThreads, 0, stream>>>(device_tensors, count, skip, nonfinite);
    CUDA_CHECK_LAUNCH();
}
