#include "trainer/run/verify.h"

#include <cuda_runtime.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/cuda_check.h"
#include "kernels/gemm.h"
#include "trainer/gpu_info.h"
#include "trainer/metrics.h"
#include "trainer/reference/matmul.h"
#include "trainer/reference/quantizer.h"
#include "trainer/run/start.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// One GEMM of each kind against a sum in double over the same operands

struct Operand {
    std::vector<float> values;         // as multiplied, rows x K
    std::vector<unsigned char> bytes;  // as stored
    float scale = 1;                   // of the dequantization
};

Operand make_operand(std::mt19937& random, int rows, int K, Dtype format) {
    std::normal_distribution<float> normal;
    Operand o;
    o.values.resize(size_t(rows) * size_t(K));
    for (float& x : o.values) x = normal(random);
    if (is_fp8(format)) {
        const float scale = scale_from_amax(amax_of(o.values), format);
        o.scale = 1.0f / scale;
        for (float& x : o.values) {
            o.bytes.push_back(encode_fp8(x * scale, format));
            x = decode_fp8(o.bytes.back(), format) * o.scale;
        }
        return o;
    }
    o.bytes.resize(o.values.size() * sizeof(uint16_t));
    for (size_t i = 0; i < o.values.size(); ++i) {
        const uint16_t bits = bf16_bits(o.values[i]);
        std::memcpy(&o.bytes[i * sizeof bits], &bits, sizeof bits);
        o.values[i] = bf16_value(bits);
    }
    return o;
}

class DeviceCopy {
  public:
    DeviceCopy(const void* from, size_t bytes) {
        CUDA_CHECK(cudaMalloc(&memory_, bytes));
        if (from) CUDA_CHECK(cudaMemcpy(memory_, from, bytes, cudaMemcpyHostToDevice));
    }
    ~DeviceCopy() { cudaFree(memory_); }
    DeviceCopy(const DeviceCopy&) = delete;
    DeviceCopy& operator=(const DeviceCopy&) = delete;
    template <class T>
    T* as() const {
        return static_cast<T*>(memory_);
    }

  private:
    void* memory_ = nullptr;
};

