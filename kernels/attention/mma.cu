// Causal attention for any GPU from sm_80 on: BF16 mma.sync.m16n8k16 with float accumulation.
//
// Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691). A block of 4 warps owns a tile of rows (16 or 32 rows a
// warp, held as the A operand) and streams tiles of columns (the B operand) through two cp.async stages in shared
// memory, one barrier a tile. Scores and probabilities never leave registers: the accumulator layout of one mma is,
// packed to BF16, the A layout of the next.
//
//   kernel                    rows      columns   per tile pair                                       matmuls
//   forward                   queries   keys      S = Q K^T, online softmax, O += P V                 2
//   backward, owns queries    queries   keys      S = Q K^T, dP = dO V^T, dQ += dS K                  3
//   backward, owns keys       keys      queries   S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q    4
//
// The two backward kernels are one template: both own two row operands (Q, dO or K, V), stream the other two, and form
// the same P and dS. Seven matmuls are done where five are counted; that price buys gradients summed in a fixed order,
// without float atomics. A small kernel first writes what they need of each query: {LSE * log2(e), rowsum(dO * O)}.
//
// Counted work: forward 4 B H T^2/2 head_dim FLOPs (the causal half), backward 2.5 times that. Compute-bound.
//
// Padding: head_dim is padded with zero columns to 64, 128 or 256 in shared memory. Rows past T are loaded as zeros and
// not stored. Only the causal mask is needed beyond that: a key past T is past every query, and a query past T (seen by
// the block that owns keys) has dO = 0, so that it adds P * 0 to dV and P * (0 - 0) to dK.
#include <algorithm>
#include <cmath>

#include "kernels/attention/backends.h"
#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/ptx.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kChunk = 8;  // elements in 16 bytes: the unit of cp.async, of ldmatrix rows and of the swizzle
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---------------------------------------------------------------------------------------------------------------------
// Tile shapes by padded head_dim. Chosen so that nothing spills, two blocks fit a Hopper SM (255 registers a thread)
// and no block needs more than the 99 KiB of shared memory that the smallest GPUs since sm_80 give one.

struct TileShape {
    int m_tiles;         // 16-row mma tiles a warp; 2 halve the shared memory traffic for B, where registers allow
    int columns;         // columns of a stage
    int step = columns;  // backward: columns whose S and dP are in registers at a time
    bool hold = false;   // row operands live in registers (else they are read from shared memory for every use)
    int slices = 1;      // backward: blocks among which the columns of the gradients are split

    constexpr int rows() const { return 16 * m_tiles * kWarps; }
};

constexpr TileShape forward_tile(int dim) {
    return dim == 64    ? TileShape{.m_tiles = 2, .columns = 64, .hold = true}
           : dim == 128 ? TileShape{.m_tiles = 2, .columns = 32}
                        : TileShape{.m_tiles = 1, .columns = 32};
}
constexpr TileShape backward_query_tile(int dim) {
    return dim == 64    ? TileShape{.m_tiles = 2, .columns = 64, .step = 32, .hold = true}
           : dim == 128 ? TileShape{.m_tiles = 1, .columns = 64, .step = 32, .hold = true}
                        : TileShape{.m_tiles = 1, .columns = 16};
}
constexpr TileShape backward_key_tile(int dim) {
    return dim == 64    ? TileShape{.m_tiles = 2, .columns = 64, .step = 32}
           : dim == 128 ? TileShape{.m_tiles = 1, .columns = 64, .step = 32}
                        : TileShape{.m_tiles = 1, .columns = 16, .slices = 2};
}

// ---------------------------------------------------------------------------------------------------------------------
// PTX of GPUs before Hopper

