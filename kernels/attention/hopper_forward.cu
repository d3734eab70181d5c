// Attention forward for Hopper (sm_90a), head dimensions 64 and 128: TMA, warp specialization, wgmma.
//
// Algorithm: FlashAttention-2's online softmax (Dao 2023, arXiv:2307.08691) with FlashAttention-3's roles (Shah et al.
// 2024, arXiv:2407.08608): a producer thread keeps a ring of K and V blocks full by TMA, consumer warpgroups compute.
//
//   a consumer, 64 query rows        S = Q K^T     Q, K in shared memory, S in registers
//   blocks from the diagonal left    P = 2^(S scale log2(e) - reference), rounded to BF16 in registers
//                                    O += P V      P in registers, V in shared memory as it lies (MN-major)
//
// The scores of the next block are issued before the product of the probabilities before, and that product runs under
// the exponentials of this block. Only the block on the diagonal is masked; blocks above it are skipped by each
// warpgroup for itself. The other warpgroups of the SM fill what one leaves idle: four with narrow blocks (64 keys)
// beat two or three with wide ones at head dimension 64, where exponentials take as long as matmuls.
//
// The reference of a row is the maximum of its diagonal block (times scale log2(e)), raised only when a later score
// exceeds it by more than 8: P may reach 2^8, at which BF16 and float are as precise as at 1, and the common block needs
// no shuffles and no rescaling of O.
//
// Loads read the packed qkv in place: a tensor map of (head_dim, heads, T, B), T a dimension of its own, so that rows
// past T arrive as zeros; a key past T lies past every query, so the causal mask covers it. O leaves through the shared
// memory of its Q by a bulk store that drops rows past T. Blocks are persistent: while a tile ends, the loads of the
// next are under way. Tiles are dealt out by a counter in device memory, those with most keys first, heads in groups
// whose K and V share L2. Which team runs a tile does not change its bits, so the result is deterministic.
//
// Counted work: 4 B H T^2/2 head_dim FLOPs.
#include <algorithm>
#include <cmath>

#include "kernels/attention/backends.h"
#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/sm_count.h"
#include "kernels/common/tensor_map.h"

namespace {

using ptx::Major;

constexpr int kWarpgroup = 128;
constexpr int kRows = 64;       // query rows of a warpgroup: the M of wgmma
constexpr int kPanel = 64;      // columns of a swizzled panel
constexpr int kRowBytes = 128;  // of a panel
constexpr double kLog2e = 1.4426950408889634;

// ---------------------------------------------------------------------------------------------------------------------
// Tile shapes

// A thread block is one warpgroup of producers and `teams` teams; a team works on a tile of its own, as a thread block
// would: `consumers` warpgroups with kRows query rows each, and one producer thread.
struct ForwardTile {
    int teams, consumers;
    int columns;      // keys of a block
    int stages;       // blocks of K, and of V, in a team's shared memory
    int registers;    // of a consumer's thread

    constexpr int threads() const { return (1 + teams * consumers) * kWarpgroup; }
    constexpr int rows() const { return consumers * kRows; }
    // What the consumers leave of the registers that the block has at launch.
    constexpr int producer_registers() const {
        const int at_launch = 65536 / threads() / 8 * 8;
        return std::min(at_launch * (1 + teams * consumers) - registers * teams * consumers, 56);
    }
};

// Measured on an H100 against each other (dev/LOG.md). Two teams of 128 rows waste less on the causal edge at T = 1024
// than one of 256.
constexpr ForwardTile forward_tile(int dim) {
    return dim == 64 ? ForwardTile{.teams = 2, .consumers = 2, .columns = 64, .stages = 4, .registers = 112}
                     : ForwardTile{.teams = 1, .consumers = 3, .columns = 64, .stages = 3, .registers = 160};
}
static_assert(forward_tile(64).producer_registers() >= 24 && forward_tile(128).producer_registers() >= 24);

// Shared memory of a team, in bytes from its start. Q has two buffers, so that the next tile's is there when one ends.
template <int kDim, ForwardTile kTile>
struct Layout {
    static constexpr int kPanels = kDim / kPanel;
    static constexpr int kQPanel = kRows * kRowBytes, kQ = kPanels * kQPanel;  // of a consumer
    static constexpr int kKvPanel = kTile.columns * kRowBytes, kKv = kPanels * kKvPanel;
    static constexpr int kKeys = 2 * kTile.consumers * kQ, kValues = kKeys + kTile.stages * kKv;
    static constexpr int kTeam = kValues + kTile.stages * kKv;
    static constexpr int kBarriers = 8 * (5 + 4 * kTile.stages);  // and two ints
    static constexpr int kBytes = kTile.teams * (kTeam + kBarriers);

