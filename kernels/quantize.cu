// FP8 quantization with one scale a tensor: amax, cast, cast + transpose (+ bias gradient), weights.
//
// A tensor of E elements costs, at the least, 2E bytes read and E bytes written for each of q and qt: 4E in all, and
// the kernels are bound by that. The arithmetic (about six instructions an element, half a two-element conversion and
// half a byte permutation among them) hides behind it.
//
// Design of the cast. A block of 256 threads works on tiles of 128 x 128 elements; a thread owns a patch of 8 x 8.
//   1. Eight 16-byte loads a thread, all in flight together; 16 neighbouring threads read 256 bytes of a row.
//   2. Conversion two values at a time; a row of a patch is 8 codes: one 8-byte store, 16 threads fill a 128-byte line.
//   3. The four 4 x 4 blocks of a patch are transposed in registers (8 byte permutations each), which leaves for each
//      of its 8 columns the 8 codes of 8 consecutive rows: one 8-byte store to shared memory.
//   4. After one barrier 8 neighbouring threads read a column's 128 codes, 16 bytes each, and fill a line of qt.
// A block works down a strip of up to four tiles: it loads the next tile before the barrier of this one, and it uses
// two tile buffers in turn, so one barrier a tile is enough. Large tensors get taller strips (fewer partial sums of the
// bias gradient, longer pipelines), small ones shorter strips (enough blocks to fill the GPU evenly).
//
// Shared memory is free of bank conflicts: unit u (8 bytes, 8 rows) of a column in patch column c lies at u ^ c. A
// store instruction's half-warp has one u and sixteen c, so sixteen different units; a load's quarter-warp reads one
// whole column. The 16-byte pair of units (2k, 2k+1) stays a pair, at k ^ (c/2), with its halves exchanged if c is odd.
//
// The bias gradient adds the BF16 values in a fixed order: 8 rows in a thread, tile after tile, the 16 patch rows of
// the block, then the strips (a second small kernel). The order depends on M and N only.
#include "kernels/quantize.h"

#include <algorithm>

#include "kernels/common/cuda_check.h"
#include "kernels/common/dependent_launch.cuh"
#include "kernels/common/device.cuh"
#include "kernels/common/mark.h"
#include "kernels/common/sm_count.h"

namespace {

constexpr int kTile = 128;                // rows and columns of a tile
constexpr int kPatch = 8;                 // rows and columns of a thread's part of it
constexpr int kSide = kTile / kPatch;     // patches along a side
constexpr int kThreads = kSide * kSide;
constexpr int kMostTilesPerStrip = 4;
constexpr int64_t kEnoughBlocks = 2048;   // about four times what an H100 holds at once: the last wave costs little

__host__ __device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---------------------------------------------------------------------------------------------------------------------
// amax

constexpr int kAmaxThreads = 256;
constexpr int kAmaxLoads = 4;  // 16-byte loads in flight a thread

// Maximum of |x| over the elements packed in one 32-bit word, merged into `most`: one float, or two BF16 side by side.
template <class T>
__device__ __forceinline__ uint32_t merge_word(uint32_t most, uint32_t word) {
    if constexpr (sizeof(T) == 4) return max(most, word & 0x7fffffffu);
    return __vmaxu2(most, word & 0x7fff7fffu);
}
// The bits of the maximum as a float.
template <class T>
__device__ __forceinline__ uint32_t merged_bits(uint32_t most) {
    if constexpr (sizeof(T) == 4) return most;
    return max(most & 0x7fff0000u, most << 16);
}

template <class T>
__global__ void __launch_bounds__(kAmaxThreads) amax_kernel(const T* __restrict__ x, int64_t n, QuantSlot* slot) {
    constexpr int kPerVector = 16 / sizeof(T);
    using Words = Vec<uint32_t, 4>;
    const int64_t vectors = n / kPerVector, thread = int64_t(blockIdx.x) * kAmaxThreads + threadIdx.x;
    const int64_t stride = int64_t(gridDim.x) * kAmaxThreads;
    uint32_t most = 0;
    for (int64_t first = thread; first < vectors; first += stride * kAmaxLoads) {
        Words words[kAmaxLoads];
#pragma unroll
        for (int k = 0; k < kAmaxLoads; ++k) {
            const int64_t i = first + k * stride;
            words[k] = i < vectors ? load<Words>(x + i * kPerVector) : Words{};
        }
#pragma unroll
        for (int k = 0; k < kAmaxLoads; ++k)
#pragma unroll
            for (int j = 0; j < 4; ++j) most = merge_word<T>(most, words[k][j]);
    }
    uint32_t bits = merged_bits<T>(most);
    const int64_t tail = vectors * kPerVector + thread;
    if (tail < n) bits = max(bits, amax_bits(x[tail]));
    block_amax_to_slot(bits, slot);
}

// ---------------------------------------------------------------------------------------------------------------------
// What every cast shares: codes of a patch, transposition, scale

struct Codes {
    uint32_t word[kPatch][2];  // row, columns 0..3 and 4..7; the lowest byte is the first column
};

template <Dtype F>
__device__ __forceinline__ void encode_row(const float (&value)[kPatch], float scale, uint32_t (&word)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float* v = value + 4 * half;
        word[half] = cast_fp8x2<F>(v[0], v[1], scale) | uint32_t(cast_fp8x2<F>(v[2], v[3], scale)) << 16;
    }
}

