// Checks kernels/common/ptx.cuh and tensor_map.h on a Hopper GPU, one building block at a time, against plain loops. Inputs are small
// integers, so every product and sum is exact and results are compared by bits.
#include "kernels/common/ptx.cuh"

#include "dev/harness.h"
#include "kernels/common/device.cuh"
#include "kernels/common/tensor_map.h"

namespace {

using ptx::Major;

std::vector<float> small_integers(size_t n) {
    const std::vector<int> x = random_ints(n, -4, 5);
    return {x.begin(), x.end()};
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int threads, int shared_bytes, const Arguments&... arguments) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    kernel<<<1, threads, shared_bytes>>>(arguments...);
    CUDA_CHECK_LAUNCH();
    CUDA_CHECK(cudaDeviceSynchronize());
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: D (64 x N) = A (64 x kK) B (kK x N) for every N, every majorness, A from shared memory and from registers.
// The kernel fills the panels by plain stores through swizzled() and reads D by the fragment layout that ptx.cuh states.

constexpr int kK = 128;  // two panels of a K-major operand

// Element (mn, k) of an operand of `extent` rows in M or N.
template <Major kMajor>
__device__ uint32_t element_offset(int mn, int k, int extent) {
    const int row = kMajor == Major::k ? mn : k, column = kMajor == Major::k ? k : mn;
    const int panel_rows = kMajor == Major::k ? extent : kK;
    return uint32_t(column / 64 * panel_rows * 128) + ptx::swizzled(row, column % 64 * 2);
}
template <Major kMajor>
__device__ uint64_t descriptor(uint32_t tile, int extent, int k) {
    if constexpr (kMajor == Major::mn)
        return ptx::descriptor_mn_major(tile, kK * 128) + k / 16 * ptx::kNext16OfMnMajor;
    else
        return ptx::descriptor_k_major(tile + k / 64 * extent * 128) + k % 64 / 16 * ptx::kNext16OfKMajor;
}

template <int kN, Major kA, Major kB, bool kRegisters>
__global__ __launch_bounds__(128) void wgmma_kernel(const bf16* a, const bf16* b, float* d) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char shared[];
    char* const b_tile = shared + 64 * kK * 2;
    for (int i = threadIdx.x; i < 64 * kK; i += 128)
        *reinterpret_cast<bf16*>(shared + element_offset<kA>(i / kK, i % kK, 64)) = a[i];
    for (int i = threadIdx.x; i < kN * kK; i += 128)
        *reinterpret_cast<bf16*>(b_tile + element_offset<kB>(i % kN, i / kN, kN)) = b[i];
    ptx::fence_async_shared();
    __syncthreads();

    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float sum[kN / 2];
    uint32_t fragment[kK / 16][4];
    if constexpr (kRegisters)
        for (int k = 0; k < kK; k += 16)
            for (int i = 0; i < 4; ++i) {
                const int row = 16 * warp + g + i % 2 * 8;
                const int column = k + 2 * t + i / 2 * 8;
                const float2 pair = {__bfloat162float(a[row * kK + column]), __bfloat162float(a[row * kK + column + 1])};
                fragment[k / 16][i] = pack(pair.x, pair.y);
            }
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
        const uint64_t of_b = descriptor<kB>(ptx::shared_address(b_tile), kN, k);
        if constexpr (kRegisters)
            ptx::wgmma<kB>(sum, fragment[k / 16], of_b, k > 0);
        else
            ptx::wgmma<kA, kB>(sum, descriptor<kA>(ptx::shared_address(shared), 64, k), of_b, k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::registers_ready(sum);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i)
        d[(16 * warp + g + 8 * (i / 2 % 2)) * kN + 8 * (i / 4) + 2 * t + i % 2] = sum[i];
#endif
}