// Copies kBytes, or writes zeros if !valid: then nothing is read, and the source may point past the data.
template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t destination, const void* source, bool valid) {
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::
                         "r"(destination), "l"(source), "r"(valid ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::
                         "r"(destination), "l"(source), "n"(kBytes), "r"(valid ? kBytes : 0) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// d (16x8) = a (16x16) b (16x8) + c. Of lane 4g+t: c, d = {(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)}; a holds, two
// columns a register, (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8); b rows (2t, 2t+1) and (2t+8, 2t+9) of column g.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const float* c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles in shared memory: rows of kDim elements, the 16-byte chunk c of row r stored at c ^ (r % 8), so that the eight
// rows of an 8x8 matrix lie in different banks for ldmatrix

template <int kDim>
constexpr int kRowBytes = kDim * int(sizeof(bf16));

template <int kDim>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
    return uint32_t(row * kRowBytes<kDim> + (chunk ^ (row & 7)) * 16);
}

// Starts the copy of rows row0.. of a (T, head_dim) matrix; zeros past T and past head_dim.
template <int kDim, int kRows>
__device__ __forceinline__ void load_tile(uint32_t tile, const bf16* source, int stride, int row0, int T,
                                          int head_dim) {
    constexpr int kChunks = kDim / kChunk, kRowsAtOnce = kThreads / kChunks;
    static_assert(kRows % kRowsAtOnce == 0);
    const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
    const int rows_left = chunk * kChunk < head_dim ? T - row0 - first : 0;
    asm volatile("" : "+r"(stride));  // else every r * stride is kept in a register from one call to the next
    source += int64_t(row0 + first) * stride + chunk * kChunk;
#pragma unroll
    for (int r = 0; r < kRows; r += kRowsAtOnce)
        cp_async<16>(tile + tile_offset<kDim>(r + first, chunk), source + r * stride, r < rows_left);
}

// The part of an ldmatrix address that depends on the lane. Lane l gives row l % 8 of 8x8 matrix l / 8. `at` then takes
// a row that is a multiple of 8 and an even chunk, both known at compile time wherever loops are unrolled.
template <int kDim>
struct LaneAddress {
    uint32_t row_offset, flip;

    __device__ LaneAddress(int row, int chunk) : row_offset(row * kRowBytes<kDim>), flip(chunk ^ (row & 7)) {}
    // Matrices in the order (rows 0-7, 8-15) x (columns 0-7, 8-15): the A operand, and B stored (k, n) through .trans.
    static __device__ LaneAddress rows_first(int lane) { return {lane % 16, lane / 16}; }
    // Columns first: B stored (n, k); registers 0, 1 are the B operand of n 0-7 and 2, 3 that of n 8-15.
    static __device__ LaneAddress columns_first(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }

    __device__ uint32_t at(uint32_t tile, int row, int chunk) const {
        return tile + row_offset + row * kRowBytes<kDim> + (chunk & ~7) * 16 + ((chunk & 7) ^ flip) * 16;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Warp-level products. Accumulators are [row tile of 16][column tile of 8][4].

// The A operand: a warp's rows of a tile, from shared memory or held in registers.
template <int kDim, TileShape kTile>
struct RowOperand {
    uint32_t tile;  // of this warp's first row
    LaneAddress<kDim> lane;
    uint32_t held[kTile.hold ? kTile.m_tiles : 1][kTile.hold ? kDim / 16 : 1][4];

    __device__ RowOperand(uint32_t block_tile, int warp_row, int lane_id)
        : tile(block_tile + warp_row * kRowBytes<kDim>), lane(LaneAddress<kDim>::rows_first(lane_id)) {}

    __device__ void hold() {  // after the tile has arrived
        if constexpr (kTile.hold)
#pragma unroll
            for (int m = 0; m < kTile.m_tiles; ++m)
#pragma unroll
                for (int k = 0; k < kDim / 16; ++k) ptx::ldmatrix(held[m][k], lane.at(tile, m * 16, k * 2));
    }
    __device__ void get(uint32_t (&a)[kTile.m_tiles][4], int k) const {
#pragma unroll
        for (int m = 0; m < kTile.m_tiles; ++m) {
            if constexpr (kTile.hold) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[m][i] = held[m][k][i];
            } else {
                ptx::ldmatrix(a[m], lane.at(tile, m * 16, k * 2));
            }
        }
    }
};

// product = A B^T for the kN8 * 8 rows of B at `tile`, stored (column of the product, kDim).
template <int kDim, TileShape kTile, int kN8>
__device__ __forceinline__ void multiply_transposed(float (&product)[kTile.m_tiles][kN8][4],
                                                    const RowOperand<kDim, kTile>& rows, uint32_t tile,
                                                    const LaneAddress<kDim>& lane) {
    constexpr float kZeros[4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
        uint32_t a[kTile.m_tiles][4];
        rows.get(a, k);
#pragma unroll
        for (int n = 0; n < kN8; n += 2) {
            uint32_t b[4];
            ptx::ldmatrix(b, lane.at(tile, n * 8, k * 2));
#pragma unroll
            for (int m = 0; m < kTile.m_tiles; ++m) {
                mma(product[m][n], a[m], b[0], b[1], k == 0 ? kZeros : product[m][n]);
                mma(product[m][n + 1], a[m], b[2], b[3], k == 0 ? kZeros : product[m][n + 1]);
            }
        }
    }
}

// sum += P B for P rounded to BF16, (16 * kM, 8 * kN8), and the 8 * kN8 rows of B at `tile`.
template <int kDim, int kM, int kN8, int kOut8>
__device__ __forceinline__ void multiply_add(float (&sum)[kM][kOut8][4], const float (&p)[kM][kN8][4], uint32_t tile,
                                             const LaneAddress<kDim>& lane) {
#pragma unroll
    for (int n = 0; n < kN8; n += 2) {
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &p[m][n + i / 2][i % 2 * 2];
                const __nv_bfloat162 rounded = __floats2bfloat162_rn(pair[0], pair[1]);
                a[m][i] = reinterpret_cast<const uint32_t&>(rounded);
            }
#pragma unroll
        for (int out = 0; out < kOut8; out += 2) {
            uint32_t b[4];
            ptx::ldmatrix_transposed(b, lane.at(tile, n * 8, out));
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                mma(sum[m][out], a[m], b[0], b[1], sum[m][out]);
                mma(sum[m][out + 1], a[m], b[2], b[3], sum[m][out + 1]);
            }
        }
    }
}

