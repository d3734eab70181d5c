// Transposed copies of FP8 codes, for what arrives as (N, K) and is needed as (K, N) too: one tile a block, many matrices a
// launch, 2 bytes an element. The way through registers and shared memory is that of the casts (kernels/quantize/tile.cuh); a
// row of a tile is one line here, so a block has 16 KB in flight and six or more blocks of a multiprocessor hide its barrier.
#include "kernels/common/cuda_check.h"
#include "kernels/common/mark.h"
#include "kernels/quantize.h"
#include "kernels/quantize/block_item.cuh"
#include "kernels/quantize/tile.cuh"

namespace {

using namespace quantize_tile;

template <bool kAligned>
__device__ __forceinline__ void transpose_tile(const TransposeCodes& m, int64_t row0, int64_t col0, uint8_t* tile) {
    const int64_t row = row0 + threadIdx.x / kSide * kPatch, col = col0 + threadIdx.x % kSide * kPatch;
    const bool inside = row < m.N && col < m.K;
    const uint8_t* from = m.q + row * m.K + col;
    Codes codes;
#pragma unroll
    for (int i = 0; i < kPatch; ++i, from += m.K) {
        if constexpr (kAligned) {
            const auto v = inside ? load<Vec<uint32_t, 2>>(from) : Vec<uint32_t, 2>{};
            codes.word[i][0] = v[0], codes.word[i][1] = v[1];
        } else {
            codes.word[i][0] = codes.word[i][1] = 0;
#pragma unroll
            for (int j = 0; j < kPatch; ++j)
                if (row + i < m.N && col + j < m.K) codes.word[i][j / 4] |= uint32_t(from[j]) << (8 * (j % 4));
        }
    }
    put_transposed(codes, tile);
    __syncthreads();
    write_transposed<kAligned>(tile, m.qt, row0, col0, m.N, m.K);
}

__global__ void __launch_bounds__(kThreads, 6)
    transpose_codes_kernel(const TransposeCodes* __restrict__ matrices, int count, const uint32_t* skip) {
    __shared__ alignas(16) uint8_t tile[kTile * kTile];
    if (skip != nullptr && *skip != 0) return;
    const TransposeCodes m = block_item<kThreads>(matrices, count);
    const int64_t index = int64_t(blockIdx.x) - m.first_tile, column_tiles = ceil_div(m.K, kTile);
    const int64_t row0 = index / column_tiles * kTile, col0 = index % column_tiles * kTile;
    if (m.N % 16 == 0 && m.K % 16 == 0 && is_aligned(m.q) && is_aligned(m.qt)) transpose_tile<true>(m, row0, col0, tile);
    else transpose_tile<false>(m, row0, col0, tile);
}

}  // namespace

int64_t transpose_codes_plan(TransposeCodes* matrices, int count) {
    int64_t tiles = 0;
    for (int i = 0; i < count; ++i) {
        REQUIRE(matrices[i].N > 0 && matrices[i].K > 0, "transpose_codes: matrix %d: N=%d, K=%d must be positive", i, matrices[i].N,
                matrices[i].K);
        REQUIRE(matrices[i].q != matrices[i].qt, "transpose_codes: matrix %d: qt must not be q (%p)", i, static_cast<const void*>(matrices[i].q));
        matrices[i].first_tile = tiles;
        tiles += ceil_div(matrices[i].N, kTile) * ceil_div(matrices[i].K, kTile);
    }
    return tiles;
}

void transpose_codes(const TransposeCodes* device_matrices, int count, int64_t tiles, const uint32_t* skip, cudaStream_t stream) {
    const Mark mark("transpose_codes", {.bytes = 2.0 * double(tiles) * kTile * kTile});  // tiles at an edge count as full
    REQUIRE(count >= 0 && tiles >= count && tiles < (int64_t(1) << 31), "transpose_codes: %d matrices of %lld tiles", count,
            static_cast<long long>(tiles));
    if (count == 0) return;
    transpose_codes_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(device_matrices, count, skip);
    CUDA_CHECK_LAUNCH();
}
