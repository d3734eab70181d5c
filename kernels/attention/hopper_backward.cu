// Gradients of causal attention on Hopper (sm_90a): TMA, mbarriers, warp-specialized wgmma. Contract: kernels/attention.h;
// head_dim 64 and 128, BF16 operands, float accumulation. Deterministic: no sum depends on the order of blocks.
//
//   kernel          owns 128   streams              per tile pair                                            matmuls
//   owns queries    Q, dO      K, V up to diagonal  S = Q K^T, dP = dO V^T, dQ += dS K                       3
//   owns keys       K, V       Q, dO from there on  S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q   4
//
// with P = exp2(S scale log2(e) - LSE log2(e)) and dS = P (dP - delta), delta = rowsum(dO O). Both are one template:
// each owns two row operands and streams two column operands, and P and dS go from accumulators straight into the A
// operand of the next wgmma. Forming S and dP twice costs 7 matmuls where 5 are counted, and buys the fixed order: no
// block adds to another's dQ. What one kernel of 5 matmuls would do instead (FlashAttention-3): pass dS and a float tile of
// dQ of every tile pair through shared memory, add the latter to a float dQ in memory, which is zeroed before and rounded
// after, and order the blocks if the bits are to repeat. The queries' kernel also makes delta: there is no third kernel.
//
// A block is one an SM, persistent, 3 warpgroups:
//   warpgroup 0       warp 0 loads column tiles by TMA, far ahead, across items, warp 3 the rows of the next item; warps 1
//                     and 2 make {LSE log2(e), delta} of its queries (queries' kernel) and store the gradients of the last
//   warpgroups 1, 2   64 of the block's 128 rows each; independent of each other, so that one's exponentials run while
//                     the other's matmuls do
// Work items are tiles paired long with short, so that all pairs cost the same (see Items).
//
// Order of accesses to shared memory: every hand-over is an mbarrier (Shared). TMA and threads that may be written over
// wait for an "empty" one, readers for a "full" one. Where a warp hands over as one, its lanes meet in __syncwarp(), which
// orders their accesses, and lane 0 arrives (release) for all; the other side waits (acquire). That holds for the LSE and
// delta that warps 1 and 2 store and the consumers load: terms_full after the stores, terms_empty after the loads.
// compute-sanitizer's racecheck does not follow it, and reports those floats as races.
//
// Padding: rows past T are loaded as zeros and not stored. Queries past T have LSE = inf, so P = 0; keys past T are past
// every query, so that the causal mask covers them.
#include <algorithm>
#include <cmath>

#include "kernels/attention/backends.h"
#include "kernels/common/cuda_check.h"
#include "kernels/common/dependent_launch.cuh"
#include "kernels/common/device.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/sm_count.h"
#include "kernels/common/tensor_map.h"

namespace {

constexpr int kWarpgroup = 4 * kWarpSize, kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kGroupRows = 64, kRows = kConsumers * kGroupRows;  // rows of a warpgroup (the M of wgmma), of a block
constexpr int kPanel = 64, kPanelRowBytes = kPanel * int(sizeof(bf16));  // columns of a swizzled panel
constexpr int kBoxRows = 64;                                            // rows of a TMA copy
constexpr int kFloat = sizeof(float);
constexpr float kLog2e = 1.4426950408889634f;

enum class Owns { queries, keys };

struct Tile {
    int dim;
    Owns owns;
    int columns, stages;             // of the streamed operands
    bool hold;                       // row operands in registers instead of shared memory
    bool carry;                      // dV and dK (or dQ) of a visit may still be under way when the next one's S starts
    int producer_registers, consumer_registers;