std::vector<float> multiply_on_gpu(const GemmShape& shape, const Operand& a, const Operand& b) {
    const DeviceCopy a_bytes(a.bytes.data(), a.bytes.size()), b_bytes(b.bytes.data(), b.bytes.size());
    const DeviceCopy a_scale(&a.scale, sizeof(float)), b_scale(&b.scale, sizeof(float)), d(nullptr, size_t(shape.M) * size_t(shape.N) * sizeof(float));
    Gemm gemm({.cache_file = "", .autotune = false});
    gemm.plan(shape);
    gemm.run(shape, {.a = a_bytes.as<void>(), .b = b_bytes.as<void>(), .d = d.as<void>(), .a_scale = is_fp8(shape.a) ? a_scale.as<float>() : nullptr,
                     .b_scale = is_fp8(shape.b) ? b_scale.as<float>() : nullptr}, nullptr);
    std::vector<float> result(size_t(shape.M) * size_t(shape.N));
    CUDA_CHECK(cudaMemcpy(result.data(), d.as<void>(), result.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return result;
}

std::vector<float> multiply_on_host(const GemmShape& shape, const Operand& a, const Operand& b) {
    std::vector<float> result(size_t(shape.M) * size_t(shape.N));
    reference::matmul({.a = a.values.data(), .b = b.values.data(), .b_transposed = true, .d = result.data(), .M = shape.M, .N = shape.N, .K = shape.K});
    return result;
}

// Products of random numbers of deviation about 1, summed K times: deviation sqrt(K). An FP8 tensor core with the short
// accumulator keeps 14 bits of a partial sum, FP32 sums lose nothing that shows here; a wrong format, scale, layout or
// operand is wrong by the whole deviation.
void check_gemm(const char* name, const GemmFormats& formats, bool gpu) {
    const GemmShape shape{.M = 128, .N = 256, .K = 512, .a = formats.a.dtype, .b = formats.b.dtype, .d = Dtype::f32, .fast_accumulation = formats.fast_accumulation};
    std::mt19937 random(7);
    const Operand a = make_operand(random, shape.M, shape.K, shape.a), b = make_operand(random, shape.N, shape.K, shape.b);
    const std::vector<float> result = gpu ? multiply_on_gpu(shape, a, b) : multiply_on_host(shape, a, b);
    double worst = 0;
    for (int i = 0; i < shape.M; ++i)
        for (int j = 0; j < shape.N; ++j) {
            double sum = 0;
            for (int k = 0; k < shape.K; ++k) sum += double(a.values[size_t(i) * shape.K + k]) * double(b.values[size_t(j) * shape.K + k]);
            const double error = std::abs(double(result[size_t(i) * shape.N + j]) - sum) / std::sqrt(double(shape.K));
            worst = std::isnan(error) || error > worst ? error : worst;
        }
    const double limit = formats.fast_accumulation ? 2e-2 : 2e-3;
    std::printf("gemm    %-12s %s * %s%s: worst error %.1e of the deviation, at most %.0e\n", name, name_of(shape.a), name_of(shape.b),
                shape.fast_accumulation ? ", fast accumulation" : "", worst, limit);
    REQUIRE(worst <= limit, "--verify: the %s product is wrong: error %.3g of its deviation, must be at most %.0e", name, worst, limit);
}

// ---------------------------------------------------------------------------------------------------------------------
// A few steps of the smallest model

TrainState few_steps(Config config, bool graphs, std::vector<float>& losses) {
    config.model = "tiny";
    config.n_layers = config.dim = config.n_heads = config.ffn_dim = config.vocab_size = config.seq_len = 0;
    config.micro_batch = 4;
    config.global_batch_tokens = 2 * config.micro_batch_tokens();
    config.no_graph = !graphs;
    const ModelSpec model = config.model_spec();
    const std::unique_ptr<Engine> engine = make_engine(config);
    engine->load(initial_state(make_parameters(model), model, 1));
    std::vector<int> tokens(size_t(config.global_batch_tokens)), next(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = int(i % 37), next[i] = int((i + 1) % 37);
    for (int64_t step = 0; step < 4; ++step) {  // the first captures, the others replay
        engine->enqueue_step({.step = step, .learning_rate = 1e-2f, .inverse_valid_tokens = 1.0f / float(tokens.size())}, tokens, next);
        losses.push_back(engine->collect().loss_sum);
    }
    TrainState state;
    engine->save(state);
    return state;
}

void check_steps(const Config& config, bool gpu) {
    std::vector<float> losses, again;
    const TrainState a = few_steps(config, gpu, losses), b = few_steps(config, false, again);
    const bool equal = losses == again && a.params == b.params && a.m == b.m && a.v == b.v;
    std::printf("%s four steps of the tiny model: loss %.3f to %.3f, %s\n", gpu ? "graph  " : "steps  ", double(losses.front()), double(losses.back()),
                gpu ? "replayed graphs and single launches give equal bits" : "twice the same bits (no graphs on this device)");
    REQUIRE(equal, "--verify: the same four steps %s gave different bits", gpu ? "as graphs and as single launches" : "twice");
    REQUIRE(std::abs(losses.front() - std::log(257.0f)) < 0.5f && losses.back() < losses.front() - 0.1f,
            "--verify: four steps of the tiny model do not learn: loss %.3f to %.3f", double(losses.front()), double(losses.back()));
}

}  // namespace

void verify(const Config& config) {
    const auto start = std::chrono::steady_clock::now();
    const std::string obstacle = gpu_obstacle();
    REQUIRE(config.device != "gpu" || obstacle.empty(), "--verify: --device gpu: %s", obstacle.c_str());
    const bool gpu = config.device != "cpu" && obstacle.empty();
    Config device = config;
    device.device = gpu ? "gpu" : "cpu";
    if (device.micro_batch == 0) device.micro_batch = 1;
    std::printf("device  %s%s%s\n", gpu ? gpu_info(0).name.c_str() : "CPU reference", gpu || obstacle.empty() ? "" : ": ", gpu ? "" : obstacle.c_str());
    for (const auto& [name, version] : library_versions()) std::printf("library %s %s\n", name.c_str(), version.c_str());

    const Recipe& recipe = find_recipe(config.recipe);
    int fp8 = 0, all = 0;
    const EnginePlan plan = plan_gpu_engine(engine_options(device));
    for (const LinearRow& row : plan.linears) all += row.count, fp8 += row.precision == "FP8" ? row.count : 0;
    std::printf("linears %d of %d in FP8 (%s, recipe %s)\n", fp8, all, config.model.c_str(), config.recipe.c_str());

    const std::pair<const char*, GemmFormats> kinds[] = {{"output", recipe.output}, {"grad_input", recipe.grad_input}, {"grad_weight", recipe.grad_weight},
                                                         {"head", find_recipe("bf16").output}};
    for (const auto& [name, formats] : kinds)
        if (formats.a.dtype != Dtype::f32) check_gemm(name, formats, gpu);
    check_steps(device, gpu);
    std::printf("verify: ok after %s\n", format_duration(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()).c_str());
}
