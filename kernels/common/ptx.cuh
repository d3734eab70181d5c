// What Hopper (sm_90a) has and C++ lacks, as thin wrappers: mbarriers, TMA copies, fences, named barriers, register
// reallocation, wgmma, stmatrix. Facts from the PTX ISA; dev/ptx.cu checks each layout against plain loops.
//
// Shared memory is addressed by 32-bit shared-window addresses (ptx::shared_address). Everything here compiles for any
// GPU as long as it is not called; callers guard their kernels to sm_90a.
//
// The 128-byte swizzle. A tile is kept as rows of 128 bytes (64 BF16 columns, a "panel") from an address that is a
// multiple of 1024; wider tiles are several panels. TMA (CU_TENSOR_MAP_SWIZZLE_128B) and wgmma (swizzle mode 1) both
// exchange the eight 16-byte chunks of a row by chunk ^= row % 8, so that eight rows of one column lie in different
// banks: see swizzled().
#pragma once
#include <cuda.h>

#include <cstdint>

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Offset of byte `byte` (0..127) of row `row` in a swizzled panel.
__device__ __forceinline__ uint32_t swizzled(int row, int byte) { return uint32_t(row * 128 + (byte ^ ((row & 7) << 4))); }

__device__ __forceinline__ void store_shared(uint32_t address, int value) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ int load_shared(uint32_t address) {
    int value;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// mbarrier: 8 bytes of shared memory. A phase ends when `arrivals` threads have arrived and all expected bytes are in.
// Phases alternate in parity, the first is 0: wait(parity) returns once the phase of that parity has ended. A fresh
// barrier counts as if the phase before (parity 1) had ended, so the producer of a ring of buffers, waiting for "empty",
// starts with parity 1 and the consumer, waiting for "full", with 0. Never let a waiter fall two phases behind.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, by the thread that did them and before a __syncthreads(): makes them visible to TMA.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and adds to the bytes that the phase waits for; before the copies that bring them.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// The hardware suspends the thread for a while; false: not yet. Lanes may get different answers, so a warp must not
// branch on them towards an .aligned instruction (wgmma, named barriers) without a vote.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    while (!mbarrier_try_wait(barrier, parity)) {}
}

// ---------------------------------------------------------------------------------------------------------------------
// Bulk copies. One thread issues each. Loads report to an mbarrier; stores and reductions belong to bulk groups of the
// issuing thread. Shared memory written by ordinary stores needs fence_async_shared() by the writers, then a barrier,
// before a bulk store or wgmma reads it.

