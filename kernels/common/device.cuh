// What every kernel file shares: 16-byte vectors, warp and block reductions, amax, FP8 conversion, GELU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "kernels/common/dtype.h"
#include "kernels/common/quant_slot.h"
#include "kernels/common/step_state.h"

using bf16 = __nv_bfloat16;

constexpr int kWarpSize = 32;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------
// Vectors: N elements moved by one load or store of sizeof(T)*N bytes (16 for full speed)

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    T v[N];
    __device__ T& operator[](int i) { return v[i]; }
    __device__ const T& operator[](int i) const { return v[i]; }
};
using Bf16x8 = Vec<bf16, 8>;
using F32x4 = Vec<float, 4>;

template <class V, class T>
__device__ __forceinline__ V load(const T* p) {
    if constexpr (sizeof(V) == 16) {  // through int4: the compiler may split a struct's copy into 4-byte accesses
        const int4 raw = *reinterpret_cast<const int4*>(p);
        return reinterpret_cast<const V&>(raw);
    } else {
        return *reinterpret_cast<const V*>(p);
    }
}
template <class V, class T>
__device__ __forceinline__ void store(T* p, const V& v) {
    if constexpr (sizeof(V) == 16) *reinterpret_cast<int4*>(p) = reinterpret_cast<const int4&>(v);
    else *reinterpret_cast<V*>(p) = v;
}

// Streaming versions (evict-first): for data that is not read again while it could still be in L2.
template <class V, class T>
__device__ __forceinline__ V load_streaming(const T* p) {
    static_assert(sizeof(V) == 16);
    const int4 raw = __ldcs(reinterpret_cast<const int4*>(p));
    return reinterpret_cast<const V&>(raw);
}
template <class V, class T>
__device__ __forceinline__ void store_streaming(T* p, const V& v) {
    static_assert(sizeof(V) == 16);
    __stcs(reinterpret_cast<int4*>(p), reinterpret_cast<const int4&>(v));
}

// ---------------------------------------------------------------------------------------------------------------------
// Reductions. The order of additions is fixed, so results are deterministic.

__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

// Sum over a block of whole warps; every thread gets the result. `scratch` is 32 floats of shared memory that may be
// reused by the next call only after a __syncthreads() of the caller's own or of another block_sum on other scratch.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

// ---------------------------------------------------------------------------------------------------------------------
// amax, as the bits of |x| (see QuantSlot: integer maximum keeps inf and NaN)

__device__ __forceinline__ uint32_t amax_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ uint32_t amax_bits(bf16 x) { return (uint32_t(__bfloat16_as_ushort(x)) & 0x7fffu) << 16; }

// Pairs of BF16 in one register, the first in the low half.
__device__ __forceinline__ float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

// Maximum of |y| of both halves of a pair, kept as two 16-bit patterns; the order of patterns is that of amax_bits.
__device__ __forceinline__ uint32_t pair_amax(uint32_t most, uint32_t pair) {
    return __vmaxu2(most, pair & 0x7fff7fffu);
}
__device__ __forceinline__ uint32_t amax_bits_of_pair(uint32_t most) { return max(most << 16, most & 0xffff0000u); }

// One atomic per block. Every thread of the block must call it; works for any block of whole warps up to 1024 threads.
__device__ __forceinline__ void block_amax_to_slot(uint32_t bits, QuantSlot* slot) {
    __shared__ uint32_t block_max;
    if (threadIdx.x == 0) block_max = 0;
    __syncthreads();
    bits = __reduce_max_sync(~0u, bits);
    if (threadIdx.x % kWarpSize == 0) atomicMax(&block_max, bits);
    __syncthreads();
    if (threadIdx.x == 0 && block_max != 0) atomicMax(&slot->amax_bits, block_max);
}

// ---------------------------------------------------------------------------------------------------------------------
// FP8: scale rule and cast, exactly as trainer/reference/quantizer.h states them

template <Dtype F>
__device__ __forceinline__ float scale_from_amax(uint32_t bits) {
    const double amax = double(__uint_as_float(bits));
    const double clamped = amax < kAmaxEpsilon ? kAmaxEpsilon : amax;  // a NaN stays NaN: the comparison is false
    return float(double(fp8_max(F)) / clamped);
}

template <Dtype F>
constexpr __nv_fp8_interpretation_t kFp8Kind = F == Dtype::e4m3 ? __NV_E4M3 : __NV_E5M2;

// x * scale in float, saturated to ±fp8_max, round to nearest even. NaN gives kFp8Nan.
template <Dtype F>
__device__ __forceinline__ uint8_t cast_fp8(float x, float scale) {
    return __nv_cvt_float_to_fp8(x * scale, __NV_SATFINITE, kFp8Kind<F>);
}
template <Dtype F>
__device__ __forceinline__ uint16_t cast_fp8x2(float x0, float x1, float scale) {  // x0 in the low byte
    return __nv_cvt_float2_to_fp8x2(make_float2(x0 * scale, x1 * scale), __NV_SATFINITE, kFp8Kind<F>);
}

// ---------------------------------------------------------------------------------------------------------------------
// GELU, tanh form (GPT-2's). Here because activation and the fused quantizers must give the same bits.
//
// With 1 + tanh(u) = 2 sigmoid(2u):  gelu(x) = x s,  s = sigmoid(c x (1 + 0.044715 x^2)),  c = 2 sqrt(2/pi)
//                                    gelu'(x) = s (1 + (1 - s) c x (1 + 3 * 0.044715 x^2))
// One exponential and one reciprocal, and no cancellation in the negative tail, unlike 1 + tanh(u).

constexpr float kGeluC = 1.5957691216057308f;
constexpr float kGeluCubic = 0.044715f;

// 2^x and 1/x of the special-function unit (relative error below 2^-22), denormals flushed.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float gelu_sigmoid(float x) {
    constexpr float k = kGeluC * 1.4426950408889634f;  // log2(e)
    return reciprocal_approx(1.0f + exp2_approx(x * fmaf(x * x, -k * kGeluCubic, -k)));
}
__device__ __forceinline__ float gelu(float x) { return x * gelu_sigmoid(x); }
// NaN for |x| > 7e12, where the cubic overflows.
__device__ __forceinline__ float gelu_derivative(float x) {
    const float s = gelu_sigmoid(x);
    return s * fmaf(x * fmaf(x * x, 3 * kGeluCubic * kGeluC, kGeluC), 1.0f - s, 1.0f);
}
