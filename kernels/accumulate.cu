// Element by element over flat buffers, bound by memory: accumulate moves 12 bytes an element of one part (10 with BF16, 8 and 6
// where it overwrites) and 4 (2) for each further part, rounding 6. A thread has four vectors of four elements in flight; a block owns 4096 elements.
#include "kernels/accumulate.h"

#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/mark.h"

namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;
constexpr int kLoads = 4;  // vectors of each array in flight a thread
constexpr int kBlockElements = kThreads * kVector * kLoads;

template <class T>
using Vector = Vec<T, kVector>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T, bool kAdd>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(float* __restrict__ sum, const T* __restrict__ add, int64_t n, int parts, int64_t stride) {
    const int64_t first = int64_t(blockIdx.x) * kBlockElements + threadIdx.x * kVector;
    const auto load_part = [&](Vector<T> (&more)[kLoads], const T* from) {
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int64_t i = first + k * kThreads * kVector;
            more[k] = i + kVector <= n ? load<Vector<T>>(from + i) : Vector<T>{};
        }
    };
    Vector<T> more[kLoads];
    F32x4 total[kLoads];
    load_part(more, add);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int64_t i = first + k * kThreads * kVector;
        total[k] = kAdd && i + kVector <= n ? load<F32x4>(sum + i) : F32x4{};
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
#pragma unroll
        for (int j = 0; j < kVector; ++j) total[k][j] = kAdd ? total[k][j] + to_float(more[k][j]) : to_float(more[k][j]);
    for (int part = 1; part < parts; ++part) {
        load_part(more, add + part * stride);
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
#pragma unroll
            for (int j = 0; j < kVector; ++j) total[k][j] += to_float(more[k][j]);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int64_t i = first + k * kThreads * kVector;
        if (i + kVector <= n) store(sum + i, total[k]);
    }
    const int64_t tail = n / kVector * kVector + threadIdx.x;
    if (blockIdx.x != gridDim.x - 1 || tail >= n) return;
    float value = kAdd ? sum[tail] + to_float(add[tail]) : to_float(add[tail]);
    for (int part = 1; part < parts; ++part) value += to_float(add[part * stride + tail]);
    sum[tail] = value;
}

__global__ void __launch_bounds__(kThreads) round_to_bf16_kernel(const float* __restrict__ x, bf16* __restrict__ y, int64_t n) {
    const int64_t first = int64_t(blockIdx.x) * kBlockElements + threadIdx.x * kVector;
    F32x4 value[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int64_t i = first + k * kThreads * kVector;
        value[k] = i + kVector <= n ? load<F32x4>(x + i) : F32x4{};
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int64_t i = first + k * kThreads * kVector;
        if (i + kVector <= n) store(y + i, Vec<uint32_t, 2>{{pack(value[k][0], value[k][1]), pack(value[k][2], value[k][3])}});
    }
    const int64_t tail = n / kVector * kVector + threadIdx.x;
    if (blockIdx.x == gridDim.x - 1 && tail < n) y[tail] = __float2bfloat16_rn(x[tail]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

unsigned blocks_for(const char* name, int64_t n) {
    REQUIRE(n >= 0 && ceil_div(n, kBlockElements) < (int64_t(1) << 31), "%s: n=%lld must not be negative and at most %lld", name,
            static_cast<long long>(n), (1LL << 31) * kBlockElements - kBlockElements);
    return static_cast<unsigned>(ceil_div(n, kBlockElements));
}

template <class T>
void launch_accumulate(const Accumulate& p, cudaStream_t stream) {
    const unsigned blocks = blocks_for("accumulate", p.n);
    if (blocks == 0) return;
    const T* add = static_cast<const T*>(p.add);
    if (p.add_to_sum) accumulate_kernel<T, true><<<blocks, kThreads, 0, stream>>>(p.sum, add, p.n, p.parts, p.stride);
    else accumulate_kernel<T, false><<<blocks, kThreads, 0, stream>>>(p.sum, add, p.n, p.parts, p.stride);
    CUDA_CHECK_LAUNCH();
}

}  // namespace

void accumulate(const Accumulate& p, cudaStream_t stream) {
    const Mark mark("accumulate", {.bytes = double(p.n) * (4.0 + 4.0 * p.add_to_sum + double(p.parts) * double(bytes_of(p.dtype)))});
    REQUIRE(p.dtype == Dtype::f32 || p.dtype == Dtype::bf16, "accumulate: dtype %s must be f32 or bf16", name_of(p.dtype));
    REQUIRE(aligned(p.sum) && aligned(p.add), "accumulate: sum=%p, add=%p must be 16-byte aligned", static_cast<const void*>(p.sum), p.add);
    REQUIRE(p.parts >= 1 && (p.parts == 1 || (p.stride >= p.n && p.stride * int64_t(bytes_of(p.dtype)) % 16 == 0)),
            "accumulate: parts=%d, stride=%lld: parts must be positive, and more than one at least n=%lld elements and a multiple of 16 bytes apart", p.parts,
            static_cast<long long>(p.stride), static_cast<long long>(p.n));
    if (p.dtype == Dtype::f32) launch_accumulate<float>(p, stream);
    else launch_accumulate<bf16>(p, stream);
}

void round_to_bf16(const float* x, __nv_bfloat16* y, int64_t n, cudaStream_t stream) {
    const Mark mark("round_to_bf16", {.bytes = 6.0 * double(n)});
    REQUIRE(aligned(x) && aligned(y), "round_to_bf16: x=%p, y=%p must be 16-byte aligned", static_cast<const void*>(x),
            static_cast<const void*>(y));
    const unsigned blocks = blocks_for("round_to_bf16", n);
    if (blocks == 0) return;
    round_to_bf16_kernel<<<blocks, kThreads, 0, stream>>>(x, y, n);
    CUDA_CHECK_LAUNCH();
}
