#include "trainer/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "kernels/common/check.h"

Decay find_decay(const std::string& name) {
    static constexpr std::pair<const char*, Decay> kTable[] = {
        {"cosine", Decay::cosine}, {"linear", Decay::linear}, {"wsd", Decay::wsd}, {"constant", Decay::constant}};
    for (const auto& [row, decay] : kTable)
        if (name == row) return decay;
    throw Error(message("--schedule %s: must be cosine, linear, wsd or constant", name.c_str()));
}

int64_t decay_start(const Schedule& s) {
    if (s.decay != Decay::wsd) return s.warmup_steps;
    return std::max(s.warmup_steps, s.total_steps - 1 - int64_t(std::llround(s.decay_fraction * double(s.total_steps))));
}

float learning_rate(const Schedule& s, int64_t step) {
    if (step < s.warmup_steps) return float(double(s.peak) * double(step + 1) / double(s.warmup_steps));
    const int64_t start = decay_start(s), last = s.total_steps - 1;
    if (s.decay == Decay::constant || step <= start) return s.peak;
    const float floor = s.peak * s.min_factor;
    if (step >= last) return floor;
    const double progress = double(step - start) / double(last - start);
    const double left = s.decay == Decay::cosine ? 0.5 * (1 + std::cos(std::numbers::pi * progress)) : 1 - progress;
    return float(floor + (double(s.peak) - floor) * left);
}