    static constexpr int q(int buffer, int consumer) { return (buffer * kTile.consumers + consumer) * kQ; }
};

// Addresses of a team.
template <int kDim, ForwardTile kTile>
struct Team {
    using At = Layout<kDim, kTile>;
    uint32_t tiles, barriers;

    __device__ Team(uint32_t shared, int team)
        : tiles(shared + team * At::kTeam), barriers(shared + kTile.teams * At::kTeam + team * At::kBarriers) {}
    __device__ uint32_t q(int buffer, int consumer) const { return tiles + At::q(buffer, consumer); }
    __device__ uint32_t k(int stage) const { return tiles + At::kKeys + stage * At::kKv; }
    __device__ uint32_t v(int stage) const { return tiles + At::kValues + stage * At::kKv; }
    __device__ uint32_t q_full(int buffer) const { return barriers + 8 * buffer; }
    __device__ uint32_t q_empty(int buffer) const { return barriers + 8 * (2 + buffer); }
    __device__ uint32_t k_full(int stage) const { return barriers + 8 * (4 + stage); }
    __device__ uint32_t k_empty(int stage) const { return k_full(stage) + 8 * kTile.stages; }
    __device__ uint32_t v_full(int stage) const { return k_full(stage) + 16 * kTile.stages; }
    __device__ uint32_t v_empty(int stage) const { return k_full(stage) + 24 * kTile.stages; }
    __device__ uint32_t mailbox(int buffer) const { return k_full(4 * kTile.stages) + 4 * buffer; }
};

// Where a ring of stages stands.
template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Order of work

struct ForwardArguments {
    int T, H, KV, heads;  // heads = B * H
    int tiles;            // of a head
    int heads_in_l2;
    float scale_log2;     // scale * log2(e)
    float* lse;
    QuantSlot* amax;
    int* taken;           // tiles dealt out beyond the first one of each team; 0 at the start
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
struct Work {
    int head, b, h, row0;
};

// Groups of heads whose K and V share L2; in a group, the tiles with most keys first, so that short ones fill the end.
__device__ __forceinline__ Work work_at(const ForwardArguments& a, int rows, int position) {
    const int per_group = a.tiles * a.heads_in_l2, group = position / per_group, rest = position % per_group;
    const int first = group * a.heads_in_l2, in_group = min(a.heads_in_l2, a.heads - first);
    const int head = first + rest % in_group;
    return {.head = head, .b = head / a.H, .h = head % a.H, .row0 = (a.tiles - 1 - rest / in_group) * rows};
}

// ---------------------------------------------------------------------------------------------------------------------
// Producer: one thread

template <int kDim, ForwardTile kTile>
__device__ __forceinline__ void produce(uint32_t shared, const CUtensorMap& qkv, const ForwardArguments& a, int team_id) {
    using At = Layout<kDim, kTile>;
    const Team<kDim, kTile> team(shared, team_id);
    Ring<kTile.stages> ring;
    Ring<2> q_ring;
    const int teams = int(gridDim.x) * kTile.teams, total = a.tiles * a.heads;
    int position = team_id * int(gridDim.x) + int(blockIdx.x);
    for (;; q_ring.next()) {
        ptx::mbarrier_wait(team.q_empty(q_ring.stage), q_ring.parity ^ 1);
        ptx::store_shared(team.mailbox(q_ring.stage), position < total ? position : -1);
        if (position >= total) {
            ptx::mbarrier_arrive(team.q_full(q_ring.stage));
            break;
        }
        const Work work = work_at(a, kTile.rows(), position);
        ptx::mbarrier_arrive_expect(team.q_full(q_ring.stage), kTile.consumers * At::kQ);
        for (int consumer = 0; consumer < kTile.consumers; ++consumer)
            for (int panel = 0; panel < At::kPanels; ++panel)
                ptx::tma_load(team.q(q_ring.stage, consumer) + panel * At::kQPanel, qkv, team.q_full(q_ring.stage),
                              panel * kPanel, work.h, work.row0 + consumer * kRows, work.b);
        const int k_head = a.H + work.h / (a.H / a.KV), v_head = k_head + a.KV;
        const auto load_block = [&](uint32_t to, uint32_t full, uint32_t empty, int head, int block) {
            ptx::mbarrier_wait(empty, ring.parity ^ 1);
            ptx::mbarrier_arrive_expect(full, At::kKv);
            for (int panel = 0; panel < At::kPanels; ++panel)
                for (int row = 0; row < kTile.columns; row += kRows)
                    ptx::tma_load(to + panel * At::kKvPanel + row * kRowBytes, qkv, full, panel * kPanel, head,
                                  block * kTile.columns + row, work.b);
        };
        for (int block = (min(work.row0 + kTile.rows(), a.T) - 1) / kTile.columns; block >= 0; --block, ring.next()) {
            const int stage = ring.stage;
            load_block(team.k(stage), team.k_full(stage), team.k_empty(stage), k_head, block);
            load_block(team.v(stage), team.v_full(stage), team.v_empty(stage), v_head, block);
        }
        position = teams + atomicAdd(a.taken, 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Consumer: a warpgroup

// s = Q K^T
template <int kDim, ForwardTile kTile>
__device__ __forceinline__ void issue_scores(float (&s)[kTile.columns / 2], uint32_t q, uint32_t k) {
    using At = Layout<kDim, kTile>;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
        const uint64_t q_at = ptx::descriptor_k_major(q + i / 4 * At::kQPanel) + i % 4 * ptx::kNext16OfKMajor;
        const uint64_t k_at = ptx::descriptor_k_major(k + i / 4 * At::kKvPanel) + i % 4 * ptx::kNext16OfKMajor;
        ptx::wgmma<Major::k, Major::k>(s, q_at, k_at, i > 0);
    }
    ptx::wgmma_commit();
}
// o += P V
template <int kDim, ForwardTile kTile>
__device__ __forceinline__ void issue_output(float (&o)[kDim / 2], const uint32_t (&p)[kTile.columns / 16][4], uint32_t v,
                                             bool accumulate) {
    const uint64_t v_at = ptx::descriptor_mn_major(v, Layout<kDim, kTile>::kKvPanel);
#pragma unroll
    for (int i = 0; i < kTile.columns / 16; ++i)
        ptx::wgmma<Major::mn>(o, p[i], v_at + i * ptx::kNext16OfMnMajor, accumulate || i > 0);
    ptx::wgmma_commit();
}

constexpr float kLn2 = 0.6931471805599453f;

// Of the two rows (g, g + 8) that a thread has elements of. The reference is what is subtracted from the exponents, at
// most kSlack below the maximum so far and the same in the four threads of a row. The sum is this thread's.
constexpr float kSlack = 8.0f;
struct Rows {
    float reference[2], sum[2];
};
template <int kCount>
__device__ __forceinline__ void row_maximum(const float (&s)[kCount], float (&top)[2]) {
    top[0] = s[0], top[1] = s[2];
#pragma unroll
    for (int i = 0; i < kCount; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
}
__device__ __forceinline__ float quad_maximum(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
// s = 2^(s * scale - reference), added to the sums
template <int kCount>
__device__ __forceinline__ void exponentiate(float (&s)[kCount], Rows& rows, float scale_log2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        s[i] = exp2_approx(fmaf(s[i], scale_log2, -rows.reference[i / 2 % 2]));
        rows.sum[i / 2 % 2] += s[i];
    }
}
template <int kCount>
__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[kCount / 8][4], const float (&s)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) p[i / 4][i % 4] = pack(s[2 * i], s[2 * i + 1]);
}

template <int kDim, ForwardTile kTile>
class Consumer {
    using At = Layout<kDim, kTile>;
    static constexpr int kColumns = kTile.columns;
    using Scores = float[kColumns / 2];
    using Probabilities = uint32_t[kColumns / 16][4];
    using Output = float[kDim / 2];

  public:
    __device__ __forceinline__ Consumer(uint32_t shared, const ForwardArguments& arguments, int warpgroup_id)
        : a(arguments), team(shared, warpgroup_id / kTile.consumers), warpgroup(warpgroup_id),
          consumer(warpgroup_id % kTile.consumers), lane(threadIdx.x % kWarpSize),
          warp_row(threadIdx.x % kWarpgroup / kWarpSize * 16), leader(threadIdx.x % kWarpgroup == 0) {}

    __device__ __forceinline__ void run(const CUtensorMap& out) {
        for (;; q_ring.next()) {
            ptx::mbarrier_wait(team.q_full(q_ring.stage), q_ring.parity);
            const int position = ptx::load_shared(team.mailbox(q_ring.stage));
            if (position < 0) break;
            tile(out, work_at(a, kTile.rows(), position));
        }
        if (leader) ptx::bulk_wait_read<0>();
        if (!a.amax) return;
        const uint32_t bits = __reduce_max_sync(~0u, amax_bits_of_pair(amax));
        if (lane == 0 && bits != 0) atomicMax(&a.amax->amax_bits, bits);
    }

  private:
    __device__ __forceinline__ void tile(const CUtensorMap& out, const Work& work) {
        const int row0 = work.row0 + consumer * kRows;  // of this warpgroup
        const int team_blocks = (min(work.row0 + kTile.rows(), a.T) - 1) / kColumns + 1;
        const int blocks = row0 < a.T ? (min(row0 + kRows, a.T) - 1) / kColumns + 1 : 0;
        for (int block = team_blocks; block > blocks; --block) skip_block();
        if (blocks == 0) {
            release_stored_q();
            ptx::named_barrier_sync(1 + warpgroup, kWarpgroup);  // all have read the mailbox
            if (leader) ptx::mbarrier_arrive(team.q_empty(q_ring.stage));
            return;
        }
        Scores s;
        Probabilities p;
        Output o;
        Rows rows;
        first_block(s, p, rows, row0 - (blocks - 1) * kColumns);
        for (int block = blocks - 2; block >= 0; --block) next_block(s, p, o, rows, block == blocks - 2);
        wait_v();
        ptx::wgmma_fence();
        issue_output<kDim, kTile>(o, p, team.v(v_ring.stage), blocks > 1);
        ptx::wgmma_wait<0>();
        ptx::registers_ready(o);
        release_v();
        store(o, rows, row0, work);
        if (leader) {
#pragma unroll
            for (int panel = 0; panel < At::kPanels; ++panel)
                ptx::tma_store(out, my_q() + panel * At::kQPanel, panel * kPanel, work.h, row0, work.b);
            ptx::bulk_commit();
        }
        stored_q = q_ring.stage;
    }

    // A block that lies above the diagonal for all rows of this warpgroup. Waiting first keeps its "empty" from counting
    // for the stage's use before.
    __device__ __forceinline__ void skip_block() {
        wait_k();
        release_k();
        wait_v();
        release_v();
    }

    // The block on the diagonal; `row_minus_column` of its first element.
    __device__ __forceinline__ void first_block(Scores& s, Probabilities& p, Rows& rows, int row_minus_column) {
        wait_k();
        ptx::wgmma_fence();
        issue_scores<kDim, kTile>(s, my_q(), team.k(k_ring.stage));
        release_stored_q();
        ptx::wgmma_wait<0>();
        ptx::registers_ready(s);
        release_k();
        row_minus_column += warp_row + lane / 4 - lane % 4 * 2;  // of s[0]
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i)
            if (row_minus_column + i / 2 % 2 * 8 - (i / 4 * 8 + i % 2) < 0) s[i] = -INFINITY;
        float top[2];
        row_maximum(s, top);
#pragma unroll
        for (int r = 0; r < 2; ++r) rows.reference[r] = quad_maximum(top[r]) * a.scale_log2, rows.sum[r] = 0.0f;
        exponentiate(s, rows, a.scale_log2);
        pack_probabilities(p, s);
    }

    // Scores of the next block to the left, and the product of the probabilities before with their V, which runs under
    // this block's exponentials.
    __device__ __forceinline__ void next_block(Scores& s, Probabilities& p, Output& o, Rows& rows, bool first) {
        wait_k();
        ptx::wgmma_fence();
        issue_scores<kDim, kTile>(s, my_q(), team.k(k_ring.stage));
        wait_v();
        ptx::wgmma_fence();
        issue_output<kDim, kTile>(o, p, team.v(v_ring.stage), !first);
        ptx::wgmma_wait<1>();
        ptx::registers_ready(s);
        release_k();

        float top[2], shrink[2];
        row_maximum(s, top);
        bool higher = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) higher |= fmaf(top[r], a.scale_log2, -rows.reference[r]) > kSlack;
        higher = __any_sync(~0u, higher);
        if (higher) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float raised = fmaxf(rows.reference[r], quad_maximum(top[r]) * a.scale_log2);
                shrink[r] = exp2_approx(rows.reference[r] - raised);
                rows.reference[r] = raised;
                rows.sum[r] *= shrink[r];
            }
        }
        exponentiate(s, rows, a.scale_log2);
        ptx::wgmma_wait<0>();
        ptx::registers_ready(o);
        release_v();
        if (higher) {
#pragma unroll
            for (int i = 0; i < kDim / 2; ++i) o[i] *= shrink[i / 2 % 2];
        }
        pack_probabilities(p, s);
    }

    // Writes LSE, and O / sum as BF16 to this warpgroup's Q, which nobody needs any more, for a bulk store.
    __device__ __forceinline__ void store(const Output& o, const Rows& rows, int row0, const Work& work) {
        const int my_row = row0 + warp_row + lane / 4;  // and + 8
        float inverse[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float sum = quad_sum(rows.sum[r]);
            inverse[r] = 1.0f / sum;
            if (lane % 4 == 0 && my_row + 8 * r < a.T)
                a.lse[int64_t(work.head) * a.T + my_row + 8 * r] = (rows.reference[r] + __log2f(sum)) * kLn2;
        }
        ptx::named_barrier_sync(1 + warpgroup, kWarpgroup);  // all warps are done with Q
#pragma unroll
        for (int n = 0; n < kDim / 8; n += 2) {
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                pairs[i] = pack(o[4 * n + 2 * i] * inverse[i % 2], o[4 * n + 2 * i + 1] * inverse[i % 2]);
                if (my_row + 8 * (i % 2) < a.T) amax = pair_amax(amax, pairs[i]);
            }
            const int staged_row = warp_row + lane % 16, byte = (n % 8 + lane / 16) * 16;
            ptx::stmatrix(my_q() + n / 8 * At::kQPanel + ptx::swizzled(staged_row, byte), pairs);
        }
        ptx::fence_async_shared();
        ptx::named_barrier_sync(1 + warpgroup, kWarpgroup);
    }

    __device__ __forceinline__ uint32_t my_q() const { return team.q(q_ring.stage, consumer); }
    __device__ __forceinline__ void wait_k() const { ptx::mbarrier_wait(team.k_full(k_ring.stage), k_ring.parity); }
    __device__ __forceinline__ void wait_v() const { ptx::mbarrier_wait(team.v_full(v_ring.stage), v_ring.parity); }
    // __syncwarp: no lane may still be waiting for the phase that the arrival lets pass.
    __device__ __forceinline__ void release_k() {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(team.k_empty(k_ring.stage));
        k_ring.next();
    }
    __device__ __forceinline__ void release_v() {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(team.v_empty(v_ring.stage));
        v_ring.next();
    }
    // Hands the buffer of the tile before to the producer, once its store has read it.
    __device__ __forceinline__ void release_stored_q() {
        if (leader && stored_q >= 0) {
            ptx::bulk_wait_read<0>();
            ptx::mbarrier_arrive(team.q_empty(stored_q));
        }
        stored_q = -1;
    }

    const ForwardArguments& a;
    const Team<kDim, kTile> team;
    const int warpgroup, consumer, lane, warp_row;
    const bool leader;  // the thread that stores
    Ring<kTile.stages> k_ring, v_ring;
    Ring<2> q_ring;
    int stored_q = -1;  // buffer that a store may still be reading, or -1
    uint32_t amax = 0;  // of pairs
};
#endif