    constexpr bool keys() const { return owns == Owns::keys; }
    constexpr int panels() const { return dim / kPanel; }
};

// As measured on an H100 (dev/LOG.md). 128 columns make the keys' kernel of head_dim 64 spill; the sums of dV and dK of
// head_dim 128 leave no registers to hold rows or to carry.
constexpr Tile backward_tile(int dim, Owns owns) {
    if (owns == Owns::keys)
        return dim == 64 ? Tile{.dim = 64, .owns = owns, .columns = 64, .stages = 4, .hold = true, .carry = true,
                                .producer_registers = 40, .consumer_registers = 232}
                         : Tile{.dim = 128, .owns = owns, .columns = 64, .stages = 3, .hold = false, .carry = false,
                                .producer_registers = 40, .consumer_registers = 232};
    return dim == 64 ? Tile{.dim = 64, .owns = owns, .columns = 64, .stages = 4, .hold = true, .carry = true,
                            .producer_registers = 56, .consumer_registers = 224}
                     : Tile{.dim = 128, .owns = owns, .columns = 64, .stages = 2, .hold = true, .carry = false,
                            .producer_registers = 56, .consumer_registers = 224};
}

// What the queries' kernel leaves for the keys': rows of `padded` floats for each (b, h), so that a tile of them can be
// bulk-copied whatever T is.
struct QueryTerms {
    float* lse_log2;  // LSE * log2(e); inf past T
    float* delta;     // rowsum(dO * O); 0 past T
    int padded;       // T rounded up to kRows
};
int padded_rows(int T) { return int(ceil_div(T, kRows)) * kRows; }

struct Parameters {
    AttentionShape shape;
    float scale, to_log2;  // of scores, to the exponent of 2
    const float* lse;
    QueryTerms terms;
    QuantSlot* amax;
};
struct Maps {  // boxes of kPanel columns of one head, kBoxRows rows
    CUtensorMap qkv, out, dout, dqkv;
};

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

template <Tile kTile>
struct Shared {
    static constexpr int kBuffers = 2;  // of the row operands: this item's and the next one's
    static constexpr int kRowPanel = kRows * kPanelRowBytes, kColumnPanel = kTile.columns * kPanelRowBytes;
    static constexpr int kRowOperand = kTile.panels() * kRowPanel, kColumnOperand = kTile.panels() * kColumnPanel;
    static constexpr int kTerms = kTile.keys() ? kTile.columns : kRows, kTermsCopies = kTile.keys() ? kTile.stages : 1;
    static constexpr int kStagesAt = kBuffers * 2 * kRowOperand;
    static constexpr int kOutAt = kStagesAt + kTile.stages * 2 * kColumnOperand;
    static constexpr int kTermsAt = kOutAt + (kTile.keys() ? 0 : kRowOperand);
    static constexpr int kBarriersAt = kTermsAt + kTermsCopies * 2 * kTerms * kFloat;
    static constexpr int kBarriers = 2 * kBuffers + 2 * kTile.stages + kConsumers + 2;
    static constexpr int kBytes = 1024 + kBarriersAt + kBarriers * 8;  // 1024: to align the first panel

    uint32_t base;

    __device__ uint32_t row_operand(int buffer, int which) const { return base + (buffer * 2 + which) * kRowOperand; }
    __device__ uint32_t column_operand(int stage, int which) const {
        return base + kStagesAt + (stage * 2 + which) * kColumnOperand;
    }
    __device__ uint32_t out() const { return base + kOutAt; }  // queries' kernel: the tile of O, for delta
    __device__ uint32_t lse_log2(int copy) const { return base + kTermsAt + copy * 2 * kTerms * kFloat; }
    __device__ uint32_t delta(int copy) const { return lse_log2(copy) + kTerms * kFloat; }

    // full: what was asked for has arrived; empty: its readers are done
    __device__ uint32_t rows_full(int buffer) const { return barrier(buffer); }
    __device__ uint32_t rows_empty(int buffer) const { return barrier(kBuffers + buffer); }
    __device__ uint32_t full(int stage) const { return barrier(2 * kBuffers + stage); }
    __device__ uint32_t empty(int stage) const { return barrier(2 * kBuffers + kTile.stages + stage); }
    __device__ uint32_t staged(int group) const { return barrier(2 * kBuffers + 2 * kTile.stages + group); }
    __device__ uint32_t terms_full() const { return barrier(kBarriers - 2); }
    __device__ uint32_t terms_empty() const { return barrier(kBarriers - 1); }

    __device__ void init_barriers() const {
        for (int i = 0; i < kBuffers; ++i) {
            ptx::mbarrier_init(rows_full(i), 1);
            ptx::mbarrier_init(rows_empty(i), kConsumers);  // the two warps that store
        }
        for (int i = 0; i < kTile.stages; ++i) {
            ptx::mbarrier_init(full(i), 1);
            ptx::mbarrier_init(empty(i), kConsumers * 4);  // lane 0 of every consumer warp
        }
        for (int i = 0; i < kConsumers; ++i) ptx::mbarrier_init(staged(i), kWarpgroup);
        ptx::mbarrier_init(terms_full(), kConsumers);  // the two warps that make them
        ptx::mbarrier_init(terms_empty(), kConsumers * 4);
        ptx::fence_mbarrier_init();
    }

