// FP8 quantization of activations and their gradients with one scale a tensor: cast, cast + transpose, + bias gradient.
// (The amax passes and the weights are in kernels/quantize/.)
//
// A tensor of E elements costs, at the least, 2E bytes read and E bytes written for each of q and qt: 4E in all, and
// the kernels are bound by that. The arithmetic (about six instructions an element, half a two-element conversion and
// half a byte permutation among them) hides behind it.
//
// One tile a block (kernels/quantize/tile.cuh): all of its loads are in flight together, and what one block cannot
// overlap, the others on the multiprocessor do. Blocks that walk down a strip of tiles and prefetch were 2 to 7 % slower
// on an H100. So was a mixture of evict-first loads and ordinary stores: both must be of the same kind.
//
// The bias gradient adds the BF16 values in a fixed order: 8 rows in a thread, the 16 patch rows of the tile, then the
// rows of tiles (a second small kernel). The order depends on M and N only, and is the same where nothing is cast.
#include "kernels/quantize.h"

#include <algorithm>

#include "kernels/common/cuda_check.h"
#include "kernels/common/dependent_launch.cuh"
#include "kernels/common/mark.h"
#include "kernels/quantize/tile.cuh"

namespace {

using namespace quantize_tile;

// What a patch of x is held in until it is converted: 32-bit words of two BF16 values, the first in the low half. (As
// separate BF16 variables the compiler would keep each in a register of its own.)
struct PackedPatch {
    Vec<uint32_t, 4> row[kPatch];
};

__device__ __forceinline__ float low_bf16(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_bf16(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

// The values to quantize, from two of x. Rounded to BF16 in pairs: a single conversion runs at a quarter of the rate.
template <Producer P>
__device__ __forceinline__ uint32_t produce(uint32_t word) {
    if constexpr (P == Producer::gelu) {
        const __nv_bfloat162 rounded = __floats2bfloat162_rn(gelu(low_bf16(word)), gelu(high_bf16(word)));
        return reinterpret_cast<const uint32_t&>(rounded);
    }
    return word;
}

// Elements outside the matrix are zero: they add nothing to a bias gradient (gelu(0) = 0) and are never stored.
template <bool kAligned>
__device__ __forceinline__ void load_patch(const bf16* x, int64_t row, int64_t col, int rows, int cols,
                                           PackedPatch& patch) {
    const bf16* from = x + row * cols + col;
    const bool inside = row < rows && col < cols;
#pragma unroll
    for (int i = 0; i < kPatch; ++i, from += cols) {
        if constexpr (kAligned) {
            patch.row[i] = inside ? load<Vec<uint32_t, 4>>(from) : Vec<uint32_t, 4>{};
        } else {
            const auto bits = [&](int j) -> uint32_t {
                return row + i < rows && col + j < cols ? __bfloat16_as_ushort(from[j]) : 0u;
            };
#pragma unroll
            for (int j = 0; j < 4; ++j) patch.row[i][j] = bits(2 * j) | bits(2 * j + 1) << 16;
        }
    }
}

struct CastTiles {
    const bf16* x;
    uint8_t* q;
    uint8_t* qt;
    float* partials;  // (rows of tiles, N), with kDbias
    QuantSlot* slot;
    uint32_t* nonfinite;
    int M, N;
    int column_tiles;
};

// A tile's column sums, from the sums of each thread's patch: to shared memory, and after a barrier to `partials`.
__device__ __forceinline__ void put_patch_sums(const float (&sums)[kPatch], float* shared) {
    float* to = shared + threadIdx.x / kSide * kTile + threadIdx.x % kSide * kPatch;
#pragma unroll
    for (int j = 0; j < kPatch; j += 4) store(to + j, F32x4{{sums[j], sums[j + 1], sums[j + 2], sums[j + 3]}});
}
__device__ __forceinline__ void write_column_sums(const float* shared, float* partials, int64_t columns_left) {
    if (threadIdx.x >= kTile || threadIdx.x >= columns_left) return;
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < kSide; ++r) sum += shared[r * kTile + threadIdx.x];
    partials[threadIdx.x] = sum;
}

// Blocks a multiprocessor should hold: as many as leave a thread enough registers (64 for 4, 80 for 3) not to spill.
constexpr int resident_blocks(Producer producer, bool aligned) { return !aligned ? 2 : producer == Producer::gelu ? 3 : 4; }

template <Dtype F, Producer P, bool kDbias, bool kAligned>
__global__ void __launch_bounds__(kThreads, resident_blocks(P, kAligned)) cast_tile_kernel(const CastTiles p) {
    if constexpr (kDbias) allow_dependent_launch();
    __shared__ alignas(16) uint8_t tile[kTile * kTile];
    const int64_t tile_row = blockIdx.x / p.column_tiles, row0 = tile_row * kTile, col0 = int64_t(blockIdx.x % p.column_tiles) * kTile;
    const int64_t row = row0 + threadIdx.x / kSide * kPatch, col = col0 + threadIdx.x % kSide * kPatch;

    PackedPatch patch;
    load_patch<kAligned>(p.x, row, col, p.M, p.N, patch);
    const float scale = block_scale<F>(p.slot, p.nonfinite, blockIdx.x == 0);

    float sums[kPatch] = {};
    Codes codes;
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
        float value[kPatch];
#pragma unroll
        for (int j = 0; j < kPatch; j += 2) {
            const uint32_t word = produce<P>(patch.row[i][j / 2]);
            value[j] = low_bf16(word), value[j + 1] = high_bf16(word);
            if constexpr (kDbias) sums[j] += value[j], sums[j + 1] += value[j + 1];
        }
        encode_row<F>(value, scale, codes.word[i]);
    }
    if (p.q != nullptr) write_rows<kAligned>(codes, p.q, row, col, p.M, p.N);
    if (p.qt != nullptr) {
        put_transposed(codes, tile);
        __syncthreads();
        write_transposed<kAligned>(tile, p.qt, row0, col0, p.M, p.N);
    }
    if constexpr (kDbias) {
        float* shared = reinterpret_cast<float*>(tile);
        static_assert(sizeof(float) * kSide * kTile <= sizeof(tile));
        __syncthreads();  // the tile has been read
        put_patch_sums(sums, shared);
        __syncthreads();
        write_column_sums(shared, p.partials + tile_row * p.N + col0, p.N - col0);
    }
}

// The bias gradient alone: a block goes down a strip of tiles_per_strip tiles, the next one's loads in flight.
struct SumStrips {
    const bf16* x;
    float* partials;  // (rows of tiles, N)
    int M, N;
    int column_tiles, row_tiles, tiles_per_strip;
};

template <bool kAligned>
__global__ void __launch_bounds__(kThreads, resident_blocks(Producer::identity, kAligned)) column_sums_kernel(const SumStrips p) {
    allow_dependent_launch();
    __shared__ alignas(16) float shared[2][kSide * kTile];  // in turn, so that one barrier a tile is enough
    const int strip = blockIdx.x / p.column_tiles;
    const int first_tile = strip * p.tiles_per_strip, last_tile = min(first_tile + p.tiles_per_strip, p.row_tiles);
    const int64_t col0 = int64_t(blockIdx.x % p.column_tiles) * kTile, col = col0 + threadIdx.x % kSide * kPatch;
    const int64_t row = threadIdx.x / kSide * kPatch;
    PackedPatch patch;
    load_patch<kAligned>(p.x, int64_t(first_tile) * kTile + row, col, p.M, p.N, patch);
    for (int tile = first_tile; tile < last_tile; ++tile) {
        float sums[kPatch] = {};
#pragma unroll
        for (int i = 0; i < kPatch; ++i)
#pragma unroll
            for (int j = 0; j < kPatch; j += 2)
                sums[j] += low_bf16(patch.row[i][j / 2]), sums[j + 1] += high_bf16(patch.row[i][j / 2]);
        put_patch_sums(sums, shared[tile % 2]);
        if (tile + 1 < last_tile) load_patch<kAligned>(p.x, int64_t(tile + 1) * kTile + row, col, p.M, p.N, patch);
        __syncthreads();
        write_column_sums(shared[tile % 2], p.partials + int64_t(tile) * p.N + col0, p.N - col0);
    }
}

// dbias[n] += sum over the rows of partials: 32 columns a block, 32 threads share a column.
constexpr int kReduceSide = 32;
__global__ void __launch_bounds__(kReduceSide* kReduceSide)
    add_partials_kernel(const float* __restrict__ partials, int count, int N, float* __restrict__ dbias) {
    __shared__ float sums[kReduceSide][kReduceSide];
    const int64_t n = int64_t(blockIdx.x) * kReduceSide + threadIdx.x;
    float sum = 0.0f;
    wait_for_previous_kernel();
    if (n < N)
#pragma unroll 4
        for (int64_t r = threadIdx.y; r < count; r += kReduceSide) sum += partials[r * N + n];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && n < N) {
        float total = 0.0f;
#pragma unroll
        for (int r = 0; r < kReduceSide; ++r) total += sums[r][threadIdx.x];
        dbias[n] += total;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

template <Dtype F, Producer P, bool kDbias>
void launch_cast(const CastTiles& cast, unsigned blocks, cudaStream_t stream) {
    if (cast.M % 16 == 0 && cast.N % 16 == 0)
        cast_tile_kernel<F, P, kDbias, true><<<blocks, kThreads, 0, stream>>>(cast);
    else
        cast_tile_kernel<F, P, kDbias, false><<<blocks, kThreads, 0, stream>>>(cast);
    CUDA_CHECK_LAUNCH();
}

template <Dtype F>
void launch_cast(const CastTiles& cast, Producer producer, unsigned blocks, cudaStream_t stream) {
    const bool dbias = cast.partials != nullptr;
    if (producer == Producer::gelu)
        dbias ? launch_cast<F, Producer::gelu, true>(cast, blocks, stream)
              : launch_cast<F, Producer::gelu, false>(cast, blocks, stream);
    else
        dbias ? launch_cast<F, Producer::identity, true>(cast, blocks, stream)
              : launch_cast<F, Producer::identity, false>(cast, blocks, stream);
}

void launch_column_sums(const QuantizeActivation& p, cudaStream_t stream) {
    constexpr int kMostTilesPerStrip = 4;
    constexpr int64_t kEnoughBlocks = 2048;  // about four times what an H100 holds at once: the last wave costs little
    const int64_t row_tiles = ceil_div(p.M, kTile), column_tiles = ceil_div(p.N, kTile);
    const int64_t tiles_per_strip = std::clamp<int64_t>(row_tiles * column_tiles / kEnoughBlocks, 1, kMostTilesPerStrip);
    const SumStrips sum{.x = p.x, .partials = static_cast<float*>(p.workspace), .M = p.M, .N = p.N,
                        .column_tiles = static_cast<int>(column_tiles), .row_tiles = static_cast<int>(row_tiles),
                        .tiles_per_strip = static_cast<int>(tiles_per_strip)};
    const auto blocks = static_cast<unsigned>(ceil_div(row_tiles, tiles_per_strip) * column_tiles);
    if (p.M % 16 == 0 && p.N % 16 == 0) column_sums_kernel<true><<<blocks, kThreads, 0, stream>>>(sum);
    else column_sums_kernel<false><<<blocks, kThreads, 0, stream>>>(sum);
    CUDA_CHECK_LAUNCH();
}

void launch_casts(const QuantizeActivation& p, cudaStream_t stream) {
    const int64_t row_tiles = ceil_div(p.M, kTile), column_tiles = ceil_div(p.N, kTile);
    const CastTiles cast{.x = p.x, .q = p.q, .qt = p.qt, .partials = p.dbias != nullptr ? static_cast<float*>(p.workspace) : nullptr,
                         .slot = p.slot, .nonfinite = p.nonfinite, .M = p.M, .N = p.N, .column_tiles = static_cast<int>(column_tiles)};
    const auto blocks = static_cast<unsigned>(row_tiles * column_tiles);
    if (p.format == Dtype::e4m3) launch_cast<Dtype::e4m3>(cast, p.producer, blocks, stream);
    else launch_cast<Dtype::e5m2>(cast, p.producer, blocks, stream);
}

}  // namespace

size_t quantize_workspace_bytes(int M, int N) {
    return static_cast<size_t>(ceil_div(M, kTile)) * static_cast<size_t>(N) * sizeof(float);
}

void quantize_activation(const QuantizeActivation& p, cudaStream_t stream) {
    const Mark mark("quantize_activation", {.bytes = double(p.M) * p.N * (2 + (p.q != nullptr) + (p.qt != nullptr))});
    REQUIRE(p.M > 0 && p.N > 0, "quantize_activation: M=%d, N=%d must be positive", p.M, p.N);
    REQUIRE(is_fp8(p.format), "quantize_activation: format %s must be e4m3 or e5m2", name_of(p.format));
    REQUIRE(p.q != nullptr || p.qt != nullptr || p.dbias != nullptr,
            "quantize_activation: q, qt and dbias are all null");
    REQUIRE(p.slot != nullptr || (p.q == nullptr && p.qt == nullptr), "quantize_activation: a cast needs a slot");
    REQUIRE(p.dbias == nullptr || p.workspace != nullptr, "quantize_activation: dbias needs a workspace");
    REQUIRE(is_aligned(p.x) && is_aligned(p.q) && is_aligned(p.qt),
            "quantize_activation: x=%p, q=%p, qt=%p must be 16-byte aligned", static_cast<const void*>(p.x),
            static_cast<const void*>(p.q), static_cast<const void*>(p.qt));
    REQUIRE(ceil_div(p.M, kTile) * ceil_div(p.N, kTile) < (int64_t(1) << 31), "quantize_activation: M=%d, N=%d is too large", p.M, p.N);
    REQUIRE(p.producer == Producer::identity || p.q != nullptr || p.qt != nullptr, "quantize_activation: a bias gradient alone is that of x itself");

    if (p.q != nullptr || p.qt != nullptr) launch_casts(p, stream);
    else launch_column_sums(p, stream);
    if (p.dbias == nullptr) return;
    launch_dependent(add_partials_kernel, static_cast<unsigned>(ceil_div(p.N, kReduceSide)), dim3(kReduceSide, kReduceSide), stream,
                     static_cast<const float*>(p.workspace), static_cast<int>(ceil_div(p.M, kTile)), p.N, p.dbias);
}
