// amax of a whole tensor: one pass, 2 or 4 bytes an element read. A thread has four 16-byte loads in flight and one atomic a
// block raises the slot.
#include <algorithm>

#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/sm_count.h"
#include "kernels/quantize.h"

namespace {

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

template <class T>
void amax(const T* x, int64_t n, QuantSlot* slot, cudaStream_t stream) {
    REQUIRE(n >= 0, "amax: n=%lld must not be negative", static_cast<long long>(n));
    REQUIRE(reinterpret_cast<uintptr_t>(x) % 16 == 0, "amax: x=%p must be 16-byte aligned", static_cast<const void*>(x));
    if (n == 0) return;
    constexpr int kBlocksPerMultiprocessor = 8;  // 2048 threads
    const int64_t wanted = ceil_div(n, int64_t(kAmaxThreads) * kAmaxLoads * (16 / sizeof(T)));
    const int64_t blocks = std::min<int64_t>(wanted, sm_count() * kBlocksPerMultiprocessor);
    amax_kernel<<<static_cast<unsigned>(blocks), kAmaxThreads, 0, stream>>>(x, n, slot);
    CUDA_CHECK_LAUNCH();
}

}  // namespace

void amax_bf16(const __nv_bfloat16* x, int64_t n, QuantSlot* slot, cudaStream_t stream) { amax(x, n, slot, stream); }
void amax_f32(const float* x, int64_t n, QuantSlot* slot, cudaStream_t stream) { amax(x, n, slot, stream); }
