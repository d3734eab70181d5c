// The learning rate of every step: a pure function.
#pragma once
#include <cstdint>
#include <string>

enum class Decay : uint8_t { constant, linear, cosine, wsd };
Decay find_decay(const std::string& name);  // Error lists the names

struct Schedule {
    Decay decay;
    float peak;
    float min_factor;  // the floor is min_factor * peak; unused by `constant`
    int64_t warmup_steps, total_steps;
    double decay_fraction = 0;  // of total_steps, for wsd
};

// Step s, from 0, of total_steps, W = warmup_steps:
//   s < W   peak * (s + 1) / W: never 0, so that no step is wasted; the last warm-up step has the peak
//   s >= W  with the progress p = (s - W) / (total_steps - 1 - W):
//           constant  peak
//           linear    peak + (floor - peak) * p
//           cosine    floor + (peak - floor) * (1 + cos(pi * p)) / 2
//           wsd       the peak, then a linear decay over the last D = round(decay_fraction * total_steps) steps
//                     (warm-up, stable, decay): linear's with total_steps - 1 - D in place of W
//           All but `constant`: exactly the peak at s = W, exactly the floor at the last step, the floor after it.
//           If only one step decays (W = total_steps - 1), it has the peak.
int64_t decay_start(const Schedule& schedule);  // the last step with the peak
float learning_rate(const Schedule& schedule, int64_t step);