  private:
    __device__ uint32_t barrier(int i) const { return base + kBarriersAt + i * 8; }
};

// Position in a ring of kStages: starts before the first.
template <int kStages>
struct Ring {
    int stage = kStages - 1;
    uint32_t parity = 1;

    __device__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Work. An item is a tile of kRows rows of one head; keys belong to all query heads of their group. The tiles of a head
// are paired, the longest with the shortest; a block takes every gridDim.x-th pair, long before short, heads in order, so
// that the blocks stream the same few heads at a time.

struct Item {
    int b, head, row0;
};

template <Owns kOwns>
class Items {
  public:
    __device__ explicit Items(const AttentionShape& s)
        : tiles_(int(ceil_div(s.T, kRows))), heads_(kOwns == Owns::keys ? s.KV : s.H), pairs_a_head_((tiles_ + 1) / 2),
          pairs_(s.B * heads_ * pairs_a_head_), pair_(int(blockIdx.x)) {}

    __device__ bool next(Item& item) {
        if (pair_ >= pairs_) return false;
        const int head = pair_ / pairs_a_head_, i = pair_ % pairs_a_head_, mirrored = tiles_ - 1 - i;
        item = {head / heads_, head % heads_, ((kOwns == Owns::keys) == second_ ? mirrored : i) * kRows};
        second_ = !second_ && i != mirrored;
        if (!second_) pair_ += int(gridDim.x);
        return true;
    }

  private:
    int tiles_, heads_, pairs_a_head_, pairs_, pair_;
    bool second_ = false;
};

// The column tiles that an item visits, of each of `heads` query heads.
struct Visits {
    int first, end, heads;
};
template <Tile kTile>
__device__ __forceinline__ Visits visits_of(const Item& item, const AttentionShape& s) {
    if (kTile.keys()) return {item.row0 / kTile.columns, int(ceil_div(s.T, kTile.columns)), s.H / s.KV};
    return {0, int(ceil_div(min(item.row0 + kRows, s.T), kTile.columns)), 1};
}

// ---------------------------------------------------------------------------------------------------------------------
// Warps 0 and 3 of warpgroup 0, one thread each: loads

// Rows row0.. of one head, all its columns: panels of kTileRows rows.
template <int kPanels, int kTileRows>
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap& map, uint32_t barrier, int head, int row0, int b) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll
        for (int row = 0; row < kTileRows; row += kBoxRows)
            ptx::tma_load(to + (panel * kTileRows + row) * kPanelRowBytes, map, barrier, panel * kPanel, head, row0 + row,
                          b);
}

// One thread of warp 3. Not in the order of the streamed tiles: an item's rows are wanted as soon as there is room.
template <Tile kTile>
__device__ __forceinline__ void load_rows(const Parameters& p, const Maps& maps, const Shared<kTile>& shared) {
    constexpr bool kKeys = kTile.keys();
    const AttentionShape& s = p.shape;
    Items<kTile.owns> items(s);
    Ring<Shared<kTile>::kBuffers> rows;
    uint32_t terms_parity = 1;
    for (Item item; items.next(item); terms_parity ^= 1) {
        rows.advance();
        ptx::mbarrier_wait(shared.rows_empty(rows.stage), rows.parity ^ 1);
        const uint32_t full = shared.rows_full(rows.stage);
        ptx::mbarrier_arrive_expect(full, (kKeys ? 2 : 3) * Shared<kTile>::kRowOperand);
        load_tile<kTile.panels(), kRows>(shared.row_operand(rows.stage, 0), maps.qkv, full,
                                         kKeys ? s.H + item.head : item.head, item.row0, item.b);
        load_tile<kTile.panels(), kRows>(shared.row_operand(rows.stage, 1), kKeys ? maps.qkv : maps.dout, full,
                                         kKeys ? s.H + s.KV + item.head : item.head, item.row0, item.b);
        if (!kKeys) {  // the tile of O is single: free when the terms of the item before are made
            ptx::mbarrier_wait(shared.terms_full(), terms_parity);
            load_tile<kTile.panels(), kRows>(shared.out(), maps.out, full, item.head, item.row0, item.b);
        }
    }
}