template <int kDim>
__global__ void __launch_bounds__(forward_tile(kDim).threads(), 1)
    forward_kernel(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap out,
                   const ForwardArguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr ForwardTile kTile = forward_tile(kDim);
    extern __shared__ __align__(1024) char shared_memory[];
    const uint32_t shared = ptx::shared_address(shared_memory);
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(qkv);
        ptx::prefetch_tensor_map(out);
        constexpr int kWarps = kTile.consumers * kWarpgroup / kWarpSize;
        for (int t = 0; t < kTile.teams; ++t) {
            const Team<kDim, kTile> team(shared, t);
            for (int buffer = 0; buffer < 2; ++buffer) {
                ptx::mbarrier_init(team.q_full(buffer), 1);
                ptx::mbarrier_init(team.q_empty(buffer), kTile.consumers);
            }
            for (int stage = 0; stage < kTile.stages; ++stage) {
                ptx::mbarrier_init(team.k_full(stage), 1);
                ptx::mbarrier_init(team.k_empty(stage), kWarps);
                ptx::mbarrier_init(team.v_full(stage), 1);
                ptx::mbarrier_init(team.v_empty(stage), kWarps);
            }
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / kWarpgroup, 0);  // the same in all lanes, for the compiler
    if (warpgroup == kTile.teams * kTile.consumers) {
        ptx::registers_release<kTile.producer_registers()>();
        const int team = int(threadIdx.x) % kWarpgroup / kWarpSize;
        if (threadIdx.x % kWarpSize == 0 && team < kTile.teams) produce<kDim, kTile>(shared, qkv, a, team);
    } else {
        ptx::registers_acquire<kTile.registers>();
        Consumer<kDim, kTile>(shared, a, warpgroup).run(out);
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Launcher

// How many heads' K and V fit half of L2; evened out over the groups.
int heads_in_l2(const AttentionShape& s) {
    static const int l2_bytes = [] {
        int device, bytes;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
        return bytes;
    }();
    const int64_t heads = int64_t(s.B) * s.H, group = s.H / s.KV;
    const int64_t kv_bytes = int64_t(s.T) * 2 * s.head_dim * int64_t(sizeof(bf16));
    const int64_t fitting = std::max<int64_t>(1, l2_bytes / 2 / kv_bytes) * group;
    return int(ceil_div(heads, ceil_div(heads, fitting)));
}

template <int kDim>
void launch_forward(const AttentionForward& p, cudaStream_t stream) {
    constexpr ForwardTile kTile = forward_tile(kDim);
    using At = Layout<kDim, kTile>;
    const AttentionShape& s = p.shape;
    const int64_t packed = int64_t(s.H + 2 * s.KV) * kDim, row = int64_t(s.H) * kDim;
    const auto map = [&](const void* base, int heads, int64_t stride) {
        return make_tensor_map(base, Dtype::bf16, CU_TENSOR_MAP_SWIZZLE_128B,
                               {{.size = kDim, .stride = 1, .box = kPanel},
                                {.size = heads, .stride = kDim, .box = 1},
                                {.size = s.T, .stride = stride, .box = kRows},
                                {.size = s.B, .stride = stride * s.T, .box = 1}});
    };
    const ForwardArguments arguments{
        .T = s.T,
        .H = s.H,
        .KV = s.KV,
        .heads = s.B * s.H,
        .tiles = int(ceil_div(s.T, kTile.rows())),
        .heads_in_l2 = heads_in_l2(s),
        .scale_log2 = float(kLog2e / std::sqrt(double(kDim))),
        .lse = p.lse,
        .amax = p.amax,
        .taken = static_cast<int*>(p.workspace),
    };
    constexpr auto kernel = forward_kernel<kDim>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, At::kBytes));
    const int grid = std::min(int(ceil_div(arguments.tiles * arguments.heads, kTile.teams)), sm_count());
    CUDA_CHECK(cudaMemsetAsync(p.workspace, 0, sizeof(int), stream));
    kernel<<<grid, kTile.threads(), At::kBytes, stream>>>(map(p.qkv, s.H + 2 * s.KV, packed), map(p.out, s.H, row),
                                                          arguments);
    CUDA_CHECK_LAUNCH();
}

}  // namespace

std::string hopper_attention_forward_refusal(const AttentionShape& s, const AttentionOptions&) {
    if (TRAIN_GPT_ARCH != 90) return message("this binary is for sm_%d, the kernel for sm_90a", TRAIN_GPT_ARCH);
    int device, major = 9, minor = 0;
    if (cudaGetDevice(&device) == cudaSuccess) {
        CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    } else {
        cudaGetLastError();  // a run is planned where there is no GPU: for an H100
    }
    if (major != 9 || minor != 0) return message("this GPU is sm_%d%d, the kernel for sm_90a", major, minor);
    if (s.head_dim != 64 && s.head_dim != 128) return message("head_dim=%d is not 64 or 128", s.head_dim);
    return "";
}
size_t hopper_attention_forward_workspace_bytes(const AttentionShape&, const AttentionOptions&) { return sizeof(int); }

void hopper_attention_forward(const AttentionForward& p, cudaStream_t stream) {
    (p.shape.head_dim == 64 ? launch_forward<64> : launch_forward<128>)(p, stream);
}
