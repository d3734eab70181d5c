#include "trainer/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/host/temp_folder.h"

namespace {

using Json = nlohmann::json;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
const Peak kH100 = peak_of("NVIDIA H100 80GB HBM3");

// ---------------------------------------------------------------------------------------------------------------------
// Utilization

TEST(Utilization, FlopsOfGpt2) {
    // 6 * (84,934,656 of the blocks' matrices + 38,597,376 of the head) + 6 * 12 * 768 * 1024
    const TokenFlops flops = flops_per_token(find_model("gpt2-124M"), 1024);
    EXPECT_EQ(flops.block_linears, 6.0 * 84'934'656);
    EXPECT_EQ(flops.head, 6.0 * 38'597'376);
    EXPECT_EQ(flops.attention, 56'623'104.0);
}

TEST(Utilization, Mfu) {
    EXPECT_DOUBLE_EQ(mfu(1e6, {.block_linears = 300e6, .head = 100e6, .attention = 94.7e6}, kH100), 0.5);
}

TEST(Utilization, SpeedOfLightCountsEachGemmAtItsOwnPeak) {
    const TokenFlops flops{.block_linears = 1978.9e6, .head = 600e6, .attention = 389.4e6};
    // 1 us of FP8 and 1 us of BF16 work a token
    EXPECT_DOUBLE_EQ(speed_of_light(250e3, flops, kH100, true), 0.5);
    EXPECT_DOUBLE_EQ(speed_of_light(250e3, flops, kH100, false), mfu(250e3, flops, kH100));
}

TEST(Utilization, DensePeaksOfBothGpus) {
    const Peak h200 = peak_of("NVIDIA H200");
    EXPECT_EQ(h200.bf16_tflops, 989.4);
    EXPECT_EQ(h200.fp8_tflops, 1978.9);
    EXPECT_EQ(kH100.bf16_tflops, 989.4);
}

TEST(Utilization, UnknownPeakIsNaN) {
    const TokenFlops flops{.block_linears = 1e6, .head = 1e6, .attention = 1e6};
    EXPECT_TRUE(std::isnan(mfu(1e6, flops, peak_of("CPU"))));
    EXPECT_TRUE(std::isnan(speed_of_light(1e6, flops, peak_of("CPU"), true)));
    const Peak a100 = peak_of("NVIDIA A100-SXM4-80GB");  // has no FP8
    EXPECT_TRUE(std::isnan(speed_of_light(1e6, flops, a100, true)));
    EXPECT_FALSE(std::isnan(speed_of_light(1e6, flops, a100, false)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Text

TEST(Format, Rate) {
    EXPECT_EQ(format_rate(0), "0");
    EXPECT_EQ(format_rate(950), "950");
    EXPECT_EQ(format_rate(999.6), "1.00k");
    EXPECT_EQ(format_rate(9'994), "9.99k");
    EXPECT_EQ(format_rate(9'996), "10.0k");
    EXPECT_EQ(format_rate(412'345), "412k");
    EXPECT_EQ(format_rate(1.27e6), "1.27M");
    EXPECT_EQ(format_rate(2.1e9), "2.10G");
    EXPECT_EQ(format_rate(5.2e17), "520000T");
    EXPECT_EQ(format_rate(4e24), "4.00e+24");
    EXPECT_EQ(format_rate(kInf), "n/a");
}

TEST(Format, Bytes) {
    EXPECT_EQ(format_bytes(512), "512 B");
    EXPECT_EQ(format_bytes(1536), "1.5 KiB");
    EXPECT_EQ(format_bytes(1024.0 * 1024 - 1), "1.0 MiB");
    EXPECT_EQ(format_bytes(12.3 * 1024 * 1024 * 1024), "12.3 GiB");
    EXPECT_EQ(format_bytes(0x1p52), "4.0 PiB");
}

TEST(Format, Duration) {
    EXPECT_EQ(format_duration(0.0042), "4.20 ms");
    EXPECT_EQ(format_duration(0.412), "412 ms");
    EXPECT_EQ(format_duration(0.9996), "1.0 s");
    EXPECT_EQ(format_duration(59.96), "1 m 00 s");
    EXPECT_EQ(format_duration(312), "5 m 12 s");
    EXPECT_EQ(format_duration(3599.9), "1 h 00 m");
    EXPECT_EQ(format_duration(7500), "2 h 05 m");
    EXPECT_EQ(format_duration(4 * 3600 + 3 * 86400), "3 d 04 h");
    EXPECT_EQ(format_duration(12.5 * 365.25 * 86400), "12.5 years");
    EXPECT_EQ(format_duration(1e30), "3.2e+22 years");
    EXPECT_EQ(format_duration(kNan), "n/a");
}

TEST(Format, MemoryTableEndsWithTheSum) {
    EXPECT_EQ(format_memory_table({{"weights", 1024}, {"activations", 2048}}),
              "  weights        1.0 KiB\n"
              "  activations    2.0 KiB\n"
              "  total          3.0 KiB\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// The log

RunLogOptions options_for(const std::string& out) {
    return {.out = out, .resuming = false, .first_step = 0, .total_steps = 500, .log_every = 1,
            .flops = flops_per_token(find_model("gpt2-124M"), 1024), .fp8_linears = true,
            .memory_bytes = 12.3 * 1024 * 1024 * 1024, .device = "NVIDIA H100 80GB HBM3"};
}

RunRecord record_of_run() {
    return {.command = "train_gpt_fp8 --train \"x\"", .config_toml = "steps = 500\n", .commit = "abc",
            .versions = {{"cublaslt", "13.1.0"}}, .model = "gpt2-124M", .recipe = "tensorwise", .parameters = 124439808,
            .tokens_per_step = 524288};
}

StepRecord record_of_step(int64_t steps_done) {
    return {.steps_done = steps_done, .loss = 3.2826, .grad_norm = 0.834, .learning_rate = 6e-4, .seconds = 0.412,
            .tokens = 524288, .skipped = false, .skipped_steps = 0};
}

// Every line must be a JSON object: Json::parse throws otherwise.
std::vector<Json> records(const std::string& out) {
    std::vector<Json> all;
    std::istringstream text(read_file(out + "/log.jsonl"));
    for (std::string line; std::getline(text, line);) all.push_back(Json::parse(line));
    return all;
}

// kind and step of every record, for short comparisons
std::string outline(const std::string& out) {
    std::string text;
    for (const Json& r : records(out)) text += r["kind"].get<std::string>().substr(0, 1) + r["step"].dump() + " ";
    return text;
}

TEST(RunLog, StepLine) {
    const RunLog log(options_for(""), record_of_run());
    StepRecord r = record_of_step(12);
    EXPECT_EQ(log.step_line(r, -1),
              "step 12/500 | loss 3.2826 | norm 0.83 | lr 6.0e-04 | 412 ms | 1.27M tok/s | MFU 102.6 % | SOL 70 % | 12.3 GiB");
    r.skipped_steps = 2, r.skipped = true, r.loss = kNan, r.remark = "not finite, skipped";
    const std::string line = log.step_line(r, 3600);
    EXPECT_NE(line.find("loss nan"), std::string::npos) << line;
    EXPECT_NE(line.find("skipped 2 (this step: not finite, skipped) | ETA 1 h 00 m"), std::string::npos) << line;
}

TEST(RunLog, UnknownPeakPrintsNotAvailable) {
    RunLogOptions options = options_for("");
    options.device = "CPU", options.memory_bytes = 0;
    const std::string line = RunLog(options, record_of_run()).step_line(record_of_step(1), -1);
    EXPECT_TRUE(line.ends_with("MFU n/a | SOL n/a")) << line;
}

TEST(RunLog, RecordsAreJsonLines) {
    const TempFolder folder;
    const std::string out = folder / "new/run";
    RunLog log(options_for(out), record_of_run());
    log.step(record_of_step(1));
    log.eval(1, 3.5, 1000, 0.5);
    log.checkpoint(1, "out/step_000001", 0.1);
    const std::vector<Json> all = records(out);  // while the log is open: every line is flushed
    ASSERT_EQ(all.size(), 4u);
    EXPECT_EQ(all[0]["kind"], "run");
    EXPECT_EQ(all[0]["command"], "train_gpt_fp8 --train \"x\"");
    EXPECT_EQ(all[0]["config"], "steps = 500\n");
    EXPECT_EQ(all[0]["commit"], "abc");
    EXPECT_EQ(all[0]["parameters"], 124439808);
    EXPECT_EQ(all[0]["versions"]["cublaslt"], "13.1.0");
    EXPECT_EQ(all[0]["device"], "NVIDIA H100 80GB HBM3");
    EXPECT_EQ(all[1]["kind"], "step");
    EXPECT_EQ(all[1]["loss"], 3.2826);
    EXPECT_FALSE(all[1].contains("nonfinite"));
    EXPECT_EQ(all[2]["loss"], 3.5);
    EXPECT_EQ(all[3]["path"], "out/step_000001");
}

TEST(RunLog, NonFiniteNumbersStayValidJson) {
    const TempFolder folder;
    RunLogOptions options = options_for(folder.path());
    options.device = "CPU";
    RunLog log(options, record_of_run());
    StepRecord r = record_of_step(1);
    r.loss = kNan, r.grad_norm = -kInf, r.skipped = true, r.skipped_steps = 1;
    log.step(r);
    log.eval(1, kInf, 10, 0.1);
    const std::vector<Json> all = records(folder.path());
    EXPECT_TRUE(all[1]["loss"].is_null());
    EXPECT_EQ(all[1]["nonfinite"], Json::parse(R"({"loss": "nan", "grad_norm": "-inf"})"));
    EXPECT_TRUE(all[1]["mfu"].is_null());
    EXPECT_EQ(all[1]["skipped_steps"], 1);
    EXPECT_EQ(all[2]["nonfinite"]["loss"], "inf");
}

TEST(RunLog, BytesThatAreNotUtf8StayValidJson) {
    const TempFolder folder;
    RunRecord run = record_of_run();
    run.command = "train \xff\xfe";
    RunLog log(options_for(folder.path()), run);
    EXPECT_EQ(records(folder.path()).size(), 1u);
}

TEST(RunLog, AnotherRunsLogIsNotOverwritten) {
    const TempFolder folder;
    { RunLog log(options_for(folder.path()), record_of_run()); }
    const std::string before = read_file(folder / "log.jsonl");
    EXPECT_NE(error_of([&] { RunLog log(options_for(folder.path()), record_of_run()); }).find("another run"), std::string::npos);
    EXPECT_EQ(read_file(folder / "log.jsonl"), before);
}

TEST(RunLog, ResumingCutsTheLogBackToTheCheckpoint) {
    const TempFolder folder;
    RunLogOptions options = options_for(folder.path());
    {
        RunLog log(options, record_of_run());
        for (int64_t step = 1; step <= 5; ++step) {
            log.step(record_of_step(step));
            if (step == 3) log.eval(3, 3.1, 10, 1), log.checkpoint(3, "step_000003", 1);
        }
    }
    write_file(folder / "log.jsonl", read_file(folder / "log.jsonl") + "{\"kind\": \"step\", \"st");  // a crash's torn line
    options.resuming = true, options.first_step = 3;
    for (int time = 0; time < 2; ++time) {  // a second resume from the same place leaves the same log
        RunLog log(options, record_of_run());
        EXPECT_EQ(outline(folder.path()), "r0 s1 s2 s3 e3 c3 r3 ");
        log.step(record_of_step(4));
    }
    EXPECT_FALSE(std::filesystem::exists(folder / "log.jsonl.tmp"));
}

TEST(RunLog, ResumingWithoutACheckpointStartsTheLogAnew) {
    const TempFolder folder;
    RunLogOptions options = options_for(folder.path());
    {
        RunLog log(options, record_of_run());
        log.eval(0, 11, 10, 1);
        log.step(record_of_step(1));
    }
    options.resuming = true;
    RunLog log(options, record_of_run());
    EXPECT_EQ(outline(folder.path()), "r0 ");
}

TEST(RunLog, ResumingIntoAnEmptyFolder) {
    const TempFolder folder;
    RunLogOptions options = options_for(folder.path());
    options.resuming = true, options.first_step = 7;
    RunLog log(options, record_of_run());
    EXPECT_EQ(outline(folder.path()), "r7 ");
}

TEST(RunLog, FileGetsEveryStepTerminalGetsSome) {
    const TempFolder folder;
    RunLogOptions options = options_for(folder.path());
    options.total_steps = 7, options.log_every = 3;
    testing::internal::CaptureStdout();
    RunLog log(options, record_of_run());
    for (int64_t step = 1; step <= 7; ++step) log.step(record_of_step(step));
    const std::string text = testing::internal::GetCapturedStdout();
    for (const int64_t step : {1, 3, 6, 7}) EXPECT_NE(text.find(message("step %lld/7 ", (long long)step)), std::string::npos);
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 4);
    EXPECT_EQ(text.find("ETA"), std::string::npos);  // not a terminal
    EXPECT_EQ(outline(folder.path()), "r0 s1 s2 s3 s4 s5 s6 s7 ");
}

}  // namespace