// Four rows of four bytes become four columns of four bytes.
__device__ __forceinline__ void transpose_4x4(uint32_t (&w)[4]) {
    const uint32_t a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[0], w[1], 0x7362);
    const uint32_t c = __byte_perm(w[2], w[3], 0x5140), d = __byte_perm(w[2], w[3], 0x7362);
    w[0] = __byte_perm(a, c, 0x5410);
    w[1] = __byte_perm(a, c, 0x7632);
    w[2] = __byte_perm(b, d, 0x5410);
    w[3] = __byte_perm(b, d, 0x7632);
}

// This thread's patch, transposed, into the tile in shared memory (column-major, swizzled as the head comment says).
__device__ __forceinline__ void put_transposed(const Codes& codes, uint8_t* tile) {
    const int patch_row = threadIdx.x / kSide, patch_col = threadIdx.x % kSide;
    uint8_t* unit = tile + patch_col * kPatch * kTile + (patch_row ^ patch_col) * kPatch;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t upper[4], lower[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) upper[i] = codes.word[i][half], lower[i] = codes.word[4 + i][half];
        transpose_4x4(upper);
        transpose_4x4(lower);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            store(unit + (4 * half + j) * kTile, Vec<uint32_t, 2>{{upper[j], lower[j]}});
    }
}

// A tile from shared memory to qt, (cols, rows). kAligned: rows % 16 == 0, so 16 bytes are all inside or all outside.
template <bool kAligned>
__device__ __forceinline__ void write_transposed(const uint8_t* tile, uint8_t* qt, int64_t row0, int64_t col0, int rows,
                                                 int cols) {
    constexpr int kBytes = 16, kPerColumn = kTile / kBytes, kColumnsAtOnce = kThreads / kPerColumn;
    constexpr int kRounds = kTile / kColumnsAtOnce;
    const int piece = threadIdx.x % kPerColumn, first_column = threadIdx.x / kPerColumn;
    Vec<uint32_t, 4> pieces[kRounds];
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
        const int column = k * kColumnsAtOnce + first_column, patch_col = column / kPatch;
        const auto v = load<Vec<uint32_t, 4>>(tile + column * kTile + (piece ^ (patch_col / 2)) * kBytes);
        const bool exchanged = patch_col % 2;
#pragma unroll
        for (int j = 0; j < 4; ++j) pieces[k][j] = exchanged ? v[j ^ 2] : v[j];
    }
    const int64_t row = row0 + piece * kBytes;
    if (row >= rows) return;
    uint8_t* out = qt + (col0 + first_column) * rows + row;
#pragma unroll
    for (int k = 0; k < kRounds; ++k, out += int64_t(kColumnsAtOnce) * rows) {
        if (col0 + first_column + k * kColumnsAtOnce >= cols) return;
        if constexpr (kAligned) {
            store(out, pieces[k]);
        } else {
#pragma unroll
            for (int b = 0; b < kBytes; ++b)
                if (row + b < rows) out[b] = uint8_t(pieces[k][b / 4] >> (8 * (b % 4)));
        }
    }
}

// A patch's codes to q, (rows, cols).
template <bool kAligned>
__device__ __forceinline__ void write_rows(const Codes& codes, uint8_t* q, int64_t row, int64_t col, int rows,
                                           int cols) {
    if (row >= rows || col >= cols) return;
    uint8_t* out = q + row * cols + col;
#pragma unroll
    for (int i = 0; i < kPatch; ++i, out += cols) {
        if constexpr (kAligned) {
            store(out, Vec<uint32_t, 2>{{codes.word[i][0], codes.word[i][1]}});
        } else {
#pragma unroll
            for (int j = 0; j < kPatch; ++j)
                if (row + i < rows && col + j < cols) out[j] = uint8_t(codes.word[i][j / 4] >> (8 * (j % 4)));
        }
    }
}

