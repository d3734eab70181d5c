// amax of an array that a library wrote. n elements are read once, 2n bytes; bound by that.
#include <algorithm>

#include "kernels/attention/backends.h"
#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/sm_count.h"

namespace {

constexpr int kThreads = 256, kBlocksPerSm = 8;

__global__ __launch_bounds__(kThreads) void attention_amax_kernel(const bf16* x, int64_t vectors, QuantSlot* slot) {
    using Pairs = Vec<uint32_t, 4>;  // 8 BF16
    uint32_t most = 0;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < vectors; i += int64_t(gridDim.x) * kThreads) {
        const auto pairs = load<Pairs>(x + i * 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) most = pair_amax(most, pairs[j]);
    }
    block_amax_to_slot(amax_bits_of_pair(most), slot);
}

}  // namespace

void attention_amax(const bf16* x, int64_t n, QuantSlot* slot, cudaStream_t stream) {
    REQUIRE(n > 0 && n % 8 == 0, "attention_amax: n=%lld must be a positive multiple of 8", (long long)n);
    const int64_t blocks = std::min(ceil_div(n / 8, kThreads), int64_t(sm_count()) * kBlocksPerSm);
    attention_amax_kernel<<<unsigned(blocks), kThreads, 0, stream>>>(x, n / 8, slot);
    CUDA_CHECK_LAUNCH();
}