// Calls f(value, m, n, i) for every accumulator element.
template <int kM, int kN8, class F>
__device__ __forceinline__ void for_each(float (&acc)[kM][kN8][4], F f) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) f(acc[m][n][i], m, n, i);
}

// Its row - column, less that of element (0, 0, 0) of the same lane.
constexpr int row_minus_column_of(int m, int n, int i) { return m * 16 + i / 2 * 8 - (n * 8 + i % 2); }

// Rounds a warp's rows to BF16 and writes those that exist, 16 bytes a lane, turning them through `staging`: shared
// memory of this size that only this warp still uses. Returns the amax bits of what it wrote.
template <int kM, int kN8>
__device__ __forceinline__ uint32_t store_rows(const float (&acc)[kM][kN8][4], char* staging, bf16* out, int stride,
                                               int rows, int columns) {
    constexpr int kDim = kN8 * 8;
    const int lane = threadIdx.x % kWarpSize;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = m * 16 + half * 8 + lane / 4;
                *reinterpret_cast<__nv_bfloat162*>(staging + tile_offset<kDim>(row, n) + lane % 4 * 4) =
                    __floats2bfloat162_rn(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
            }
    __syncwarp();
    uint32_t amax = 0;
    for (int i = lane; i < kM * 16 * kN8; i += kWarpSize) {
        const int row = i / kN8, chunk = i % kN8;
        if (row >= rows || chunk * kChunk >= columns) continue;
        const Bf16x8 v = *reinterpret_cast<const Bf16x8*>(staging + tile_offset<kDim>(row, chunk));
        store(out + int64_t(row) * stride + chunk * kChunk, v);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) amax = max(amax, amax_bits(v[j]));
    }
    return amax;
}

