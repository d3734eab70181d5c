// FP8 codes of pieces of matrices, whose scales are known, and those scales from amaxes: what a rank casts of its shard of the
// FP32 master. 5 bytes an element move (4 read, 1 written), and the kernel is bound by that.
//
// A piece is contiguous, so rows and columns do not matter: a block owns 8192 elements of one piece. A thread has eight 16-byte
// loads in flight, one every 4 KB, and stores four codes at a time: a warp reads four whole lines and fills one.
#include "kernels/common/cuda_check.h"
#include "kernels/common/mark.h"
#include "kernels/quantize.h"
#include "kernels/quantize/block_item.cuh"
#include "kernels/quantize/tile.cuh"

namespace {

using namespace quantize_tile;

constexpr int kVector = 4;                                  // elements of a load
constexpr int kLoads = 8;                                   // in flight a thread
constexpr int kPieceTile = kThreads * kVector * kLoads;     // elements of a block

template <Dtype F>
__device__ __forceinline__ void cast_vectors(const float* from, uint8_t* to, int count, float scale) {
    F32x4 value[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int i = (k * kThreads + int(threadIdx.x)) * kVector;
        value[k] = i + kVector <= count ? load<F32x4>(from + i) : F32x4{};
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int i = (k * kThreads + int(threadIdx.x)) * kVector;
        const uint32_t codes = cast_fp8x2<F>(value[k][0], value[k][1], scale) | uint32_t(cast_fp8x2<F>(value[k][2], value[k][3], scale)) << 16;
        if (i + kVector <= count) store(to + i, Vec<uint32_t, 1>{{codes}});
    }
    const int tail = count / kVector * kVector + int(threadIdx.x);
    if (tail < count) to[tail] = cast_fp8<F>(from[tail], scale);
}

template <Dtype F>
__global__ void __launch_bounds__(kThreads, 4)
    quantize_pieces_kernel(const QuantizePiece* __restrict__ pieces, int count, const uint32_t* skip) {
    if (skip != nullptr && *skip != 0) return;
    const QuantizePiece p = block_item<kThreads>(pieces, count);
    const float scale = p.slot->scale;
    const int64_t first = (int64_t(blockIdx.x) - p.first_tile) * kPieceTile;
    const int left = int(min(p.count - first, int64_t(kPieceTile)));
    const float* from = p.master + first;
    uint8_t* to = p.q + first;
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && reinterpret_cast<uintptr_t>(to) % kVector == 0)
        cast_vectors<F>(from, to, left, scale);
    else
        for (int i = threadIdx.x; i < left; i += kThreads) to[i] = cast_fp8<F>(from[i], scale);
}

template <Dtype F>
__global__ void __launch_bounds__(kThreads)
    quantize_scales_kernel(QuantSlot* slots, int count, const uint32_t* skip, uint32_t* nonfinite) {
    if (skip != nullptr && *skip != 0) return;
    const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
    if (i >= count) return;
    constexpr uint32_t kInfinity = 0x7f800000u;
    const uint32_t amax = slots[i].amax_bits;
    const float scale = scale_from_amax<F>(amax);
    slots[i].scale = scale;
    slots[i].inv_scale = 1.0f / scale;
    if (amax >= kInfinity && nonfinite != nullptr) *nonfinite = 1;
}

}  // namespace

int64_t quantize_pieces_plan(QuantizePiece* pieces, int count) {
    int64_t tiles = 0;
    for (int i = 0; i < count; ++i) {
        REQUIRE(pieces[i].count > 0, "quantize_pieces: piece %d: count=%lld must be positive", i, static_cast<long long>(pieces[i].count));
        REQUIRE(reinterpret_cast<uintptr_t>(pieces[i].master) % 4 == 0, "quantize_pieces: piece %d: master=%p must be 4-byte aligned", i,
                static_cast<const void*>(pieces[i].master));
        pieces[i].first_tile = tiles;
        tiles += ceil_div(pieces[i].count, kPieceTile);
    }
    return tiles;
}

void quantize_pieces(const QuantizePiece* device_pieces, int count, int64_t tiles, Dtype format, const uint32_t* skip, cudaStream_t stream) {
    const Mark mark("quantize_pieces", {.bytes = 5.0 * double(tiles) * kPieceTile});  // the last tile of a piece counts as full
    REQUIRE(is_fp8(format), "quantize_pieces: format %s must be e4m3 or e5m2", name_of(format));
    REQUIRE(count >= 0 && tiles >= count && tiles < (int64_t(1) << 31), "quantize_pieces: %d pieces of %lld tiles", count,
            static_cast<long long>(tiles));
    if (count == 0) return;
    const auto blocks = static_cast<unsigned>(tiles);
    if (format == Dtype::e4m3) quantize_pieces_kernel<Dtype::e4m3><<<blocks, kThreads, 0, stream>>>(device_pieces, count, skip);
    else quantize_pieces_kernel<Dtype::e5m2><<<blocks, kThreads, 0, stream>>>(device_pieces, count, skip);
    CUDA_CHECK_LAUNCH();
}

void quantize_scales(QuantSlot* slots, int count, Dtype format, const uint32_t* skip, uint32_t* nonfinite, cudaStream_t stream) {
    const Mark mark("quantize_scales");
    REQUIRE(is_fp8(format), "quantize_scales: format %s must be e4m3 or e5m2", name_of(format));
    REQUIRE(count >= 0, "quantize_scales: count=%d must not be negative", count);
    if (count == 0) return;
    const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads));
    if (format == Dtype::e4m3) quantize_scales_kernel<Dtype::e4m3><<<blocks, kThreads, 0, stream>>>(slots, count, skip, nonfinite);
    else quantize_scales_kernel<Dtype::e5m2><<<blocks, kThreads, 0, stream>>>(slots, count, skip, nonfinite);
    CUDA_CHECK_LAUNCH();
}
