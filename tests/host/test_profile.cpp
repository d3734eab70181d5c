// Marks become operations, records become a table with shares and ceilings, and the host's profiler measures the inner mark.
#include "trainer/profile.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
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

Covered of(const std::vector<Span>& spans, const std::vector<Span>& by) { return covered(spans, by); }

TEST(Covered, CountsWhatNothingCovers) {
    const auto expect = [](const Covered& c, uint64_t total, uint64_t exposed) {
        EXPECT_EQ(c.total_ns, total);
        EXPECT_EQ(c.exposed_ns, exposed);
    };
    expect(of({}, {{0, 9}}), 0, 0);
    expect(of({{5, 15}}, {}), 10, 10);
    expect(of({{5, 15}}, {{0, 5}, {15, 20}}), 10, 10);        // they touch
    expect(of({{5, 15}}, {{0, 100}}), 10, 0);
    expect(of({{5, 15}}, {{7, 9}, {8, 10}, {12, 13}}), 10, 6);  // overlapping ones count once
    expect(of({{5, 15}}, {{12, 30}, {0, 6}}), 10, 6);         // in any order
    expect(of({{5, 15}, {10, 20}}, {{14, 16}}), 15, 13);      // of the union
    expect(of({{0, 10}, {20, 30}, {40, 50}}, {{5, 45}}), 30, 10);  // one covers several
    expect(of({{0, 10}, {20, 30}}, {{2, 3}, {9, 21}, {22, 23}, {29, 29}}), 20, 16);
}

// Against one nanosecond at a time.
TEST(Covered, EqualsCounting) {
    uint64_t random = 1;
    const auto spans = [&](int count) {
        std::vector<Span> found;
        for (int i = 0; i < count; ++i) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            const uint64_t start = (random >> 33) % 90, length = (random >> 50) % 12;
            found.push_back({start, start + length});
        }
        return found;
    };
    for (int turn = 0; turn < 300; ++turn) {
        const std::vector<Span> a = spans(turn % 9), b = spans(turn % 7);
        Covered counted;
        for (uint64_t t = 0; t < 110; ++t) {
            const auto in = [t](const Span& s) { return s.start_ns <= t && t < s.end_ns; };
            const bool inside = std::any_of(a.begin(), a.end(), in);
            counted.total_ns += inside;
            counted.exposed_ns += inside && std::none_of(b.begin(), b.end(), in);
        }
        const Covered c = of(a, b);
        ASSERT_EQ(c.total_ns, counted.total_ns) << turn;
        ASSERT_EQ(c.exposed_ns, counted.exposed_ns) << turn;
    }
}

TEST(Profile, CommunicationIsExposedWhereNoComputeRuns) {
    EXPECT_EQ(work_of_kernel("ncclDevKernel_AllGather_RING_LL"), Work::communication);
    EXPECT_EQ(work_of_kernel("layernorm_forward_kernel"), Work::compute);
    const MarkLog marks;
    const std::vector<ProfileRecord> records = {{"gemm", MarkLog::kNone, 0, 4'000'000, 0},
                                                {"ncclDevKernel", MarkLog::kNone, 2'000'000, 6'000'000, 0, Work::communication},
                                                {"copy", MarkLog::kNone, 4'000'000, 6'000'000, 0, Work::other},  // no compute
                                                {"gemm", MarkLog::kNone, 5'000'000, 7'000'000, 0}};
    const Profile p = summarize(records, marks, 2);
    EXPECT_DOUBLE_EQ(p.communication_ms, 2);
    EXPECT_DOUBLE_EQ(p.exposed_ms, 0.5);
    EXPECT_EQ(format_communication({0, 0}, {0, 0}), "");
    EXPECT_EQ(format_communication({2, 4}, {0.5, 1}), "communication | rank 0 2.000 ms, 0.500 ms (25.0 %) with no compute beside it | rank 1 4.000 ms, 1.000 ms (25.0 %) with no compute beside it\n");
}

// What of each kind of communication is exposed, and the timeline that it was taken from.
TEST(Profile, CommunicationByKind) {
    MarkLog marks;
    marks.enter({"communication", -1, {}});
    const int gather = marks.enter({"all_gather", -1, {}});
    marks.leave();
    const int reduce = marks.enter({"all_reduce", -1, {}});
    const std::vector<ProfileRecord> records = {{"gemm", MarkLog::kNone, 5'000'000, 9'000'000, 0, Work::compute, 7},
                                                {"copy", gather, 6'000'000, 8'000'000, 0, Work::communication, 13},
                                                {"copy", gather, 8'000'000, 10'000'000, 0, Work::communication, 13},
                                                {"nccl\xff", reduce, 10'000'000, 16'000'000, 0, Work::communication, 13}};
    const Profile p = summarize(records, marks, 2);
    ASSERT_EQ(p.communication.size(), 2u);
    EXPECT_EQ(p.communication[0].operation, "communication all_reduce");
    EXPECT_DOUBLE_EQ(p.communication[0].exposed_ms, 3);
    EXPECT_EQ(p.communication[1].kernel, "copy");
    EXPECT_DOUBLE_EQ(p.communication[1].calls, 1);
    EXPECT_DOUBLE_EQ(p.communication[1].ms, 2);
    EXPECT_DOUBLE_EQ(p.communication[1].exposed_ms, 0.5);
    EXPECT_NE(format_profile(p, 1).find("2.000     0.500      1.0  communication all_gather  copy"), std::string::npos) << format_profile(p, 1);

    const auto json = nlohmann::json::parse(format_timeline(p, 3)).at("traceEvents");
    ASSERT_EQ(json.size(), 5u);  // the first one names the process
    EXPECT_EQ(json[0]["args"]["name"], "rank 3");
    EXPECT_EQ(json[1]["name"], "(no mark)");
    EXPECT_EQ(json[1]["tid"], 7);
    EXPECT_EQ(json[3]["ts"], 3000.0);
    EXPECT_EQ(json[3]["dur"], 2000.0);
    EXPECT_EQ(json[4]["cat"], "communication");
    EXPECT_EQ(json[4]["pid"], 3);
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