// The scale, from one thread to the whole block: a double division is too slow for all of them. Every thread must call.
template <Dtype F>
__device__ __forceinline__ float block_scale(QuantSlot* slot, uint32_t* nonfinite, bool publish) {
    __shared__ float shared_scale;
    if (threadIdx.x == 0) {
        constexpr uint32_t kInfinity = 0x7f800000u;
        const uint32_t amax = slot->amax_bits;
        const float scale = scale_from_amax<F>(amax);
        shared_scale = scale;
        if (publish) {
            slot->scale = scale;
            slot->inv_scale = 1.0f / scale;
            if (amax >= kInfinity && nonfinite != nullptr) *nonfinite = 1;
        }
    }
    __syncthreads();
    return shared_scale;
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations and their gradients

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
            patch.row[i] = inside ? load_streaming<Vec<uint32_t, 4>>(from) : Vec<uint32_t, 4>{};
        } else {
            const auto bits = [&](int j) -> uint32_t {
                return row + i < rows && col + j < cols ? __bfloat16_as_ushort(from[j]) : 0u;
            };
#pragma unroll
            for (int j = 0; j < 4; ++j) patch.row[i][j] = bits(2 * j) | bits(2 * j + 1) << 16;
        }
    }
}

struct CastStrips {
    const bf16* x;
    uint8_t* q;
    uint8_t* qt;
    float* partials;  // (strips, N), with kDbias
    QuantSlot* slot;  // null: bias gradient only
    uint32_t* nonfinite;
    int M, N;
    int column_tiles, row_tiles, tiles_per_strip;
};

// Blocks a multiprocessor should hold: as many as leave a thread enough registers (64 for 4, 80 for 3) not to spill.
constexpr int resident_blocks(bool dbias, bool aligned) { return aligned ? (dbias ? 3 : 4) : 2; }

template <Dtype F, Producer P, bool kDbias, bool kAligned>
__global__ void __launch_bounds__(kThreads, resident_blocks(kDbias, kAligned)) cast_strips_kernel(const CastStrips p) {
    if constexpr (kDbias) allow_dependent_launch();
    __shared__ alignas(16) uint8_t tiles[2][kTile * kTile];
    const int patch_row = threadIdx.x / kSide, patch_col = threadIdx.x % kSide;
    const int strip = blockIdx.x / p.column_tiles;
    const int first_tile = strip * p.tiles_per_strip, last_tile = min(first_tile + p.tiles_per_strip, p.row_tiles);
    const int64_t col0 = int64_t(blockIdx.x % p.column_tiles) * kTile, col = col0 + patch_col * kPatch;
    int64_t row0 = int64_t(first_tile) * kTile;

    PackedPatch patch;
    load_patch<kAligned>(p.x, row0 + patch_row * kPatch, col, p.M, p.N, patch);
    const bool casts = p.slot != nullptr;
    const float scale = casts ? block_scale<F>(p.slot, p.nonfinite, blockIdx.x == 0) : 0.0f;

    float sums[kPatch] = {};
    for (int tile = first_tile; tile < last_tile; ++tile, row0 += kTile) {
        const int64_t row = row0 + patch_row * kPatch;
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
        uint8_t* buffer = tiles[tile % 2];
        if (p.q != nullptr) write_rows<kAligned>(codes, p.q, row, col, p.M, p.N);
        if (p.qt != nullptr) put_transposed(codes, buffer);
        if (tile + 1 < last_tile) load_patch<kAligned>(p.x, row + kTile, col, p.M, p.N, patch);
        if (p.qt != nullptr) {
            // The other buffer's readers passed this barrier only after reading, so the next tile may overwrite it.
            __syncthreads();
            write_transposed<kAligned>(buffer, p.qt, row0, col0, p.M, p.N);
        }
    }

    if constexpr (kDbias) {
        __syncthreads();  // the buffers are free
        float* column_sums = reinterpret_cast<float*>(tiles);  // [kSide][kTile]
        static_assert(sizeof(float) * kSide * kTile <= sizeof(tiles));
#pragma unroll
        for (int j = 0; j < kPatch; j += 4)
            store(column_sums + patch_row * kTile + patch_col * kPatch + j,
                  F32x4{{sums[j], sums[j + 1], sums[j + 2], sums[j + 3]}});
        __syncthreads();
        if (threadIdx.x < kTile && col0 + threadIdx.x < p.N) {
            float sum = 0.0f;
#pragma unroll
            for (int r = 0; r < kSide; ++r) sum += column_sums[r * kTile + threadIdx.x];
            p.partials[int64_t(strip) * p.N + col0 + threadIdx.x] = sum;
        }
    }
}

