// What every cast shares: the codes of a thread's patch, their transposition, the scale.
//
// A block of 256 threads works on a tile of 128 x 128 elements; a thread owns a patch of 8 x 8.
//   1. Conversion two values at a time; a row of a patch is 8 codes: one 8-byte store, 16 threads fill a 128-byte line.
//   2. The four 4 x 4 blocks of a patch are transposed in registers (8 byte permutations each), which leaves for each
//      of its 8 columns the 8 codes of 8 consecutive rows: one 8-byte store to shared memory.
//   3. After one barrier 8 neighbouring threads read a column's 128 codes, 16 bytes each, and fill a line of qt.
//
// Shared memory is free of bank conflicts: unit u (8 bytes, 8 rows) of a column in patch column c lies at u ^ c. A
// store instruction's half-warp has one u and sixteen c, so sixteen different units; a load's quarter-warp reads one
// whole column. The 16-byte pair of units (2k, 2k+1) stays a pair, at k ^ (c/2), with its halves exchanged if c is odd.
#pragma once
#include "kernels/common/device.cuh"

namespace quantize_tile {

constexpr int kTile = 128;                // rows and columns of a tile
constexpr int kPatch = 8;                 // rows and columns of a thread's part of it
constexpr int kSide = kTile / kPatch;     // patches along a side
constexpr int kThreads = kSide * kSide;

__host__ __device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

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

}  // namespace quantize_tile
