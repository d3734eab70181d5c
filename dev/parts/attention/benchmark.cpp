// FLOPs count the causal half once; the backward as 5 matmuls to the forward's 2.
#include "dev/parts/attention/benchmark.h"

#include <algorithm>

#include "dev/parts/attention/arrays.h"
#include "kernels/common/peak.h"

namespace {

std::vector<__nv_bfloat16> random_bf16(size_t n) {  // a random period, repeated: fast for gigabytes
    const std::vector<__nv_bfloat16> period = to_bf16(random_normal(std::min(n, size_t(4194301))));
    std::vector<__nv_bfloat16> x(n);
    for (size_t i = 0; i < n; i += period.size())
        std::copy_n(period.begin(), std::min(period.size(), n - i), x.begin() + std::ptrdiff_t(i));
    return x;
}

struct Timed {
    double forward_us = 0, backward_us = 0;  // 0: cannot run here
};

Timed time_backend(Report& report, AttentionArrays& arrays, AttentionBackend backend, double peak_tflops, const Timed& cudnn) {
    const AttentionShape& s = arrays.shape;
    const AttentionOptions options{.backend = backend};
    const double forward_flops = 2.0 * s.B * s.H * s.T * s.T * s.head_dim;
    const auto bench = [&](const char* direction, double flops, double versus_us, const auto& run) {
        return report.bench({.name = message("attention.%s [%s]", direction, name_of(backend)), .shape = describe(s), .flops = flops,
                             .peak_tflops = peak_tflops, .calls = 10, .samples = 21, .versus = "cudnn", .versus_us = versus_us}, run);
    };
    Timed timed;
    if (forward_obstacle(s, options).empty()) {
        const AttentionForward call = arrays.forward_call(options);
        timed.forward_us = bench("forward", forward_flops, cudnn.forward_us, [&](int, cudaStream_t stream) { attention_forward(call, stream); });
    }
    if (backward_obstacle(s, options).empty()) {
        const AttentionBackward call = arrays.backward_call(options);
        timed.backward_us = bench("backward", 2.5 * forward_flops, cudnn.backward_us, [&](int, cudaStream_t stream) { attention_backward(call, stream); });
    }
    return timed;
}

}  // namespace

void benchmark_attention(Report& report) {
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    const double peak_tflops = peak_of(properties.name).bf16_tflops;
    const AttentionShape shapes[] = {
        {.B = 32, .T = 1024, .H = 12, .KV = 12, .head_dim = 64}, {.B = 64, .T = 1024, .H = 12, .KV = 12, .head_dim = 64},
        {.B = 32, .T = 1024, .H = 14, .KV = 2, .head_dim = 64},  {.B = 16, .T = 1024, .H = 25, .KV = 25, .head_dim = 64},
        {.B = 32, .T = 1024, .H = 12, .KV = 2, .head_dim = 128}, {.B = 8, .T = 4096, .H = 32, .KV = 8, .head_dim = 128},
        {.B = 4, .T = 8192, .H = 32, .KV = 8, .head_dim = 128},  {.B = 4, .T = 8192, .H = 32, .KV = 8, .head_dim = 64},
        {.B = 2, .T = 16384, .H = 16, .KV = 16, .head_dim = 128},
    };
    std::string table;
    for (const AttentionShape& s : shapes) {
        AttentionArrays arrays(s, random_bf16(elements(s, packed_heads(s))), random_bf16(elements(s, s.H)));
        const double flops = 2.0 * s.B * s.H * s.T * s.T * s.head_dim;
        const auto tflops = [&](double us, double factor) { return us > 0 ? factor * flops / us * 1e-6 : NAN; };
        const Timed cudnn = time_backend(report, arrays, AttentionBackend::cudnn, peak_tflops, {});
        const Timed hopper = time_backend(report, arrays, AttentionBackend::hopper, peak_tflops, cudnn);
        // Half as fast or less: beyond T = 4096 it would take most of the time of this program
        const Timed mma = s.T <= 4096 ? time_backend(report, arrays, AttentionBackend::mma, peak_tflops, cudnn) : Timed{};
        table += message("%-24s | %5.0f %5.0f %5.0f  %5.2f | %5.0f %5.0f %5.0f  %5.2f\n", describe(s).c_str(), tflops(cudnn.forward_us, 1), tflops(mma.forward_us, 1),
                         tflops(hopper.forward_us, 1), cudnn.forward_us / hopper.forward_us, tflops(cudnn.backward_us, 2.5), tflops(mma.backward_us, 2.5),
                         tflops(hopper.backward_us, 2.5), cudnn.backward_us / hopper.backward_us);
    }
    std::printf("\nTFLOP/s, causal half     | forward                   | backward\n"
                "                         | cudnn   mma hopper ratio  | cudnn   mma hopper ratio\n%s\n", table.c_str());
}
