// Marks become operations, records become a table with shares and ceilings, and the host's profiler measures the inner mark.
#include "trainer/profile.h"

#include <gtest/gtest.h>

#include <cmath>
#include <thread>

#include "trainer/profiler.h"
#include "trainer/reference/matmul.h"

namespace {

constexpr Peak kPeak{"test", 100, 200, 2};  // TFLOP/s, TFLOP/s, TB/s

TEST(Profile, AnOperationLeavesOutInstances) {
    MarkLog marks;
    marks.enter({"step", 7, {}});
    marks.enter({"backward", -1, {}});
    marks.enter({"layer", 3, {}});
    const int entry = marks.enter({"gelu_backward", -1, {.bytes = 10}});
    EXPECT_EQ(marks.operation(entry), "backward gelu_backward");
    EXPECT_EQ(marks.phase(entry), "backward");
    EXPECT_EQ(marks.current(), entry);
    for (int i = 0; i < 4; ++i) marks.leave();
    EXPECT_EQ(marks.current(), MarkLog::kNone);
    EXPECT_EQ(marks.operation(MarkLog::kNone), "");
    const int same = marks.enter({"backward", -1, {}});
    EXPECT_EQ(marks.phase(same), "backward");
}

TEST(Profile, IdealTimeIsTheSlowerOfComputeAndTraffic) {
    MarkLog marks;
    const int bf16 = marks.enter({"a", -1, {.flops = 1e12, .bytes = 1e9}});
    const int fp8 = marks.enter({"b", -1, {.flops = 1e12, .format = Dtype::e5m2, .bytes = 1e9}});
    const int traffic = marks.enter({"c", -1, {.flops = 1e9, .bytes = 4e9}});
    EXPECT_DOUBLE_EQ(marks.ideal_s(bf16, kPeak), 1e-2);
    EXPECT_DOUBLE_EQ(marks.ideal_s(fp8, kPeak), 5e-3);
    EXPECT_DOUBLE_EQ(marks.ideal_s(traffic, kPeak), 2e-3);
    marks.count_kernel(traffic), marks.count_kernel(traffic);
    EXPECT_DOUBLE_EQ(marks.ideal_s(traffic, kPeak), 1e-3);  // each of two kernels
    EXPECT_EQ(marks.ideal_s(traffic, Peak{"unknown", 0, 0, 0}), 0);
    EXPECT_EQ(marks.ideal_s(MarkLog::kNone, kPeak), 0);
}

// Two steps of: a kernel of 3 ms whose ideal is 1.5 ms, its helper of 1 ms that overlaps it half, and a copy.
TEST(Profile, TableOfTwoSteps) {
    MarkLog marks;
    marks.enter({"forward", -1, {}});
    const int gemm = marks.enter({"gemm", -1, {.flops = 1.5e11}});
    marks.leave();
    marks.leave();
    std::vector<ProfileRecord> records;
    for (const uint64_t start : {0ull, 10'000'000ull}) {
        records.push_back({"main", gemm, start, start + 3'000'000, 0.75e-3});
        records.push_back({"helper", gemm, start + 2'500'000, start + 3'500'000, 0.75e-3});
        records.push_back({"copy", MarkLog::kNone, start + 4'000'000, start + 4'500'000, 0});
    }
    const Profile p = summarize(records, marks, 2);
    EXPECT_DOUBLE_EQ(p.busy_ms, 4.0);
    EXPECT_DOUBLE_EQ(p.span_ms, 7.25);
    EXPECT_DOUBLE_EQ(p.summed_ms, 4.5);
    EXPECT_DOUBLE_EQ(p.launches, 3);
    ASSERT_EQ(p.rows.size(), 2u);
    EXPECT_EQ(p.rows[0].operation, "forward gemm");
    EXPECT_EQ(p.rows[0].kernel, "main");
    EXPECT_DOUBLE_EQ(p.rows[0].calls, 2);
    EXPECT_DOUBLE_EQ(p.rows[0].ms, 4);
    EXPECT_DOUBLE_EQ(p.rows[0].share, 4 / 4.5);
    EXPECT_DOUBLE_EQ(p.rows[0].of_ceiling, 1.5 / 4);
    EXPECT_EQ(p.rows[1].kernel, "copy");
    EXPECT_TRUE(std::isnan(p.rows[1].of_ceiling));
    ASSERT_EQ(p.phases.size(), 2u);
    EXPECT_EQ(p.phases[0].name, "forward");
    EXPECT_EQ(p.phases[1].name, "other");
    EXPECT_DOUBLE_EQ(p.phases[1].ms, 0.5);
    const std::string text = format_profile(p, 1);
    EXPECT_NE(text.find("88.9 %"), std::string::npos) << text;
    EXPECT_NE(text.find("38 %"), std::string::npos) << text;
    EXPECT_EQ(text.find("(no mark)"), std::string::npos) << text;  // the second row is cut off
}

TEST(Profile, NothingRecordedIsAnError) { EXPECT_THROW(summarize({}, MarkLog(), 1), std::exception); }

TEST(HostProfiler, TimeBelongsToTheInnerMark) {
    const auto sleep = [](int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); };
    const auto profiler = make_host_profiler();
    { const Mark before("before"); }
    profiler->begin();
    for (int step = 0; step < 2; ++step) {
        const Mark mark("step", step);
        const Mark outer("outer");
        sleep(2);
        {
            const Mark inner("inner");
            sleep(20);
        }
        sleep(2);
    }
    const Profile p = profiler->end(2);
    ASSERT_EQ(p.rows.size(), 2u);
    EXPECT_EQ(p.rows[0].operation, "outer inner");
    EXPECT_DOUBLE_EQ(p.rows[0].calls, 1);
    EXPECT_GE(p.rows[0].ms, 20);
    EXPECT_EQ(p.rows[1].operation, "outer");
    EXPECT_GE(p.rows[1].ms, 4);
    EXPECT_LT(p.rows[1].ms, 20);
}

TEST(HostProfiler, OperationsOfTheReferenceDeviceAreMarked) {
    const auto profiler = make_host_profiler();
    profiler->begin();
    std::vector<float> a(64, 1.0f), b(64, 1.0f), d(64);
    reference::matmul({.a = a.data(), .b = b.data(), .d = d.data(), .M = 8, .N = 8, .K = 8});
    const Profile p = profiler->end(1);
    ASSERT_EQ(p.rows.size(), 1u);
    EXPECT_EQ(p.rows[0].operation, "matmul");
}

TEST(HostProfiler, ListensOnlyWhileItLives) {
    make_host_profiler().reset();
    { const Mark mark("nobody listens"); }
    const auto profiler = make_host_profiler();
    profiler->begin();
    { const Mark mark("heard"); }
    EXPECT_EQ(profiler->end(1).rows.at(0).operation, "heard");
}

}  // namespace