template <int kN, Major kA, Major kB, bool kRegisters>
void check_wgmma(Report& report) {
    const std::vector<float> a = small_integers(64 * kK), b = small_integers(size_t(kK) * kN);
    std::vector<float> reference(64 * kN);
    for (int m = 0; m < 64; ++m)
        for (int k = 0; k < kK; ++k)
            for (int n = 0; n < kN; ++n) reference[m * kN + n] += a[m * kK + k] * b[k * kN + n];
    const DeviceBuffer<bf16> device_a(to_bf16(a)), device_b(to_bf16(b));
    DeviceBuffer<float> d(64 * kN);
    launch(wgmma_kernel<kN, kA, kB, kRegisters>, 128, (64 + (kN + 63) / 64 * 64) * kK * 2, device_a.get(), device_b.get(), d.get());
    const auto name_of_major = [](Major major) { return major == Major::k ? "K-major" : "MN-major"; };
    report.compare_bits(
        "ptx.wgmma",
        message("N %d, A %s, B %s", kN, kRegisters ? "in registers" : name_of_major(kA), name_of_major(kB)),
        d.download(), reference);
}

template <int kN>
void check_wgmma(Report& report) {
    check_wgmma<kN, Major::k, Major::k, false>(report);
    check_wgmma<kN, Major::k, Major::mn, false>(report);
    check_wgmma<kN, Major::mn, Major::k, false>(report);
    check_wgmma<kN, Major::mn, Major::mn, false>(report);
    check_wgmma<kN, Major::k, Major::k, true>(report);
    check_wgmma<kN, Major::k, Major::mn, true>(report);
}

// ---------------------------------------------------------------------------------------------------------------------
// TMA: one box of a (B, T, heads, columns) tensor in, to a dump of shared memory, and out to another place. The box
// hangs over the end of T, where zeros must arrive and nothing may be written.

constexpr int kBoxRows = 48, kBoxBytes = kBoxRows * 128;
struct TensorShape {
    int B = 2, T = 70, heads = 3, columns = 128;
    size_t index(int b, int t, int head, int column) const {
        return ((size_t(b) * T + t) * heads + head) * columns + column;
    }
    size_t size() const { return size_t(B) * T * heads * columns; }
};
struct BoxPlace {
    int column, head, t, b;
};

// 128-byte rows: 64 BF16 or 32 floats.
CUtensorMap map_of(const void* base, Dtype type, CUtensorMapSwizzle swizzle, const TensorShape& s) {
    const int64_t row = s.columns;
    return make_tensor_map(base, type, swizzle,
                           {{.size = s.columns, .stride = 1, .box = int(128 / bytes_of(type))},
                            {.size = s.heads, .stride = row, .box = 1},
                            {.size = s.T, .stride = row * s.heads, .box = kBoxRows},
                            {.size = s.B, .stride = row * s.heads * s.T, .box = 1}});
}

__global__ __launch_bounds__(128) void tma_kernel(const __grid_constant__ CUtensorMap from,
                                                  const __grid_constant__ CUtensorMap to, BoxPlace load, BoxPlace store,
                                                  bf16* dump) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) bf16 box[];
    const uint32_t tile = ptx::shared_address(box), barrier = tile + kBoxBytes;
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(from);
        ptx::mbarrier_init(barrier, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect(barrier, kBoxBytes);
        ptx::tma_load(tile, from, barrier, load.column, load.head, load.t, load.b, ptx::l2_evict_last());
    }
    __syncthreads();
    ptx::mbarrier_wait(barrier, 0);
    for (int i = threadIdx.x; i < kBoxBytes / 2; i += 128) dump[i] = box[i];
    // Every element plus one, in place: ordinary stores that the bulk store must see.
    for (int i = threadIdx.x; i < kBoxBytes / 2; i += 128) box[i] = __float2bfloat16(__bfloat162float(box[i]) + 1.0f);
    ptx::fence_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::tma_store(to, tile, store.column, store.head, store.t, store.b);
        ptx::bulk_commit();
        ptx::bulk_wait<0>();
    }
#endif
}