__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What L2 should do with the lines of a copy: keep what others will read again, drop what nobody will.
__device__ __forceinline__ uint64_t l2_evict_last() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Tensor loads: the box at coordinates (fastest dimension first) of a map made by tensor_map.h. Elements outside the
// tensor arrive as zeros and count as bytes all the same. `to` must be a multiple of 1024 under the 128-byte swizzle.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2,
                                         int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(to), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2,
                                         int c3, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2),
                 "r"(c3), "l"(policy)
                 : "memory");
}
// Tensor store of a box; elements outside the tensor are not written.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, uint32_t from, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
// *map += box, in float, each element atomically; elements outside the tensor are dropped.
__device__ __forceinline__ void tma_reduce_add(const CUtensorMap& map, uint32_t from, int c0, int c1, int c2, int c3) {
    asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
                     "l"(&map), "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

// Plain copies of contiguous bytes; addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}
// to[i] += from[i], floats, each added atomically.
__device__ __forceinline__ void bulk_reduce_add(float* to, uint32_t from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the thread's newest kPending groups have read their source: the shared memory may be written again.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// ... have written their destination.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads of a block: named barriers 1..15 (0 is __syncthreads) and registers

// `threads` counts all that sync or arrive, whole warps; arrive does not wait.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Moves registers between warpgroups; every warp of the warpgroup executes it. ptxas ignores it (warning C7508) unless
// the kernel has __launch_bounds__ that fix the registers at launch. kRegisters: a multiple of 8, 24..256; the sum over
// the warpgroups must not exceed what the block got at launch.
template <int kRegisters>
__device__ __forceinline__ void registers_release() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_acquire() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: D (64 x N) += A (64 x 16) B (16 x N) by one warpgroup (4 consecutive warps, the first a multiple of 4).
//
// D in registers, float d[N/2]. Of warp w (0..3 in the warpgroup) and lane 4g + t, element d[i] is
//     row 16 w + g + 8 * (i / 2 % 2),  column 8 * (i / 4) + 2 t + i % 2.
// A in registers, BF16 pairs a[4]: rows 16 w + g and 16 w + g + 8, columns 2t, 2t+1, in the order
//     (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8).
// So d[8k .. 8k+7], packed in pairs in that order, is the A fragment of columns 16k .. 16k+15.
//
// A or B in shared memory is described by a 64-bit descriptor (below), either
//     K-major:   the 16 elements of the K dimension lie next to each other in memory (a row-major A; B stored (N, K)), or
//     MN-major:  the elements of the M or N dimension do (A stored (K, M); B stored (K, N), like V or like a row-major
//                matrix times it).
//
// Order of use:
//     wgmma_fence();                       // before the first wgmma that reads registers (d, a) written by other code
//     wgmma(d, a, b, accumulate) ...;      // several; those on the same d need no fence between them
//     wgmma_commit();                      // they become a group
//     wgmma_wait<n>(); registers_ready(d); // all but the newest n groups are done; d may be read, a and smem rewritten
// Between the first wgmma and the wait nothing may touch d or a, else ptxas makes the wgmmas synchronous and warns.

enum class Major { k, mn };

// 16-byte units: address bits 0-13, LBO bits 16-29, SBO bits 32-45, swizzle mode bits 62-63 (1 = 128 bytes). `tile` is
// the address of row 0 of a panel, or, advanced by K, the addresses given below. Descriptors may be advanced by adding
// bytes / 16.
constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
constexpr int kEightRows = 1024;  // bytes

// K-major: a panel holds 64 elements of K a row, a row for each M or N. SBO: from one group of eight rows to the next.
// LBO is not used. The next 16 of K are 32 bytes on, inside the swizzled row (the hardware swizzles address bits); after
// 64 of K comes the next panel.
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t tile) {
    return kSwizzle128 | uint64_t(kEightRows / 16) << 32 | uint64_t(1) << 16 | ((tile & 0x3ffff) >> 4);
}
// MN-major: a panel holds 64 elements of M or N a row, a row for each K. SBO: from one group of eight K to the next,
// LBO: from one panel to the next (read if N > 64). The next 16 of K are 2048 bytes on.
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t tile, int panel_bytes) {
    return kSwizzle128 | uint64_t(kEightRows / 16) << 32 | uint64_t(panel_bytes / 16) << 16 | ((tile & 0x3ffff) >> 4);
}
constexpr uint64_t kNext16OfKMajor = 32 / 16, kNext16OfMnMajor = 2 * kEightRows / 16;

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// No instruction: keeps the compiler from moving accesses to d across this line (the wait names no registers).
template <int kCount>
__device__ __forceinline__ void registers_ready(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define PTX_D16(i)                                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),      \
        "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), "+f"(d[i + 12]),           \
        "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define PTX_D32 PTX_D16(0), PTX_D16(16)
#define PTX_D48 PTX_D32, PTX_D16(32)
#define PTX_D64 PTX_D48, PTX_D16(48)
#define PTX_D80 PTX_D64, PTX_D16(64)
#define PTX_D96 PTX_D80, PTX_D16(80)
#define PTX_D112 PTX_D96, PTX_D16(96)
#define PTX_D128 PTX_D112, PTX_D16(112)
#define PTX_NAMES32                                                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_NAMES48 \
    PTX_NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PTX_NAMES64 \
    PTX_NAMES48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_NAMES80 \
    PTX_NAMES64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define PTX_NAMES96 \
    PTX_NAMES80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PTX_NAMES112 \
    PTX_NAMES96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define PTX_NAMES128 \
    PTX_NAMES112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// N and its N/2 registers; then the numbers of the operands that follow them.
