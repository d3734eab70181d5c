// GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415; formulas in activation.h and device.cuh).
//
// Memory-bound on paper, 4 bytes an element forward and 6 backward, but at 4 TB/s an SM has only some 30 instructions a
// forward element, so the arithmetic has to overlap the loads: the grid fills the GPU once, strides over the data, and
// every thread has several independent 16-byte loads in flight.
//
// gelu_amax reads 2 bytes an element and cannot afford a GELU for each. It need not: gelu rises monotonically above
// kDecided, and below it never exceeds gelu(kDecided) in magnitude. So the largest input decides as soon as it has
// reached kDecided, and only until then are GELUs evaluated. dev/activation.cu checks both premises over every BF16.
#include "kernels/activation.h"

#include <algorithm>

#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/mark.h"
#include "kernels/common/sm_count.h"

namespace {

// 16 bytes: 8 elements as pairs, the first of a pair in the low half. Plain integers, because the compiler splits
// the load and store of a vector of __nv_bfloat162 into four.
using Bf16Pairs = Vec<uint32_t, 4>;
constexpr int kElements = 8;  // of one such vector
constexpr int kThreads = 256;

// The minimum of gelu is -0.17 (at -0.75), and gelu(0.3125) = 0.194.
constexpr float kDecided = 0.3125f;

__device__ __forceinline__ uint32_t gelu_of_pair(uint32_t h) {
    const float2 x = unpack(h);
    return pack(gelu(x.x), gelu(x.y));
}

// A thread works on UNROLL vectors a turn, kThreads apart; the grid takes contiguous pieces in turn.
template <int UNROLL>
struct Turn {
    static __device__ int64_t first() { return int64_t(blockIdx.x) * kThreads * UNROLL + threadIdx.x; }
    static __device__ int64_t stride() { return int64_t(gridDim.x) * kThreads * UNROLL; }
};

template <int UNROLL>
__device__ __forceinline__ void load_turn(Bf16Pairs (&x)[UNROLL], const bf16* data, int64_t first, int64_t vectors) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const int64_t v = first + u * kThreads;
        if (v < vectors) x[u] = load_streaming<Bf16Pairs>(data + kElements * v);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

constexpr int kUnrollForward = 4;
__global__ void __launch_bounds__(kThreads, 4)
    forward_kernel(const bf16* h, bf16* out, int64_t vectors, QuantSlot* amax) {
    uint32_t most = 0;
    for (int64_t first = Turn<kUnrollForward>::first(); first < vectors; first += Turn<kUnrollForward>::stride()) {
        Bf16Pairs x[kUnrollForward];
        load_turn(x, h, first, vectors);
#pragma unroll
        for (int u = 0; u < kUnrollForward; ++u) {
            const int64_t v = first + u * kThreads;
            if (v >= vectors) break;
            Bf16Pairs y;
            for (int i = 0; i < 4; ++i) {
                y[i] = gelu_of_pair(x[u][i]);
                most = pair_amax(most, y[i]);
            }
            store(out + kElements * v, y);
        }
    }
    if (amax) block_amax_to_slot(amax_bits_of_pair(most), amax);
}

// Largest and smallest of each half of two pairs; a NaN stays.
__device__ __forceinline__ uint32_t pair_max(uint32_t a, uint32_t b) {
    const __nv_bfloat162 larger =
        __hmax2_nan(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(larger);
}
__device__ __forceinline__ uint32_t pair_min(uint32_t a, uint32_t b) {
    const __nv_bfloat162 smaller =
        __hmin2_nan(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(smaller);
}

constexpr int kUnrollAmax = 8;
__global__ void __launch_bounds__(kThreads, 4) amax_kernel(const bf16* h, int64_t vectors, QuantSlot* amax) {
    // Zeros at the start and past the end have no effect, because gelu(0) = 0. The smallest input is there for -inf,
    // whose gelu may be a NaN.
    uint32_t largest = 0, smallest = 0, most = 0;
    bool decided = false;
    for (int64_t first = Turn<kUnrollAmax>::first(); first < vectors; first += Turn<kUnrollAmax>::stride()) {
        Bf16Pairs x[kUnrollAmax] = {};
        load_turn(x, h, first, vectors);
#pragma unroll
        for (int u = 0; u < kUnrollAmax; ++u) {
            for (int i = 0; i < 4; ++i) {
                largest = pair_max(largest, x[u][i]);
                smallest = pair_min(smallest, x[u][i]);
            }
        }
        if (decided) continue;
        const float2 both = unpack(largest);
        decided = both.x >= kDecided || both.y >= kDecided;
        if (decided) continue;
#pragma unroll
        for (int u = 0; u < kUnrollAmax; ++u)
            for (int i = 0; i < 4; ++i) most = pair_amax(most, gelu_of_pair(x[u][i]));
    }
    most = pair_amax(pair_amax(most, gelu_of_pair(largest)), gelu_of_pair(smallest));
    block_amax_to_slot(amax_bits_of_pair(most), amax);
}

constexpr int kUnrollBackward = 2;
__global__ void __launch_bounds__(kThreads, 4)
    backward_kernel(const bf16* h, const bf16* dout, bf16* dh, int64_t vectors, QuantSlot* amax) {
    uint32_t most = 0;
    for (int64_t first = Turn<kUnrollBackward>::first(); first < vectors; first += Turn<kUnrollBackward>::stride()) {
        Bf16Pairs x[kUnrollBackward], d[kUnrollBackward];
        load_turn(x, h, first, vectors);
        load_turn(d, dout, first, vectors);
#pragma unroll
        for (int u = 0; u < kUnrollBackward; ++u) {
            const int64_t v = first + u * kThreads;
            if (v >= vectors) break;
            Bf16Pairs y;
            for (int i = 0; i < 4; ++i) {
                const float2 xs = unpack(x[u][i]), ds = unpack(d[u][i]);
                y[i] = pack(ds.x * gelu_derivative(xs.x), ds.y * gelu_derivative(xs.y));
                most = pair_amax(most, y[i]);
            }
            store(dh + kElements * v, y);
        }
    }
    if (amax) block_amax_to_slot(amax_bits_of_pair(most), amax);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void require_size(const char* name, int64_t n) {
    REQUIRE(n > 0 && n % kElements == 0, "%s: n=%lld must be a positive multiple of %d", name,
            static_cast<long long>(n), kElements);
}

// As many blocks as the GPU holds at once, or fewer when there is less work.
template <class... Arguments>
int blocks_on_device(void (*kernel)(Arguments...)) {
    int blocks_per_sm = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, kThreads, 0));
    return sm_count() * blocks_per_sm;
}
unsigned grid_size(int64_t vectors, int unroll, int most_blocks) {
    return unsigned(std::min(ceil_div(vectors, int64_t(kThreads) * unroll), int64_t(most_blocks)));
}

}  // namespace

void gelu_forward(const bf16* h, bf16* out, int64_t n, QuantSlot* amax, cudaStream_t stream) {
    const Mark mark("gelu_forward", {.bytes = 4.0 * double(n)});
    require_size("gelu_forward", n);
    REQUIRE(h && out && aligned(h) && aligned(out), "gelu_forward: h and out must be non-null and 16-byte aligned");
    static const int most_blocks = blocks_on_device(forward_kernel);
    const int64_t vectors = n / kElements;
    forward_kernel<<<grid_size(vectors, kUnrollForward, most_blocks), kThreads, 0, stream>>>(h, out, vectors, amax);
    CUDA_CHECK_LAUNCH();
}

void gelu_amax(const bf16* h, int64_t n, QuantSlot* amax, cudaStream_t stream) {
    const Mark mark("gelu_amax", {.bytes = 2.0 * double(n)});
    require_size("gelu_amax", n);
    REQUIRE(h && aligned(h) && amax, "gelu_amax: h must be non-null and 16-byte aligned, amax non-null");
    static const int most_blocks = blocks_on_device(amax_kernel);
    const int64_t vectors = n / kElements;
    amax_kernel<<<grid_size(vectors, kUnrollAmax, most_blocks), kThreads, 0, stream>>>(h, vectors, amax);
    CUDA_CHECK_LAUNCH();
}

void gelu_backward(const bf16* h, const bf16* dout, bf16* dh, int64_t n, QuantSlot* amax, cudaStream_t stream) {
    const Mark mark("gelu_backward", {.bytes = 6.0 * double(n)});
    require_size("gelu_backward", n);
    REQUIRE(h && dout && dh && aligned(h) && aligned(dout) && aligned(dh),
            "gelu_backward: h, dout and dh must be non-null and 16-byte aligned");
    static const int most_blocks = blocks_on_device(backward_kernel);
    const int64_t vectors = n / kElements;
    backward_kernel<<<grid_size(vectors, kUnrollBackward, most_blocks), kThreads, 0, stream>>>(h, dout, dh, vectors,
                                                                                               amax);
    CUDA_CHECK_LAUNCH();
}