// ---------------------------------------------------------------------------------------------------------------------
// Order of work: within a group of heads whose streamed operands share L2, the tiles with the most work go first, so
// that short blocks fill the end of the grid.

struct Work {
    int head;  // batch * heads + head
    int tile;  // 0 = first to run
};
__device__ __forceinline__ Work work_of_block(int tiles, int heads, int heads_in_l2) {
    const int group = blockIdx.x / (tiles * heads_in_l2), rest = blockIdx.x % (tiles * heads_in_l2);
    const int first = group * heads_in_l2, in_group = min(heads_in_l2, heads - first);
    return {first + rest % in_group, rest / in_group};
}

template <int kDim>
constexpr int tile_bytes(int rows) { return rows * kRowBytes<kDim>; }

// ---------------------------------------------------------------------------------------------------------------------
// Forward

template <int kDim>
constexpr int kForwardBytes = tile_bytes<kDim>(forward_tile(kDim).rows() + 4 * forward_tile(kDim).columns);

template <int kDim>
__global__ __launch_bounds__(kThreads, 2) void forward_kernel(const AttentionForward p, int heads_in_l2, float scale) {
    constexpr TileShape kTile = forward_tile(kDim);
    constexpr int kRows = kTile.rows(), kColumns = kTile.columns, kM = kTile.m_tiles;
    extern __shared__ __align__(128) char shared[];
    const uint32_t rows_tile = ptx::shared_address(shared), stages = rows_tile + tile_bytes<kDim>(kRows);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;

    // Which rows of which head
    const auto [B, T, H, KV, head_dim] = p.shape;
    const int tiles = int(ceil_div(T, kRows));
    const Work work = work_of_block(tiles, B * H, heads_in_l2);
    const int b = work.head / H, h = work.head % H, kv = h / (H / KV);
    const int row0 = (tiles - 1 - work.tile) * kRows, warp_row0 = row0 + warp * 16 * kM;
    const int stride = (H + 2 * KV) * head_dim, out_stride = H * head_dim;
    const bf16* q_source = p.qkv + int64_t(b) * T * stride + h * head_dim;
    const bf16* k = p.qkv + int64_t(b) * T * stride + (H + kv) * head_dim;
    const bf16* v = k + KV * head_dim;

    auto load_stage = [&](int tile) {
        const uint32_t stage = stages + tile % 2 * tile_bytes<kDim>(2 * kColumns);
        load_tile<kDim, kColumns>(stage, k, stride, tile * kColumns, T, head_dim);
        load_tile<kDim, kColumns>(stage + tile_bytes<kDim>(kColumns), v, stride, tile * kColumns, T, head_dim);
    };
    load_tile<kDim, kRows>(rows_tile, q_source, stride, row0, T, head_dim);
    load_stage(0);
    cp_async_wait_all();
    __syncthreads();
    RowOperand<kDim, kTile> q(rows_tile, warp * 16 * kM, lane);
    q.hold();
    const auto k_lane = LaneAddress<kDim>::columns_first(lane), v_lane = LaneAddress<kDim>::rows_first(lane);

    float out[kM][kDim / 8][4] = {};
    // Of rows lane/4 and lane/4 + 8: shift = max(S) * to_log2, and this lane's part of sum(2^(S * to_log2 - shift))
    float shift[kM][2], row_sum[kM][2] = {};
    for (auto& m : shift) m[0] = m[1] = -INFINITY;
    const float to_log2 = scale * kLog2e;

    const int column_tiles = int(ceil_div(min(row0 + kRows, T), kColumns));
    for (int tile = 0; tile < column_tiles; ++tile) {
        // This tile has arrived, and every warp is done with the other stage
        cp_async_wait_all();
        __syncthreads();
        if (tile + 1 < column_tiles) load_stage(tile + 1);
        const uint32_t k_tile = stages + tile % 2 * tile_bytes<kDim>(2 * kColumns);
        const int column0 = tile * kColumns;
        if (column0 >= warp_row0 + 16 * kM) continue;  // above the diagonal for all rows of this warp

        float s[kM][kColumns / 8][4];
        multiply_transposed(s, q, k_tile, k_lane);
        if (column0 + kColumns - 1 > warp_row0) {
            const int row_minus_column = warp_row0 + lane / 4 - (column0 + lane % 4 * 2);  // of element 0
            for_each(s, [&](float& x, int m, int n, int i) {
                if (row_minus_column + row_minus_column_of(m, n, i) < 0) x = -INFINITY;
            });
        }

        // Online softmax. Every row sees key 0 in the first tile, so its maximum is finite from then on.
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = -INFINITY;
#pragma unroll
                for (int n = 0; n < kColumns / 8; ++n)
                    top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                const float old_shift = shift[m][half];
                shift[m][half] = fmaxf(old_shift, top * to_log2);
                const float decay = exp2_approx(old_shift - shift[m][half]);
                row_sum[m][half] *= decay;
#pragma unroll
                for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) out[m][n][2 * half + i] *= decay;
            }
        for_each(s, [&](float& x, int m, int, int i) {
            x = exp2_approx(fmaf(x, to_log2, -shift[m][i / 2]));
            row_sum[m][i / 2] += x;
        });
        multiply_add(out, s, k_tile + tile_bytes<kDim>(kColumns), v_lane);
    }

    // LSE and the normalized rows
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = row_sum[m][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            row_sum[m][half] = 1.0f / sum;
            const int row = warp_row0 + m * 16 + half * 8 + lane / 4;
            // The rounding error of the shift cancels against the same one in the sum
            if (lane % 4 == 0 && row < T)
                p.lse[int64_t(work.head) * T + row] = fmaf(shift[m][half], kLn2, logf(sum));
        }
    for_each(out, [&](float& x, int m, int, int i) { x *= row_sum[m][i / 2]; });
    const uint32_t amax = store_rows(out, shared + tile_bytes<kDim>(warp * 16 * kM),
                                     p.out + (int64_t(b) * T + warp_row0) * out_stride + h * head_dim,
                                     out_stride, T - warp_row0, head_dim);
    if (p.amax) block_amax_to_slot(amax, p.amax);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