void check_tma(Report& report) {
    const TensorShape s;
    const std::vector<float> values = small_integers(s.size());
    const std::vector<bf16> source = to_bf16(values);
    for (const int t0 : {0, 16, 40}) {
        const BoxPlace load{.column = 64, .head = 1, .t = t0, .b = 0}, store{.column = 0, .head = 2, .t = t0 + 8, .b = 1};
        const DeviceBuffer<bf16> from(source);
        DeviceBuffer<bf16> to(source), dump(kBoxBytes / 2);
        launch(tma_kernel, 128, kBoxBytes + 8, map_of(from.get(), Dtype::bf16, CU_TENSOR_MAP_SWIZZLE_128B, s),
               map_of(to.get(), Dtype::bf16, CU_TENSOR_MAP_SWIZZLE_128B, s), load, store, dump.get());
        std::vector<float> expected_dump(kBoxBytes / 2), expected(values);
        for (int row = 0; row < kBoxRows; ++row)
            for (int c = 0; c < 64; ++c) {
                const float x = t0 + row < s.T ? values[s.index(0, t0 + row, 1, 64 + c)] : 0.0f;
                expected_dump[(row * 128 + (c * 2 ^ (row % 8) * 16)) / 2] = x;
                if (t0 + 8 + row < s.T) expected[s.index(1, t0 + 8 + row, 2, c)] = x + 1;
            }
        const std::string shape = message("rows %d..%d of %d", t0, t0 + kBoxRows - 1, s.T);
        report.compare_bits("ptx.tma_load", shape, dump.download(), to_bf16(expected_dump));
        report.compare_bits("ptx.tma_store", shape, to.download(), to_bf16(expected));
        report.expect("ptx.tma_store.guards", shape, to.guards_intact(), "");
    }
}

// Both reductions: a box of ones through the map, and the same bytes as one plain run of floats.
__global__ __launch_bounds__(128) void reduce_kernel(const __grid_constant__ CUtensorMap to, BoxPlace place, float* run) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) float floats[];
    for (int i = threadIdx.x; i < kBoxBytes / 4; i += 128) floats[i] = float(i % 7);
    ptx::fence_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::tma_reduce_add(to, ptx::shared_address(floats), place.column, place.head, place.t, place.b);
        ptx::bulk_reduce_add(run, ptx::shared_address(floats), kBoxBytes);
        ptx::bulk_reduce_add(run, ptx::shared_address(floats), kBoxBytes);
        ptx::bulk_commit();
        ptx::bulk_wait<0>();
    }
#endif
}

void check_reduce(Report& report) {
    const TensorShape s;
    const BoxPlace place{.column = 32, .head = 0, .t = 50, .b = 1};
    const std::vector<float> before = small_integers(s.size()), run_before = small_integers(kBoxBytes / 4);
    DeviceBuffer<float> to(before), run(run_before);
    launch(reduce_kernel, 128, kBoxBytes, map_of(to.get(), Dtype::f32, CU_TENSOR_MAP_SWIZZLE_NONE, s), place, run.get());
    std::vector<float> expected(before), run_expected(run_before);
    for (int i = 0; i < kBoxBytes / 4; ++i) {
        run_expected[i] += 2 * float(i % 7);
        if (place.t + i / 32 < s.T) expected[s.index(1, place.t + i / 32, 0, 32 + i % 32)] += float(i % 7);
    }
    report.compare_bits("ptx.tma_reduce_add", "past the end of T", to.download(), expected);
    report.compare_bits("ptx.bulk_reduce_add", "twice", run.download(), run_expected);
    report.expect("ptx.reduce.guards", "", to.guards_intact() && run.guards_intact(), "");
}

// ---------------------------------------------------------------------------------------------------------------------
// A ring of two buffers between a producer warpgroup that gave registers away and two consumers that took them: the
// consumers hand every chunk, doubled, to their bulk store. Named barriers make the consumers take turns.

[[maybe_unused]] constexpr int kRing = 2, kChunks = 37, kChunkFloats = 256;