// dbias[n] += sum over strips of partials[strip][n]: 32 columns a block, 32 threads share a column's strips.
constexpr int kReduceSide = 32;
__global__ void __launch_bounds__(kReduceSide* kReduceSide)
    add_partials_kernel(const float* __restrict__ partials, int strips, int N, float* __restrict__ dbias) {
    __shared__ float sums[kReduceSide][kReduceSide];
    const int64_t n = int64_t(blockIdx.x) * kReduceSide + threadIdx.x;
    float sum = 0.0f;
    wait_for_previous_kernel();
    if (n < N)
#pragma unroll 4
        for (int64_t strip = threadIdx.y; strip < strips; strip += kReduceSide) sum += partials[strip * N + n];
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
// Weights: one tile a block, many matrices a launch

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

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

template <class T>
void amax(const T* x, int64_t n, QuantSlot* slot, cudaStream_t stream) {
    REQUIRE(n >= 0, "amax: n=%lld must not be negative", static_cast<long long>(n));
    REQUIRE(is_aligned(x), "amax: x=%p must be 16-byte aligned", static_cast<const void*>(x));
    if (n == 0) return;
    constexpr int kBlocksPerMultiprocessor = 8;  // 2048 threads
    const int64_t wanted = ceil_div(n, int64_t(kAmaxThreads) * kAmaxLoads * (16 / sizeof(T)));
    const int64_t blocks = std::min<int64_t>(wanted, sm_count() * kBlocksPerMultiprocessor);
    amax_kernel<<<static_cast<unsigned>(blocks), kAmaxThreads, 0, stream>>>(x, n, slot);
    CUDA_CHECK_LAUNCH();
}

// How a matrix is cut into strips; a function of its shape only, so that the bias gradient's bits are too.
struct Strips {
    int row_tiles, column_tiles, tiles_per_strip, count;
};
Strips strips_of(int M, int N) {
    Strips s{};
    s.row_tiles = static_cast<int>(ceil_div(M, kTile));
    s.column_tiles = static_cast<int>(ceil_div(N, kTile));
    const int64_t tiles = int64_t(s.row_tiles) * s.column_tiles;
    s.tiles_per_strip = static_cast<int>(std::clamp<int64_t>(tiles / kEnoughBlocks, 1, kMostTilesPerStrip));
    s.count = static_cast<int>(ceil_div(s.row_tiles, s.tiles_per_strip));
    return s;
}

template <Dtype F, Producer P, bool kDbias>
void launch_cast(const CastStrips& cast, unsigned blocks, cudaStream_t stream) {
    if (cast.M % 16 == 0 && cast.N % 16 == 0)
        cast_strips_kernel<F, P, kDbias, true><<<blocks, kThreads, 0, stream>>>(cast);
    else
        cast_strips_kernel<F, P, kDbias, false><<<blocks, kThreads, 0, stream>>>(cast);
    CUDA_CHECK_LAUNCH();
}

template <Dtype F>
void launch_cast(const CastStrips& cast, Producer producer, unsigned blocks, cudaStream_t stream) {
    const bool dbias = cast.partials != nullptr;
    if (producer == Producer::gelu)
        dbias ? launch_cast<F, Producer::gelu, true>(cast, blocks, stream)
              : launch_cast<F, Producer::gelu, false>(cast, blocks, stream);
    else
        dbias ? launch_cast<F, Producer::identity, true>(cast, blocks, stream)
              : launch_cast<F, Producer::identity, false>(cast, blocks, stream);
}

}  // namespace

void amax_bf16(const __nv_bfloat16* x, int64_t n, QuantSlot* slot, cudaStream_t stream) { amax(x, n, slot, stream); }
void amax_f32(const float* x, int64_t n, QuantSlot* slot, cudaStream_t stream) { amax(x, n, slot, stream); }

// For strips of one tile, whatever strips_of says: so it grows with M and N, and the workspace of the largest matrix
// serves every other.
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
    const Strips s = strips_of(p.M, p.N);
    const int64_t blocks = int64_t(s.count) * s.column_tiles;
    REQUIRE(blocks < (int64_t(1) << 31), "quantize_activation: M=%d, N=%d is too large", p.M, p.N);
    const bool casts = p.q != nullptr || p.qt != nullptr;
    const CastStrips cast{
        .x = p.x,
        .q = p.q,
        .qt = p.qt,
        .partials = p.dbias != nullptr ? static_cast<float*>(p.workspace) : nullptr,
        .slot = casts ? p.slot : nullptr,
        .nonfinite = p.nonfinite,
        .M = p.M,
        .N = p.N,
        .column_tiles = s.column_tiles,
        .row_tiles = s.row_tiles,
        .tiles_per_strip = s.tiles_per_strip,
    };
    if (p.format == Dtype::e4m3)
        launch_cast<Dtype::e4m3>(cast, p.producer, static_cast<unsigned>(blocks), stream);
    else
        launch_cast<Dtype::e5m2>(cast, p.producer, static_cast<unsigned>(blocks), stream);
    if (p.dbias == nullptr) return;
    const auto reduce_blocks = static_cast<unsigned>(ceil_div(p.N, kReduceSide));
    launch_dependent(add_partials_kernel, reduce_blocks, dim3(kReduceSide, kReduceSide), stream, cast.partials, s.count, p.N, p.dbias);
}

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
