#include "trainer/reference/adamw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "trainer/reference/parallel.h"

namespace reference {
namespace {
constexpr int64_t kBlock = 16384;  // elements of a range
}

double sum_of_squares(const float* x, int64_t n) {
    std::vector<double> partials(size_t((n + kBlock - 1) / kBlock));
    parallel_ranges(n, kBlock, [&](int64_t begin, int64_t end) {
        double sum = 0;
        for (int64_t i = begin; i < end; ++i) sum += double(x[i]) * double(x[i]);
        partials[size_t(begin / kBlock)] = sum;
    });
    double sum = 0;
    for (const double partial : partials) sum += partial;
    return sum;
}

void optimizer_prepare(const AdamWConfig& config, float grad_norm, StepState& state) {
    state.grad_norm = grad_norm;
    if (!std::isfinite(grad_norm) || !std::isfinite(state.loss_sum)) state.nonfinite = 1;
    state.skip_update = state.nonfinite || state.loss_sum > state.in.loss_limit || grad_norm > state.in.grad_norm_limit;
    if (state.skip_update)
        ++state.skipped_steps;
    else
        ++state.adam_t;
    state.clip_scale = config.max_grad_norm > 0 ? std::min(1.0f, config.max_grad_norm / (grad_norm + 1e-6f)) : 1.0f;
    state.bias_correction1 = float(1.0 - std::pow(double(config.beta1), double(state.adam_t)));
    state.bias_correction2 = float(1.0 - std::pow(double(config.beta2), double(state.adam_t)));
}

namespace {

struct Slice {
    const AdamWConfig& config;
    const StepState& state;
    const AdamWUpdate& arrays;
};

REFERENCE_VECTORIZED void update_range(const Slice& s, int64_t begin, int64_t end) {
    const float beta1 = s.config.beta1, beta2 = s.config.beta2, eps = s.config.eps, rate = s.state.in.learning_rate;
    const float correction1 = s.state.bias_correction1, correction2 = s.state.bias_correction2, clip = s.state.clip_scale;
    const float decay = s.arrays.weight_decay;
    float *params = s.arrays.params, *first = s.arrays.m, *second = s.arrays.v;
    const float* grads = s.arrays.grads;
    for (int64_t i = begin; i < end; ++i) {
        const float gradient = grads[i] * clip;
        const float m = beta1 * first[i] + (1.0f - beta1) * gradient;
        const float v = beta2 * second[i] + (1.0f - beta2) * gradient * gradient;
        first[i] = m;
        second[i] = v;
        params[i] -= rate * ((m / correction1) / (std::sqrt(v / correction2) + eps) + decay * params[i]);
    }
}

}  // namespace

void adamw_update(const AdamWConfig& config, const StepState& state, const AdamWUpdate& p) {
    const Slice slice{config, state, p};
    parallel_ranges(p.count, kBlock, [&](int64_t begin, int64_t end) { update_range(slice, begin, end); });
}

}  // namespace reference