struct QueryTerms {
    float lse_log2;  // LSE * log2(e): P = 2^(S * scale * log2(e) - lse_log2)
    float delta;     // rowsum(dO * O)
};

// Eight lanes a (b, t, h) row of out and dout; they are read in memory order, terms (b, h, t) are written as they come.
__global__ __launch_bounds__(256) void query_terms_kernel(const AttentionBackward p, QueryTerms* terms) {
    const auto [B, T, H, KV, head_dim] = p.shape;
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 8;
    const bool exists = row < int64_t(B) * T * H;
    float delta = 0.0f;
    if (exists)
        for (int column = threadIdx.x % 8 * 8; column < head_dim; column += 64) {
            const auto o = load<Bf16x8>(p.out + row * head_dim + column);
            const auto d_o = load<Bf16x8>(p.dout + row * head_dim + column);
#pragma unroll
            for (int i = 0; i < 8; ++i) delta = fmaf(__bfloat162float(o[i]), __bfloat162float(d_o[i]), delta);
        }
    for (int offset = 4; offset > 0; offset /= 2) delta += __shfl_xor_sync(~0u, delta, offset);
    if (!exists || threadIdx.x % 8 != 0) return;
    const int64_t bt = row / H, b = bt / T, i = (b * H + row % H) * T + bt % T;
    terms[i] = {p.lse[i] * kLog2e, delta};
}

enum class Owns { queries, keys };  // which rows a block owns: dQ, or dK and dV