__global__ __launch_bounds__(384, 1) void ring_kernel(const float* from, float* to) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ __align__(16) float chunks[kRing][kChunkFloats];
    __shared__ __align__(16) float staged[2][kChunkFloats];
    __shared__ uint64_t full[kRing];
    __shared__ uint64_t empty[kRing];
    if (threadIdx.x == 0) {
        for (int i = 0; i < kRing; ++i) {
            ptx::mbarrier_init(ptx::shared_address(&full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&empty[i]), 1);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == 0) {
        ptx::registers_release<24>();
        if (threadIdx.x == 0)
            for (int i = 0; i < kChunks; ++i) {
                ptx::mbarrier_wait(ptx::shared_address(&empty[i % kRing]), (i / kRing + 1) % 2);
                ptx::mbarrier_arrive_expect(ptx::shared_address(&full[i % kRing]), kChunkFloats * 4);
                ptx::bulk_load(ptx::shared_address(chunks[i % kRing]), from + i * kChunkFloats, kChunkFloats * 4,
                               ptx::shared_address(&full[i % kRing]));
            }
    } else {
        ptx::registers_acquire<240>();
        const int consumer = warpgroup - 1;
        const int thread = threadIdx.x % 128;
        for (int i = consumer; i < kChunks; i += 2) {
            if (i > 0) ptx::named_barrier_sync(1 + consumer, 256);  // the other one is done with chunk i - 1
            ptx::mbarrier_wait(ptx::shared_address(&full[i % kRing]), i / kRing % 2);
            for (int j = thread; j < kChunkFloats; j += 128) staged[consumer][j] = 2 * chunks[i % kRing][j];
            ptx::fence_async_shared();
            ptx::named_barrier_sync(3 + consumer, 128);
            if (thread == 0) {
                ptx::mbarrier_arrive(ptx::shared_address(&empty[i % kRing]));
                ptx::bulk_store(to + i * kChunkFloats, ptx::shared_address(staged[consumer]), kChunkFloats * 4);
                ptx::bulk_commit();
                ptx::bulk_wait_read<0>();
            }
            ptx::named_barrier_sync(3 + consumer, 128);
            if (i + 1 < kChunks) ptx::named_barrier_arrive(2 - consumer, 256);
        }
        ptx::bulk_wait<0>();
    }
#endif
}

void check_ring(Report& report) {
    const std::vector<float> values = small_integers(size_t(kChunks) * kChunkFloats);
    const DeviceBuffer<float> from(values);
    DeviceBuffer<float> to(values.size());
    launch(ring_kernel, 384, 0, from.get(), to.get());
    std::vector<float> expected(values);
    for (float& x : expected) x *= 2;
    report.compare_bits("ptx.ring", message("%d chunks", kChunks), to.download(), expected);
}

// ---------------------------------------------------------------------------------------------------------------------
// stmatrix

template <bool kTransposed>
__global__ void stmatrix_kernel(uint16_t* out) {  // (4, 8, 8)
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ __align__(16) uint16_t matrices[4][8][8];
    const int lane = threadIdx.x;
    const int g = lane / 4;
    const int t = lane % 4;
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) {
        const uint32_t first = uint32_t(i * 64 + g * 8 + 2 * t);  // its number in row-major order
        r[i] = first | (first + 1) << 16;
    }
    const uint32_t row = ptx::shared_address(matrices[lane / 8][lane % 8]);
    if constexpr (kTransposed) ptx::stmatrix_transposed(row, r);
    else ptx::stmatrix(row, r);
    __syncwarp();
    for (int i = lane; i < 256; i += 32) out[i] = matrices[i / 64][i / 8 % 8][i % 8];
#endif
}

void check_stmatrix(Report& report) {
    std::vector<uint16_t> plain(256), transposed(256);
    for (int i = 0; i < 256; ++i) {
        plain[i] = uint16_t(i);
        transposed[i] = uint16_t(i / 64 * 64 + i % 8 * 8 + i / 8 % 8);
    }
    DeviceBuffer<uint16_t> out(256);
    launch(stmatrix_kernel<false>, 32, 0, out.get());
    report.compare_bits("ptx.stmatrix", "plain", out.download(), plain);
    out.poison();
    launch(stmatrix_kernel<true>, 32, 0, out.get());
    report.compare_bits("ptx.stmatrix", "transposed", out.download(), transposed);
}

void checks(Report& report) {
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    REQUIRE(TRAIN_GPT_ARCH == 90 && properties.major == 9,
            "dev/ptx needs a build for sm_90a (this one: sm_%d) and a Hopper GPU (this one: sm_%d%d)", TRAIN_GPT_ARCH,
            properties.major, properties.minor);
    check_tma(report);
    check_reduce(report);
    check_ring(report);
    check_stmatrix(report);
    check_wgmma<64>(report);
    check_wgmma<96>(report);
    check_wgmma<128>(report);
    check_wgmma<160>(report);
    check_wgmma<192>(report);
    check_wgmma<224>(report);
    check_wgmma<256>(report);
}
void benches(Report&) {}

}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "ptx", checks, benches); }
