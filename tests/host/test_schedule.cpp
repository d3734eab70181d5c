#include "trainer/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/common/check.h"

namespace {

const Schedule kCosine{.decay = Decay::cosine, .peak = 6e-4f, .min_factor = 0.1f, .warmup_steps = 10, .total_steps = 111};

TEST(Schedule, FirstWarmupStepIsNotZero) {
    EXPECT_FLOAT_EQ(learning_rate(kCosine, 0), 6e-5f);
    EXPECT_FLOAT_EQ(learning_rate(kCosine, 4), 3e-4f);
    EXPECT_EQ(learning_rate(kCosine, 9), 6e-4f);
}

TEST(Schedule, CosineRunsFromThePeakToTheFloorExactly) {
    EXPECT_EQ(learning_rate(kCosine, 10), 6e-4f);
    EXPECT_EQ(learning_rate(kCosine, 110), 6e-4f * 0.1f);
    // Half way between step 10 and step 110; dividing by total_steps would put it elsewhere.
    EXPECT_FLOAT_EQ(learning_rate(kCosine, 60), 0.55f * 6e-4f);
    EXPECT_FLOAT_EQ(learning_rate(kCosine, 35), 6e-4f * (0.1f + 0.9f * 0.5f * (1 + std::sqrt(0.5f))));
}

TEST(Schedule, CosineFallsMonotonically) {
    for (int64_t step = 11; step <= 110; ++step)
        EXPECT_LT(learning_rate(kCosine, step), learning_rate(kCosine, step - 1)) << step;
}

TEST(Schedule, StaysAtTheFloorAfterTheEnd) { EXPECT_EQ(learning_rate(kCosine, 1000), 6e-4f * 0.1f); }

TEST(Schedule, ConstantIgnoresTheFloor) {
    Schedule s = kCosine;
    s.decay = Decay::constant;
    EXPECT_FLOAT_EQ(learning_rate(s, 0), 6e-5f);
    for (const int64_t step : {10, 60, 110, 1000}) EXPECT_EQ(learning_rate(s, step), 6e-4f);
}

TEST(Schedule, LinearRunsFromThePeakToTheFloor) {
    Schedule s = kCosine;
    s.decay = Decay::linear;
    EXPECT_EQ(learning_rate(s, 9), 6e-4f);
    EXPECT_EQ(learning_rate(s, 10), 6e-4f);
    EXPECT_FLOAT_EQ(learning_rate(s, 35), 6e-4f * (1 - 0.9f * 0.25f));
    EXPECT_FLOAT_EQ(learning_rate(s, 60), 0.55f * 6e-4f);
    for (const int64_t step : {110, 1000}) EXPECT_EQ(learning_rate(s, step), 6e-4f * 0.1f);
}

TEST(Schedule, WsdKeepsThePeakAndDecaysOverTheLastSteps) {
    const Schedule s{.decay = Decay::wsd, .peak = 6e-4f, .min_factor = 0, .warmup_steps = 10, .total_steps = 100, .decay_fraction = 0.2};
    EXPECT_FLOAT_EQ(learning_rate(s, 4), 3e-4f);
    for (const int64_t step : {9, 10, 50, 79}) EXPECT_EQ(learning_rate(s, step), 6e-4f) << step;
    EXPECT_FLOAT_EQ(learning_rate(s, 80), 6e-4f * 0.95f);  // the first of 20 steps
    EXPECT_FLOAT_EQ(learning_rate(s, 89), 3e-4f);
    for (const int64_t step : {99, 1000}) EXPECT_EQ(learning_rate(s, step), 0.0f);
    Schedule all = s;  // nothing is left to keep
    all.decay_fraction = 1;
    EXPECT_LT(learning_rate(all, 11), learning_rate(all, 10));
    EXPECT_EQ(learning_rate(all, 10), 6e-4f);
}

TEST(Schedule, DegenerateLengths) {
    const Schedule one_step{.decay = Decay::cosine, .peak = 1, .min_factor = 0.1f, .warmup_steps = 0, .total_steps = 1};
    EXPECT_EQ(learning_rate(one_step, 0), 1.0f);
    const Schedule two_steps{.decay = Decay::cosine, .peak = 1, .min_factor = 0.1f, .warmup_steps = 0, .total_steps = 2};
    EXPECT_EQ(learning_rate(two_steps, 0), 1.0f);
    EXPECT_EQ(learning_rate(two_steps, 1), 0.1f);
    const Schedule only_warmup{.decay = Decay::cosine, .peak = 1, .min_factor = 0.1f, .warmup_steps = 4, .total_steps = 4};
    EXPECT_EQ(learning_rate(only_warmup, 0), 0.25f);
    EXPECT_EQ(learning_rate(only_warmup, 3), 1.0f);
}

TEST(Schedule, UnknownNameIsAnError) {
    EXPECT_EQ(find_decay("cosine"), Decay::cosine);
    EXPECT_EQ(find_decay("constant"), Decay::constant);
    EXPECT_THROW(find_decay("Cosine"), Error);
}

}  // namespace