constexpr TileShape backward_tile(int dim, Owns owns) {
    return owns == Owns::keys ? backward_key_tile(dim) : backward_query_tile(dim);
}
template <int kDim, Owns kOwns>
constexpr int kBackwardBytes =
    tile_bytes<kDim>(2 * backward_tile(kDim, kOwns).rows() + 4 * backward_tile(kDim, kOwns).columns) +
    (kOwns == Owns::keys ? 2 * backward_tile(kDim, kOwns).columns * int(sizeof(QueryTerms)) : 0);

template <int kDim, Owns kOwns>
__global__ __launch_bounds__(kThreads, 2) void backward_kernel(const AttentionBackward p, const QueryTerms* terms,
                                                               int heads_in_l2, float scale) {
    constexpr bool kKeys = kOwns == Owns::keys;
    constexpr TileShape kTile = backward_tile(kDim, kOwns);
    constexpr int kRows = kTile.rows(), kColumns = kTile.columns, kM = kTile.m_tiles, kStep = kTile.step;
    constexpr int kStageBytes = tile_bytes<kDim>(2 * kColumns), kOutDim = kDim / kTile.slices;
    static_assert(kRows % kColumns == 0 && kColumns % kStep == 0);
    extern __shared__ __align__(128) char shared[];
    const uint32_t rows_tile = ptx::shared_address(shared), stages = rows_tile + tile_bytes<kDim>(2 * kRows);
    char* const column_terms = shared + tile_bytes<kDim>(2 * kRows) + 2 * kStageBytes;  // QueryTerms[2][kColumns]
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;

    // Which rows of which head; keys belong to all `group` query heads that read them
    const auto [B, T, H, KV, head_dim] = p.shape;
    const int group = H / KV, heads = kKeys ? KV : H, tiles = int(ceil_div(T, kRows));
    const Work work = work_of_block(tiles, B * heads, heads_in_l2);
    const int b = work.head / heads, h = work.head % heads, kv = kKeys ? h : h / group, first_q = kKeys ? h * group : h;
    const int row0 = (kKeys ? work.tile : tiles - 1 - work.tile) * kRows, warp_row0 = row0 + warp * 16 * kM;
    const int stride = (H + 2 * KV) * head_dim, out_stride = H * head_dim;
    const bf16* q = p.qkv + int64_t(b) * T * stride + first_q * head_dim;
    const bf16* k = p.qkv + int64_t(b) * T * stride + (H + kv) * head_dim;
    const bf16* v = k + KV * head_dim;
    const bf16* d_out = p.dout + int64_t(b) * T * out_stride + first_q * head_dim;
    terms += (int64_t(b) * H + first_q) * T;

    // Columns to visit: keys up to the last query, or, for each head of the group, queries from the first key on
    const int first_tile = kKeys ? row0 / kColumns : 0;
    const int end_tile = int(ceil_div(kKeys ? T : min(row0 + kRows, T), kColumns)), end_head = kKeys ? group : 1;
    auto load_stage = [&](int visit, int head, int column0) {
        const uint32_t stage = stages + visit % 2 * kStageBytes, second = stage + tile_bytes<kDim>(kColumns);
        const int head_offset = head * head_dim;
        load_tile<kDim, kColumns>(stage, (kKeys ? q : k) + head_offset, stride, column0, T, head_dim);
        load_tile<kDim, kColumns>(second, (kKeys ? d_out : v) + head_offset, kKeys ? out_stride : stride, column0, T,
                                  head_dim);
        if (kKeys && threadIdx.x < kColumns) {
            const int column = column0 + threadIdx.x;
            cp_async<sizeof(QueryTerms)>(
                ptx::shared_address(column_terms) + (visit % 2 * kColumns + threadIdx.x) * sizeof(QueryTerms),
                terms + int64_t(head) * T + column, column < T);
        }
    };
    load_tile<kDim, kRows>(rows_tile, kKeys ? k : q, stride, row0, T, head_dim);
    load_tile<kDim, kRows>(rows_tile + tile_bytes<kDim>(kRows), kKeys ? v : d_out, kKeys ? stride : out_stride, row0, T,
                           head_dim);
    load_stage(0, 0, first_tile * kColumns);
    QueryTerms row_terms[kM][2];
    if constexpr (!kKeys)
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                row_terms[m][half] = terms[min(warp_row0 + m * 16 + half * 8 + lane / 4, T - 1)];
    cp_async_wait_all();
    __syncthreads();
    RowOperand<kDim, kTile> s_rows(rows_tile, warp * 16 * kM, lane);  // S = Q K^T or its transpose
    RowOperand<kDim, kTile> dp_rows(rows_tile + tile_bytes<kDim>(kRows), warp * 16 * kM, lane);  // dP = dO V^T
    s_rows.hold();
    dp_rows.hold();
    const auto columns_first = LaneAddress<kDim>::columns_first(lane), rows_first = LaneAddress<kDim>::rows_first(lane);

    float d_s_sum[kM][kOutDim / 8][4] = {};  // dQ or dK, not yet times scale
    float p_sum[kM][kOutDim / 8][4] = {};    // dV
    const float to_log2 = scale * kLog2e;
    const int out_column0 = int(blockIdx.y) * kOutDim;  // a multiple of 64 elements: the swizzle is unaffected

    for (int visit = 0, head = 0, tile = first_tile; head < end_head; ++visit) {
        // This visit's columns have arrived, and every warp is done with the other stage
        cp_async_wait_all();
        __syncthreads();
        const int column0 = tile * kColumns;
        if (++tile == end_tile) ++head, tile = first_tile;
        if (head < end_head) load_stage(visit + 1, head, tile * kColumns);
        const uint32_t stage = stages + visit % 2 * kStageBytes;

#pragma unroll 1
        for (int step = 0; step < kColumns; step += kStep) {
            const int first_column = column0 + step, last_column = first_column + kStep - 1;
            const int last_row = warp_row0 + 16 * kM - 1;
            if (kKeys ? last_column < warp_row0 : first_column > last_row) continue;  // all above the diagonal
            const uint32_t first = stage + step * kRowBytes<kDim>, second = first + tile_bytes<kDim>(kColumns);

            float prob[kM][kStep / 8][4], d_s[kM][kStep / 8][4];  // first S and dP
            multiply_transposed(prob, s_rows, first, columns_first);
            multiply_transposed(d_s, dp_rows, second, columns_first);
            if (kKeys ? first_column < last_row : last_column > warp_row0) {
                const int row_minus_column = warp_row0 + lane / 4 - (first_column + lane % 4 * 2);  // of element 0
                for_each(prob, [&](float& x, int m, int n, int i) {
                    const int difference = row_minus_column + row_minus_column_of(m, n, i);
                    if (kKeys ? difference > 0 : difference < 0) x = -INFINITY;
                });
            }
#pragma unroll
            for (int n = 0; n < kStep / 8; ++n) {
                Vec<QueryTerms, 2> of_columns;
                if constexpr (kKeys)
                    of_columns = load<Vec<QueryTerms, 2>>(
                        column_terms + (visit % 2 * kColumns + step + n * 8 + lane % 4 * 2) * sizeof(QueryTerms));
#pragma unroll
                for (int m = 0; m < kM; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const QueryTerms query = kKeys ? of_columns[i % 2] : row_terms[m][i / 2];
                        prob[m][n][i] = exp2_approx(fmaf(prob[m][n][i], to_log2, -query.lse_log2));
                        d_s[m][n][i] = prob[m][n][i] * (d_s[m][n][i] - query.delta);
                    }
            }
            const uint32_t out_bytes = out_column0 * sizeof(bf16);
            if constexpr (kKeys) multiply_add(p_sum, prob, second + out_bytes, rows_first);
            multiply_add(d_s_sum, d_s, first + out_bytes, rows_first);
        }
    }

    // Store
    for_each(d_s_sum, [&](float& x, int, int, int) { x *= scale; });
    const int packed_head = kKeys ? H + kv : h;
    bf16* to = p.dqkv + (int64_t(b) * T + warp_row0) * stride + packed_head * head_dim + out_column0;
    char* staging = shared + tile_bytes<kDim>(warp * 16 * kM);
    uint32_t amax = store_rows(d_s_sum, staging, to, stride, T - warp_row0, head_dim - out_column0);
    if constexpr (kKeys)
        amax = max(amax, store_rows(p_sum, staging + tile_bytes<kDim>(kRows), to + KV * head_dim, stride,
                                    T - warp_row0, head_dim - out_column0));
    if (p.amax) block_amax_to_slot(amax, p.amax);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

float score_scale(const AttentionShape& s) { return float(1.0 / std::sqrt(double(s.head_dim))); }

// How many heads' streamed operands, T rows of `columns` elements each, fit half of L2; evened out over the groups,
// because a small last group would start its longest blocks last.
int heads_in_l2(const AttentionShape& s, int64_t columns, int64_t heads) {
    static const int l2_bytes = [] {
        int device, bytes;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
        return bytes;
    }();
    const int64_t fitting = std::max<int64_t>(1, l2_bytes / 2 / (s.T * columns * int64_t(sizeof(bf16))));
    return int(ceil_div(heads, ceil_div(heads, fitting)));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int shared_bytes, cudaStream_t stream, const Arguments&... a) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    kernel<<<grid, kThreads, shared_bytes, stream>>>(a...);
    CUDA_CHECK_LAUNCH();
}

