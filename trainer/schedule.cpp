#include "trainer/schedule.h"

#include <cmath>
#include <numbers>

#include "kernels/common/check.h"

Decay find_decay(const std::string& name) {
    if (name == "cosine") return Decay::cosine;
    if (name == "constant") return Decay::constant;
    throw Error(message("--schedule %s: must be cosine or constant", name.c_str()));
}

float learning_rate(const Schedule& s, int64_t step) {
    if (step < s.warmup_steps) return float(double(s.peak) * double(step + 1) / double(s.warmup_steps));
    if (s.decay == Decay::constant || step == s.warmup_steps) return s.peak;
    const float floor = s.peak * s.min_factor;
    const int64_t last = s.total_steps - 1;
    if (step >= last) return floor;
    const double progress = double(step - s.warmup_steps) / double(last - s.warmup_steps);
    return float(floor + (double(s.peak) - floor) * 0.5 * (1 + std::cos(std::numbers::pi * progress)));
}