// One thread of warp 0
template <Tile kTile>
__device__ __forceinline__ void load_columns(const Parameters& p, const Maps& maps, const Shared<kTile>& shared) {
    constexpr bool kKeys = kTile.keys();
    constexpr int kTermBytes = kTile.columns * kFloat;
    const AttentionShape& s = p.shape;
    const int group = s.H / s.KV;
    Items<kTile.owns> items(s);
    Ring<kTile.stages> ring;
    if (kKeys) wait_for_previous_kernel();  // for terms
    for (Item item; items.next(item);) {
        const Visits visits = visits_of<kTile>(item, s);
        for (int i = 0; i < visits.heads; ++i) {
            const int head = kKeys ? item.head * group + i : item.head / group;
            for (int tile = visits.first; tile < visits.end; ++tile) {
                const int column0 = tile * kTile.columns;
                ring.advance();
                ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
                const uint32_t full = shared.full(ring.stage);
                ptx::mbarrier_arrive_expect(full, 2 * Shared<kTile>::kColumnOperand + (kKeys ? 2 * kTermBytes : 0));
                load_tile<kTile.panels(), kTile.columns>(shared.column_operand(ring.stage, 0), maps.qkv, full,
                                                         kKeys ? head : s.H + head, column0, item.b);
                load_tile<kTile.panels(), kTile.columns>(shared.column_operand(ring.stage, 1), kKeys ? maps.dout : maps.qkv,
                                                         full, kKeys ? head : s.H + s.KV + head, column0, item.b);
                if (kKeys) {
                    const int64_t at = (int64_t(item.b) * s.H + head) * p.terms.padded + column0;
                    ptx::bulk_load(shared.lse_log2(ring.stage), p.terms.lse_log2 + at, kTermBytes, full);
                    ptx::bulk_load(shared.delta(ring.stage), p.terms.delta + at, kTermBytes, full);
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Warps 1 and 2 of warpgroup 0, one for each consumer warpgroup: terms of the queries, stores

// Makes the terms of the next item's queries in rows `group` * kGroupRows.. from the tiles of dO and O.
template <Tile kTile>
__device__ __forceinline__ void make_terms(const Parameters& p, const Shared<kTile>& shared, const Item& item, int buffer,
                                           int group) {
    constexpr int kLanes = kTile.dim / 8, kAtOnce = kWarpSize / kLanes;  // lanes a row, rows a load
    const int lane = threadIdx.x % kWarpSize, in_row = lane % kLanes, row0 = group * kGroupRows;
    const int rows_left = p.shape.T - item.row0;
    const int64_t head = int64_t(item.b) * p.shape.H + item.head;
    for (int row = row0 + lane; row < row0 + kGroupRows; row += kWarpSize) {
        const float lse_log2 = row < rows_left ? p.lse[head * p.shape.T + item.row0 + row] * kLog2e : INFINITY;
        ptx::store_shared(shared.lse_log2(0) + row * kFloat, lse_log2);
        p.terms.lse_log2[head * p.terms.padded + item.row0 + row] = lse_log2;
    }
    const auto dot = [](uint32_t pair, uint32_t other) {
        const float2 x = unpack(pair), y = unpack(other);
        return fmaf(x.x, y.x, x.y * y.y);
    };
    const uint32_t panel = in_row / 8 * Shared<kTile>::kRowPanel;
#pragma unroll 4
    for (int row = row0 + lane / kLanes; row < row0 + kGroupRows; row += kAtOnce) {
        const uint32_t at = panel + ptx::swizzled(row, in_row % 8 * 16);
        const uint4 o = ptx::load_shared_uint4(shared.out() + at);
        const uint4 d_o = ptx::load_shared_uint4(shared.row_operand(buffer, 1) + at);
        float delta = dot(o.x, d_o.x) + dot(o.y, d_o.y) + dot(o.z, d_o.z) + dot(o.w, d_o.w);
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) delta += __shfl_xor_sync(~0u, delta, offset);
        if (in_row != 0) continue;
        ptx::store_shared(shared.delta(0) + row * kFloat, delta);  // 0 past T
        p.terms.delta[head * p.terms.padded + item.row0 + row] = delta;
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(shared.terms_full());
}

// Stores what consumer warpgroup `group` has staged in its rows of the row operands.
template <Tile kTile>
__device__ __forceinline__ void store_gradients(const Parameters& p, const Maps& maps, const Shared<kTile>& shared,
                                                const Item& item, int buffer, int group) {
    const AttentionShape& s = p.shape;
#pragma unroll
    for (int which = 0; which < (kTile.keys() ? 2 : 1); ++which) {
        const int head = item.head + (kTile.keys() ? s.H + which * s.KV : 0);
#pragma unroll
        for (int panel = 0; panel < kTile.panels(); ++panel)
            ptx::tma_store(maps.dqkv,
                           shared.row_operand(buffer, which) + (panel * kRows + group * kGroupRows) * kPanelRowBytes,
                           panel * kPanel, head, item.row0 + group * kGroupRows, item.b);
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
}

// The terms of item n + 1 are made during item n.
template <Tile kTile>
__device__ __forceinline__ void make_terms_and_store(const Parameters& p, const Maps& maps, const Shared<kTile>& shared,
                                                     int group) {
    Items<kTile.owns> items(p.shape);
    Item item, next;
    Ring<Shared<kTile>::kBuffers> rows, next_rows;
    const auto make_next_terms = [&] {
        if (kTile.keys()) return;
        next_rows.advance();
        ptx::mbarrier_wait(shared.rows_full(next_rows.stage), next_rows.parity);
        make_terms(p, shared, next, next_rows.stage, group);
    };
    bool more = items.next(next);
    make_next_terms();
    for (uint32_t parity = 0; more; parity ^= 1) {
        item = next;
        more = items.next(next);
        if (more) {
            if (!kTile.keys()) ptx::mbarrier_wait(shared.terms_empty(), parity);
            make_next_terms();
        }
        rows.advance();
        if (threadIdx.x % kWarpSize == 0) {
            ptx::mbarrier_wait(shared.staged(group), parity);
            store_gradients(p, maps, shared, item, rows.stage, group);
            ptx::mbarrier_arrive(shared.rows_empty(rows.stage));
        }
        __syncwarp();
    }
    ptx::bulk_wait<0>();
}

// ---------------------------------------------------------------------------------------------------------------------
// Consumers

// The A operand of 64 rows: in shared memory, or held in registers.
template <Tile kTile>
struct RowOperand {
    static constexpr bool kHold = kTile.hold;
    uint64_t descriptor;
    uint32_t held[kHold ? kTile.dim / 16 : 1][4];

    // Addresses of the first row of the warpgroup, of this warp
    __device__ __forceinline__ void open(uint32_t tile, uint32_t warp_tile, int lane) {
        if constexpr (kHold) {
#pragma unroll
            for (int k = 0; k < kTile.dim / 16; ++k)
                ptx::ldmatrix(held[k], warp_tile + k / 4 * Shared<kTile>::kRowPanel +
                                      ptx::swizzled(lane % 16, k % 4 * 32 + lane / 16 * 16));
        } else {
            descriptor = ptx::descriptor_k_major(tile);
        }
    }
    __device__ __forceinline__ uint32_t folded() const {  // see consume
        uint32_t x = 0;
        if constexpr (kHold)
#pragma unroll
            for (int k = 0; k < kTile.dim / 16; ++k) x ^= held[k][0] ^ held[k][1] ^ held[k][2] ^ held[k][3];
        return x;
    }
    // product = rows * columns^T, `columns` a tile of the streamed operand
    __device__ __forceinline__ void multiply_transposed(float (&product)[kTile.columns / 2], uint32_t columns) const {
        const uint64_t b = ptx::descriptor_k_major(columns);
#pragma unroll
        for (int k = 0; k < kTile.dim / 16; ++k) {
            const uint64_t in_panel = k % 4 * ptx::kNext16OfKMajor;
            const uint64_t b_k = b + k / 4 * (Shared<kTile>::kColumnPanel / 16) + in_panel;
            if constexpr (kHold) {
                ptx::wgmma<ptx::Major::k>(product, held[k], b_k, k > 0);
            } else {
                const uint64_t a_k = descriptor + k / 4 * (Shared<kTile>::kRowPanel / 16) + in_panel;
                ptx::wgmma<ptx::Major::k, ptx::Major::k>(product, a_k, b_k, k > 0);
            }
        }
    }
};

// P or dS as the A operand: [16 columns of it][registers]
template <int kColumns>
using Fragments = uint32_t[kColumns / 16][4];

template <int kColumns>
__device__ __forceinline__ void round_to_fragments(Fragments<kColumns>& a, const float (&x)[kColumns / 2]) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) a[i / 4][i % 4] = pack(x[2 * i], x[2 * i + 1]);
}

// sum += a * columns
template <Tile kTile>
__device__ __forceinline__ void multiply_add(float (&sum)[kTile.dim / 2], const Fragments<kTile.columns>& a,
                                             uint32_t columns) {
    const uint64_t b = ptx::descriptor_mn_major(columns, Shared<kTile>::kColumnPanel);
#pragma unroll
    for (int k = 0; k < kTile.columns / 16; ++k)
        ptx::wgmma<ptx::Major::mn>(sum, a[k], b + k * ptx::kNext16OfMnMajor, true);
}

// This warpgroup's way through the ring: the column tiles of an item that hold something below its diagonal.
template <Tile kTile>
struct Visitor {
    Ring<kTile.stages> ring;
    int tile, heads_left, first, end, group_first, group_end;

    __device__ void start(const Item& item, const AttentionShape& s, int group) {
        const Visits v = visits_of<kTile>(item, s);
        const int row0 = item.row0 + group * kGroupRows;
        first = v.first, end = v.end, heads_left = v.heads, tile = v.first - 1;
        group_first = kTile.keys() ? row0 / kTile.columns : 0;
        group_end = kTile.keys() ? v.end : (row0 + kGroupRows - 1) / kTile.columns + 1;
    }
    // To the next tile, once it has arrived; false if there is none. Tiles with nothing in them are given back.
    __device__ bool advance(const Shared<kTile>& shared) {
        while (true) {
            if (++tile == end) {
                tile = first;
                if (--heads_left == 0) return false;
            }
            ring.advance();
            ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
            if (tile >= group_first && tile < group_end) return true;
            release(shared, ring.stage);
        }
    }
    __device__ static void release(const Shared<kTile>& shared, int stage) {
        __syncwarp();
        if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(shared.empty(stage));
    }
};

// Rounds, takes the maximum into `most` and writes a warp's 16 rows to `to`, panels of kRows rows.
template <Tile kTile>
__device__ __forceinline__ void stage_rows(float (&x)[kTile.dim / 2], float scale, uint32_t to, int lane, uint32_t& most) {
#pragma unroll
    for (int k = 0; k < kTile.dim / 16; ++k) {
        uint32_t r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            r[i] = pack(x[8 * k + 2 * i] * scale, x[8 * k + 2 * i + 1] * scale);
            most = pair_amax(most, r[i]);
        }
        ptx::stmatrix(to + k / 4 * Shared<kTile>::kRowPanel + ptx::swizzled(lane % 16, k % 4 * 32 + lane / 16 * 16), r);
    }
}

template <Tile kTile>
__device__ __forceinline__ void consume(const Parameters& p, const Shared<kTile>& shared, int group) {
    constexpr bool kKeys = kTile.keys();
    constexpr int kColumns = kTile.columns, kScores = kColumns / 2;  // registers of 64 x columns
    const int warp = threadIdx.x / kWarpSize % 4, lane = threadIdx.x % kWarpSize;
    Items<kTile.owns> items(p.shape);
    Ring<Shared<kTile>::kBuffers> rows;
    Visitor<kTile> visitor;
    uint32_t most = 0;
    uint32_t terms_parity = 0;

    for (Item item; items.next(item);) {
        const int group_row0 = item.row0 + group * kGroupRows, lane_row = group_row0 + warp * 16 + lane / 4;
        rows.advance();
        ptx::mbarrier_wait(shared.rows_full(rows.stage), rows.parity);
        const uint32_t group_offset = group * kGroupRows * kPanelRowBytes, warp_offset = warp * 16 * kPanelRowBytes;
        const uint32_t first_tile = shared.row_operand(rows.stage, 0) + group_offset;
        const uint32_t second_tile = shared.row_operand(rows.stage, 1) + group_offset;
        RowOperand<kTile> s_rows, dp_rows;
        s_rows.open(first_tile, first_tile + warp_offset, lane);
        dp_rows.open(second_tile, second_tile + warp_offset, lane);

        float row_lse[2], row_delta[2];  // queries' kernel
        if constexpr (!kKeys) {
            ptx::mbarrier_wait(shared.terms_full(), terms_parity);
            terms_parity ^= 1;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = (lane_row - item.row0 + 8 * i) * kFloat;
                row_lse[i] = ptx::load_shared_float(shared.lse_log2(0) + at);
                row_delta[i] = ptx::load_shared_float(shared.delta(0) + at);
            }
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(shared.terms_empty());
        }

        float d_s_sum[kTile.dim / 2], p_sum[kKeys ? kTile.dim / 2 : 1];  // dQ or dK, not yet times scale; dV
#pragma unroll
        for (float& x : d_s_sum) x = 0.0f;
#pragma unroll
        for (float& x : p_sum) x = 0.0f;
        float s[kScores], d_p[kScores];
        Fragments<kColumns> p_rounded, d_s_rounded;

        visitor.start(item, p.shape, group);
        int previous = -1;
        while (visitor.advance(shared)) {
            const int stage = visitor.ring.stage, column0 = visitor.tile * kColumns;
            const uint32_t first = shared.column_operand(stage, 0), second = shared.column_operand(stage, 1);
            ptx::wgmma_fence();
            s_rows.multiply_transposed(s, first);
            ptx::wgmma_commit();
            dp_rows.multiply_transposed(d_p, second);
            ptx::wgmma_commit();
            ptx::wgmma_wait<1>();  // S, and all of the visit before
            ptx::registers_ready(s);
            if (kTile.carry && previous >= 0) visitor.release(shared, previous);
            if (kKeys ? column0 < group_row0 + kGroupRows - 1 : column0 + kColumns - 1 > group_row0) {
                const int row_minus_column = lane_row - (column0 + lane % 4 * 2);
#pragma unroll
                for (int i = 0; i < kScores; ++i) {
                    const int difference = row_minus_column + i / 2 % 2 * 8 - (i / 4 * 8 + i % 2);
                    if (kKeys ? difference > 0 : difference < 0) s[i] = -INFINITY;
                }
            }
            float prob[kScores];
            const int lane_column = lane % 4 * 2 * kFloat;
#pragma unroll
            for (int i = 0; i < kScores; i += 4) {
                float2 lse;
                if constexpr (kKeys) lse = ptx::load_shared_float2(shared.lse_log2(stage) + lane_column + 2 * i * kFloat);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    prob[i + j] = exp2_approx(fmaf(s[i + j], p.to_log2, -(kKeys ? j % 2 ? lse.y : lse.x : row_lse[j / 2])));
            }
            if constexpr (kKeys) {
                round_to_fragments<kColumns>(p_rounded, prob);
                ptx::wgmma_fence();
                multiply_add<kTile>(p_sum, p_rounded, second);
                ptx::wgmma_commit();
            }
            ptx::wgmma_wait<int(kKeys)>();  // dP
            ptx::registers_ready(d_p);
#pragma unroll
            for (int i = 0; i < kScores; i += 4) {
                float2 delta;
                if constexpr (kKeys) delta = ptx::load_shared_float2(shared.delta(stage) + lane_column + 2 * i * kFloat);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    d_p[i + j] = prob[i + j] * (d_p[i + j] - (kKeys ? j % 2 ? delta.y : delta.x : row_delta[j / 2]));
            }
            round_to_fragments<kColumns>(d_s_rounded, d_p);
            ptx::wgmma_fence();
            multiply_add<kTile>(d_s_sum, d_s_rounded, first);
            ptx::wgmma_commit();
            if constexpr (!kTile.carry) {
                ptx::wgmma_wait<0>();
                ptx::registers_ready(d_s_sum);
                if constexpr (kKeys) ptx::registers_ready(p_sum);
                visitor.release(shared, stage);
            }
            previous = stage;
        }
        ptx::wgmma_wait<0>();
        ptx::registers_ready(d_s_sum);
        if constexpr (kKeys) ptx::registers_ready(p_sum);
        if (kTile.carry && previous >= 0) visitor.release(shared, previous);

        // Never taken. ptxas (CUDA 13.0) takes registers that only wgmma reads for dead after the first iteration that reads
        // them, and gives those of the held rows to dS; a reader of another kind after the loop keeps them.
        if constexpr (kTile.hold)
            if (p.shape.T < 0) ptx::store_shared(shared.lse_log2(0), __uint_as_float(s_rows.folded() ^ dp_rows.folded()));

        // The row operands have been read for the last time: their rows of this warpgroup take the gradients
        ptx::named_barrier_sync(1 + group, kWarpgroup);
        stage_rows<kTile>(d_s_sum, p.scale, first_tile + warp_offset, lane, most);
        if constexpr (kKeys) stage_rows<kTile>(p_sum, 1.0f, second_tile + warp_offset, lane, most);
        ptx::fence_async_shared();
        ptx::mbarrier_arrive(shared.staged(group));
    }
    if (p.amax) {
        const uint32_t bits = __reduce_max_sync(~0u, amax_bits_of_pair(most));
        if (lane == 0 && bits != 0) atomicMax(&p.amax->amax_bits, bits);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel and launchers

template <int kDim, Owns kOwns>
__global__ __launch_bounds__(kThreads, 1) void hopper_backward_kernel(const __grid_constant__ Parameters p,
                                                                      const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr Tile kTile = backward_tile(kDim, kOwns);
    extern __shared__ char memory[];
    const Shared<kTile> shared{(ptx::shared_address(memory) + 1023) / 1024 * 1024};
    allow_dependent_launch();
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);  // so that ptxas sees it is uniform
    if (warpgroup == 0) {
        ptx::registers_release<kTile.producer_registers>();
        const int warp = threadIdx.x / kWarpSize;
        if (threadIdx.x == 0) load_columns(p, maps, shared);
        else if (threadIdx.x == 3 * kWarpSize) load_rows(p, maps, shared);
        else if (warp == 1 || warp == 2) make_terms_and_store(p, maps, shared, warp - 1);
    } else {
        ptx::registers_acquire<kTile.consumer_registers>();
        consume(p, shared, warpgroup - 1);
    }
#endif
}

CUtensorMap head_map(const bf16* data, const AttentionShape& s, int heads) {
    const int64_t row = int64_t(heads) * s.head_dim;
    return make_tensor_map(data, Dtype::bf16, CU_TENSOR_MAP_SWIZZLE_128B,
                           {{.size = s.head_dim, .stride = 1, .box = kPanel},
                            {.size = heads, .stride = s.head_dim, .box = 1},
                            {.size = s.T, .stride = row, .box = kBoxRows},
                            {.size = s.B, .stride = row * s.T, .box = 1}});
}

template <int kDim, Owns kOwns>
void launch(const Parameters& p, const Maps& maps, cudaStream_t stream) {
    constexpr Tile kTile = backward_tile(kDim, kOwns);
    const auto kernel = hopper_backward_kernel<kDim, kOwns>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared<kTile>::kBytes));
    const int64_t pairs = int64_t(p.shape.B) * (kTile.keys() ? p.shape.KV : p.shape.H) *
                          ceil_div(ceil_div(p.shape.T, kRows), 2);
    cudaLaunchAttribute early{};  // the keys' kernel starts while the last blocks of the queries' run
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(std::min<int64_t>(pairs, sm_count())));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = Shared<kTile>::kBytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = kTile.keys() ? 1 : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p, maps));
}

