#include "trainer/outliers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Losses 1, 3, 1, 3, ...: mean 2, deviation 1; norms ten times that.
OutlierDetector filled(int window, int64_t steps) {
    OutlierDetector detector(window, {});
    for (int64_t step = 0; step < steps; ++step) detector.add({step, step % 2 ? 3.0f : 1.0f, step % 2 ? 30.0f : 10.0f});
    return detector;
}

TEST(Outliers, NothingIsKnownBeforeTheWindowIsFull) {
    const OutlierDetector detector = filled(8, 8);  // steps 0 to 7
    EXPECT_EQ(detector.losses(8).limit(6), kInf);   // sees 0 to 6
    EXPECT_TRUE(std::isnan(detector.losses(8).z(100)));
    EXPECT_EQ(detector.losses(9).limit(6), 8.0f);
    EXPECT_EQ(detector.norms(9).limit(6), 80.0f);
    EXPECT_EQ(detector.losses(9).z(5), 3.0);
}

// What the host has collected beyond two steps before must not matter: the device is a step ahead of it, or not.
TEST(Outliers, TheStepBeforeIsNotUsed) {
    OutlierDetector behind = filled(8, 20), ahead = filled(8, 20);
    ahead.add({20, 1000.0f, 1000.0f});
    EXPECT_EQ(behind.losses(21).limit(6), ahead.losses(21).limit(6));
    ahead.add({21, 1.0f, 10.0f});
    EXPECT_GT(ahead.losses(22).limit(6), behind.losses(21).limit(6));
}

TEST(Outliers, AWindowThatWentThroughACheckpointDecidesAlike) {
    const OutlierDetector whole = filled(8, 30);
    OutlierDetector resumed(8, filled(8, 20).recent());
    for (int64_t step = 20; step < 30; ++step) resumed.add({step, step % 2 ? 3.0f : 1.0f, step % 2 ? 30.0f : 10.0f});
    for (const int64_t step : {29, 30, 31}) {
        EXPECT_EQ(resumed.losses(step).limit(2.5), whole.losses(step).limit(2.5));
        EXPECT_EQ(resumed.norms(step).limit(2.5), whole.norms(step).limit(2.5));
    }
    EXPECT_LE(whole.recent().size(), 10u);
}

TEST(Outliers, WhatIsNotFiniteIsLeftOut) {
    OutlierDetector detector = filled(8, 20);
    detector.add({20, std::nanf(""), 10.0f});
    detector.add({21, 1.0f, kInf});
    EXPECT_EQ(detector.losses(23).limit(6), 8.0f);
}

TEST(Outliers, NoWindowNoOutliers) {
    const OutlierDetector detector = filled(0, 100);
    EXPECT_EQ(detector.losses(100).limit(1), kInf);
    EXPECT_TRUE(detector.recent().empty());
}

}  // namespace