#define PTX_WGMMA_SHARED(N, REGISTERS, A, B, ACCUMULATE, TRANSPOSE_A, TRANSPOSE_B)                                  \
    if constexpr (kN == N)                                                                                          \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                        \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" PTX_NAMES##REGISTERS "}, %" #A ", %" #B \
                 ", p, 1, 1, %" #TRANSPOSE_A ", %" #TRANSPOSE_B ";\n}"                                              \
                 : PTX_D##REGISTERS                                                                                 \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA == Major::mn)), "n"(int(kB == Major::mn)))
#define PTX_WGMMA_REGISTERS(N, REGISTERS, A0, A1, A2, A3, B, ACCUMULATE, TRANSPOSE_B)                               \
    if constexpr (kN == N)                                                                                          \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                        \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" PTX_NAMES##REGISTERS "}, {%" #A0     \
                 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TRANSPOSE_B ";\n}"                         \
                 : PTX_D##REGISTERS                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),                        \
                   "n"(int(kB == Major::mn)))

template <int kN>
constexpr bool kHasWgmma = kN % 32 == 0 && kN >= 64 && kN <= 256;

// d = A B + (accumulate ? d : 0), both operands in shared memory.
template <Major kA, Major kB, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
    constexpr int kN = 2 * kRegisters;
    static_assert(kHasWgmma<kN>);
    PTX_WGMMA_SHARED(64, 32, 32, 33, 34, 35, 36);
    PTX_WGMMA_SHARED(96, 48, 48, 49, 50, 51, 52);
    PTX_WGMMA_SHARED(128, 64, 64, 65, 66, 67, 68);
    PTX_WGMMA_SHARED(160, 80, 80, 81, 82, 83, 84);
    PTX_WGMMA_SHARED(192, 96, 96, 97, 98, 99, 100);
    PTX_WGMMA_SHARED(224, 112, 112, 113, 114, 115, 116);
    PTX_WGMMA_SHARED(256, 128, 128, 129, 130, 131, 132);
}
// The same with A in registers.
template <Major kB, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    constexpr int kN = 2 * kRegisters;
    static_assert(kHasWgmma<kN>);
    PTX_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37, 38);
    PTX_WGMMA_REGISTERS(96, 48, 48, 49, 50, 51, 52, 53, 54);
    PTX_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, 70);
    PTX_WGMMA_REGISTERS(160, 80, 80, 81, 82, 83, 84, 85, 86);
    PTX_WGMMA_REGISTERS(192, 96, 96, 97, 98, 99, 100, 101, 102);
    PTX_WGMMA_REGISTERS(224, 112, 112, 113, 114, 115, 116, 117, 118);
    PTX_WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, 134);
}

#undef PTX_WGMMA_SHARED
#undef PTX_WGMMA_REGISTERS
#undef PTX_D16
#undef PTX_D32
#undef PTX_D48
#undef PTX_D64
#undef PTX_D80
#undef PTX_D96
#undef PTX_D112
#undef PTX_D128
#undef PTX_NAMES32
#undef PTX_NAMES48
#undef PTX_NAMES64
#undef PTX_NAMES80
#undef PTX_NAMES96
#undef PTX_NAMES112
#undef PTX_NAMES128

// ---------------------------------------------------------------------------------------------------------------------
// stmatrix: a warp stores four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 (16 bytes) of
// matrix l / 8; register i of lane 4g + t holds elements (g, 2t), (g, 2t+1) of matrix i. An accumulator packed to BF16
// pairs is in that form; the transposed variant writes element (row, column) where the plain one writes (column, row).

__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}
__device__ __forceinline__ void stmatrix_transposed(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Loads and stores by shared-window address. ldmatrix is the way back of stmatrix: of a swizzled panel, lane l reading row
// l % 16, byte 32 k + l / 16 * 16, it gives the A fragment of 16 rows and columns 16 k .. 16 k + 15.

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ float load_shared_float(uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ uint4 load_shared_uint4(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

}  // namespace ptx