template <int kDim>
void launch_forward(const AttentionForward& p, cudaStream_t stream) {
    const AttentionShape& s = p.shape;
    const int heads = s.B * s.H;
    launch(forward_kernel<kDim>, dim3(unsigned(ceil_div(s.T, forward_tile(kDim).rows()) * heads)), kForwardBytes<kDim>,
           stream, p, heads_in_l2(s, 2 * s.head_dim, heads), score_scale(s));
}

template <int kDim, Owns kOwns>
void launch_backward(const AttentionBackward& p, cudaStream_t stream) {
    constexpr TileShape kTile = backward_tile(kDim, kOwns);
    const AttentionShape& s = p.shape;
    const int heads = s.B * (kOwns == Owns::keys ? s.KV : s.H);
    const int streamed_columns = 2 * s.head_dim * (kOwns == Owns::keys ? s.H / s.KV : 1);
    launch(backward_kernel<kDim, kOwns>, dim3(unsigned(ceil_div(s.T, kTile.rows()) * heads), kTile.slices),
           kBackwardBytes<kDim, kOwns>, stream, p, static_cast<const QueryTerms*>(p.workspace),
           heads_in_l2(s, streamed_columns, heads), score_scale(s));
}

template <int kDim>
void launch_backward(const AttentionBackward& p, cudaStream_t stream) {
    launch_backward<kDim, Owns::keys>(p, stream);
    launch_backward<kDim, Owns::queries>(p, stream);
}

}  // namespace

void mma_attention_forward(const AttentionForward& p, cudaStream_t stream) {
    const int d = p.shape.head_dim;
    (d <= 64 ? launch_forward<64> : d <= 128 ? launch_forward<128> : launch_forward<256>)(p, stream);
}

size_t mma_attention_backward_workspace_bytes(const AttentionShape& s, const AttentionOptions&) {
    return size_t(s.B) * s.H * s.T * sizeof(QueryTerms);
}

void mma_attention_backward(const AttentionBackward& p, cudaStream_t stream) {
    const AttentionShape& s = p.shape;
    constexpr int kTermThreads = 256;
    query_terms_kernel<<<unsigned(ceil_div(int64_t(s.B) * s.T * s.H * 8, kTermThreads)), kTermThreads, 0, stream>>>(
        p, static_cast<QueryTerms*>(p.workspace));
    CUDA_CHECK_LAUNCH();
    const int d = s.head_dim;
    (d <= 64 ? launch_backward<64> : d <= 128 ? launch_backward<128> : launch_backward<256>)(p, stream);
}