template <int kDim>
void launch_both(const Parameters& p, const Maps& maps, cudaStream_t stream) {
    launch<kDim, Owns::queries>(p, maps, stream);
    launch<kDim, Owns::keys>(p, maps, stream);
}

}  // namespace

std::string hopper_attention_backward_refusal(const AttentionShape& s, const AttentionOptions&) {
    if (TRAIN_GPT_ARCH != 90) return message("this binary is for sm_%d, not sm_90a", TRAIN_GPT_ARCH);
    static const int capability = [] {
        int device, major, minor;
        if (cudaGetDevice(&device) != cudaSuccess) {  // a run is planned where there is no GPU: for an H100
            cudaGetLastError();
            return 90;
        }
        CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
        return 10 * major + minor;
    }();
    if (capability != 90) return message("the GPU is sm_%d, not sm_90", capability);
    return s.head_dim == 64 || s.head_dim == 128 ? "" : message("head_dim=%d is not 64 or 128", s.head_dim);
}

size_t hopper_attention_backward_workspace_bytes(const AttentionShape& s, const AttentionOptions&) {
    return 2 * size_t(s.B) * s.H * padded_rows(s.T) * sizeof(float);
}

void hopper_attention_backward(const AttentionBackward& p, cudaStream_t stream) {
    const AttentionShape& s = p.shape;
    const int padded = padded_rows(s.T);
    const float scale = float(1.0 / std::sqrt(double(s.head_dim)));
    float* const workspace = static_cast<float*>(p.workspace);
    const Parameters parameters = {
        .shape = s, .scale = scale, .to_log2 = scale * kLog2e, .lse = p.lse,
        .terms = {.lse_log2 = workspace, .delta = workspace + int64_t(s.B) * s.H * padded, .padded = padded},
        .amax = p.amax};
    const Maps maps = {.qkv = head_map(p.qkv, s, s.H + 2 * s.KV), .out = head_map(p.out, s, s.H),
                       .dout = head_map(p.dout, s, s.H), .dqkv = head_map(p.dqkv, s, s.H + 2 * s.KV)};
    (s.head_dim == 64 ? launch_both<64> : launch_both<128>)(parameters, maps, stream);
}
