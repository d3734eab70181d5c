#include "kernels/gemm/tuning_bench.h"

#include "kernels/common/device.cuh"

namespace gemm_detail {
namespace {

// n values around zero in bell shape, the largest at the format's limit (1 for BF16), as quantized data has it.
template <Dtype F>
__global__ void fill_random(void* out, size_t n, uint32_t seed) {
    const size_t stride = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
        uint32_t hash = uint32_t(i) * 0x9e3779b9u + seed * 0x7f4a7c15u;
        hash = (hash ^ (hash >> 15)) * 0x85ebca6bu;
        hash ^= hash >> 13;
        const float sum_of_bytes = float(__dp4a(hash, 0x01010101u, 0u));
        const float x = sum_of_bytes * (2.0f / (4 * 255)) - 1.0f;
        if constexpr (F == Dtype::bf16) static_cast<bf16*>(out)[i] = __float2bfloat16(x);
        else static_cast<uint8_t*>(out)[i] = cast_fp8<F>(x, fp8_max(F));
    }
}

void fill_random(Dtype type, void* out, size_t n, uint32_t seed, cudaStream_t stream) {
    constexpr int kBlock = 256, kGrid = 2048;
    if (type == Dtype::bf16) fill_random<Dtype::bf16><<<kGrid, kBlock, 0, stream>>>(out, n, seed);
    else if (type == Dtype::e4m3) fill_random<Dtype::e4m3><<<kGrid, kBlock, 0, stream>>>(out, n, seed);
    else fill_random<Dtype::e5m2><<<kGrid, kBlock, 0, stream>>>(out, n, seed);
    CUDA_CHECK_LAUNCH();
}

Owned<cudaStream_t> make_stream() {
    cudaStream_t stream = nullptr;
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return Owned<cudaStream_t>(stream);
}
Owned<cudaEvent_t> make_event() {
    cudaEvent_t event = nullptr;
    CUDA_CHECK(cudaEventCreate(&event));
    return Owned<cudaEvent_t>(event);
}

}  // namespace

bool TuningBench::allocate(const GemmShape& s, const float* one) {
    const auto room_for = [](int rows, int cols, Dtype type) {
        return size_t(ceil_div(int64_t(rows) * cols * int64_t(bytes_of(type)), 256)) * 256;
    };
    const size_t a_bytes = room_for(s.M, s.K, s.a), b_bytes = room_for(s.N, s.K, s.b);
    const size_t d_bytes = room_for(s.M, s.N, s.d), bias_bytes = room_for(1, s.N, Dtype::bf16);
    void* raw = nullptr;
    if (cudaMalloc(&raw, a_bytes + b_bytes + d_bytes + bias_bytes) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    memory_.reset(raw);
    stream_ = make_stream();
    for (auto& event : events_) event = make_event();

    char* const a = static_cast<char*>(raw);
    char *const b = a + a_bytes, *const d = b + b_bytes, *const bias = d + d_bytes;
    fill_random(s.a, a, size_t(s.M) * s.K, 1, stream_.get());
    fill_random(s.b, b, size_t(s.N) * s.K, 2, stream_.get());
    fill_random(Dtype::bf16, bias, size_t(s.N), 3, stream_.get());
    CUDA_CHECK(cudaMemsetAsync(d, 0, d_bytes, stream_.get()));
    operands_ = {.a = a,
                 .b = b,
                 .d = d,
                 .a_scale = is_fp8(s.a) ? one : nullptr,
                 .b_scale = is_fp8(s.b) ? one : nullptr,
                 .bias = s.bias ? reinterpret_cast<const bf16*>(bias) : nullptr};
    return true;
}

std::optional<float> TuningBench::time_us(int calls, const Enqueue& enqueue) {
    CUDA_CHECK(cudaEventRecord(events_[0].get(), stream_.get()));
    for (int i = 0; i < calls; i++)
        if (enqueue(operands_, stream_.get()) != CUBLAS_STATUS_SUCCESS) return std::nullopt;
    CUDA_CHECK(cudaEventRecord(events_[1].get(), stream_.get()));
    CUDA_CHECK(cudaEventSynchronize(events_[1].get()));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, events_[0].get(), events_[1].get()));
    return ms * 1000 / calls;
}

}  // namespace gemm_detail
