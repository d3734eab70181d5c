// Training throughput of a model on random tokens, and where a step's time goes.
//
//   profile [--profile-steps N] [--json FILE] [the trainer's options; --steps: how many are timed]
//
// First the steps are timed as the trainer runs them, one step ahead, without a profiler: the median of the times between
// two results by the host's clock; the engine's own measure, by events, is printed beside it. Then a second engine, made
// after CUPTI is switched on (so that its graphs' nodes are traced), runs a few steps whose kernels, copies and fills are
// recorded. "idle" compares the device's busy time (union of all records) with the untraced step; the trace's own span is
// longer, because tracing spreads short kernels.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "dev/run_options.h"
#include "kernels/common/cuda_check.h"
#include "kernels/common/peak.h"
#include "trainer/metrics.h"
#include "trainer/profiler.h"

namespace {

using Json = nlohmann::ordered_json;

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// ---------------------------------------------------------------------------------------------------------------------
// Steps

struct Tokens {
    std::vector<int> inputs, targets;
};

// Zipf's law, as in text: a few tokens take most of the embedding's gradient.
Tokens random_tokens(int64_t n, int vocab_size) {
    std::vector<double> weights(static_cast<size_t>(vocab_size));
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = 1.0 / double(i + 1);
    std::mt19937_64 random(1);
    std::discrete_distribution<int> zipf(weights.begin(), weights.end());
    Tokens tokens;
    for (std::vector<int>* half : {&tokens.inputs, &tokens.targets}) {
        half->resize(size_t(n));
        for (int& token : *half) token = zipf(random);
    }
    return tokens;
}

class Runner {
  public:
    Runner(const Config& config, const TrainState& state)
        : config_(config), engine_(make_engine(config)), tokens_(random_tokens(config.global_batch_tokens, config.model_spec().vocab_size)) {
        engine_->load(state);
    }

    // Runs `count` steps as the trainer does, some enqueued ahead. Of all but the first ones, which fill the pipeline.
    struct Seconds {
        std::vector<double> host, device;  // between two results; the engine's own measure
    };
    Seconds steps(int64_t count) {
        Seconds seconds;
        double last = 0;
        const int64_t ahead = engine_->steps_ahead();
        for (int64_t enqueued = 0, collected = 0; collected < count; ++collected) {
            while (enqueued < std::min(count, collected + 1 + ahead)) enqueue(), ++enqueued;
            const StepResult result = engine_->collect();
            const double now = now_s();
            loss_ = result.loss_sum;
            skipped_ |= result.skip_update != 0;
            if (collected > ahead) seconds.host.push_back(now - last), seconds.device.push_back(result.seconds);
            last = now;
        }
        return seconds;
    }

    const Engine& engine() const { return *engine_; }
    double loss() const { return loss_; }
    bool skipped() const { return skipped_; }

  private:
    void enqueue() {
        const StepInputs in{.step = step_++, .learning_rate = 1e-4f, .inverse_valid_tokens = 1.0f / float(config_.global_batch_tokens)};
        engine_->enqueue_step(in, tokens_.inputs, tokens_.targets);
    }

    const Config& config_;
    std::unique_ptr<Engine> engine_;
    Tokens tokens_;
    int64_t step_ = 0;
    double loss_ = 0;
    bool skipped_ = false;
};

double median(std::vector<double> x) {
    std::nth_element(x.begin(), x.begin() + std::ptrdiff_t(x.size() / 2), x.end());
    return x[x.size() / 2];
}

Profile trace(const Config& config, const TrainState& state, const Peak& peak, int64_t steps) {
    const std::unique_ptr<Profiler> profiler = make_gpu_profiler(peak);
    Runner runner(config, state);
    runner.steps(2);  // captures the graphs
    profiler->begin();
    runner.steps(steps);
    return profiler->end(steps);
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

struct Throughput {
    double ms, device_ms, tokens_per_s, mfu, sol, memory_gib;
};

Throughput measure(const Config& config, Runner& runner) {
    runner.steps(2);
    const Runner::Seconds times = runner.steps(config.steps);
    const double seconds = median(times.host);
    const ModelSpec model = config.model_spec();
    const TokenFlops flops = flops_per_token(model, model.seq_len);
    const Peak peak = peak_of(runner.engine().device_name());
    double bytes = 0;
    for (const MemoryRow& row : runner.engine().memory_table()) bytes += row.bytes;
    const double rate = double(config.global_batch_tokens) / seconds;
    return {.ms = seconds * 1e3, .device_ms = median(times.device) * 1e3, .tokens_per_s = rate, .mfu = mfu(rate, flops, peak),
            .sol = speed_of_light(rate, flops, peak, find_recipe(config.recipe).quantizes()), .memory_gib = bytes / 0x1p30};
}

constexpr size_t kRows = 20;

void print_profile(const Profile& profile, double step_ms) {
    std::printf("busy %.2f ms of a step of %.2f ms: idle %.1f %% (traced span %.2f ms); %.0f launches\n%s", profile.busy_ms, step_ms,
                100 * (1 - profile.busy_ms / step_ms), profile.span_ms, profile.launches, format_profile(profile, kRows).c_str());
}

constexpr double kMostIdle = 0.03;

// Busy time is of the traced steps and the step's time of others, without tracing: so this may come out a little below zero.
Json idle_test(const Config& config, const Profile& profile, double step_ms) {
    const double idle = 1 - profile.busy_ms / step_ms;
    return {{"name", config.model_spec().name + " " + config.recipe + " idle GPU time"}, {"status", idle <= kMostIdle ? "pass" : "fail"},
            {"figure", message("%.1f %% (busy %.2f ms of a step of %.2f ms), at most %.0f %%", 100 * idle, profile.busy_ms, step_ms, 100 * kMostIdle)}};
}

double rounded(double x) { return std::round(x * 1e4) / 1e4; }

Json train_row(const Config& config, const Throughput& t, const std::string& command) {
    const ModelSpec model = config.model_spec();
    return {{"kind", "train"}, {"model", model.name}, {"recipe", config.recipe}, {"attention", config.attention}, {"head", "bf16"}, {"gpus", 1}, {"shard", "none"},
            {"seq_len", model.seq_len}, {"micro_batch", config.micro_batch}, {"tokens_per_step", config.global_batch_tokens},
            {"tokens_per_s", std::round(t.tokens_per_s)}, {"ms_per_step", rounded(t.ms)}, {"mfu", rounded(t.mfu)}, {"sol", rounded(t.sol)},
            {"memory_gib", rounded(t.memory_gib)}, {"command", command}};
}

Json kernel_json(const ProfileRow& row) {
    Json json{{"operation", row.operation}, {"name", row.kernel}, {"calls", row.calls}, {"ms", rounded(row.ms)}};
    if (std::isfinite(row.of_ceiling)) json["of_ceiling"] = rounded(row.of_ceiling);
    return json;
}

void write_json(const std::string& path, const Json& json) {
    std::ofstream file(path);
    file << json.dump(1) << "\n";
    file.close();
    REQUIRE(file, "--json %s: cannot write", path.c_str());
}

bool run(int argc, char** argv) {
    const RunOptions options = parse_run_options(argc, argv, {{"json", ""}, {"profile-steps", "2"}},
                                                 {{"--train", "none"}, {"--out", "none"}, {"--steps", "10"}, {"--device", "gpu"}});
    const Config& config = options.config;
    REQUIRE(config.steps >= 3, "--steps %lld: must be at least 3, the first two fill the pipeline", (long long)config.steps);
    const int64_t profile_steps = std::atoll(options.own.at("profile-steps").c_str());
    REQUIRE(profile_steps >= 0, "--profile-steps %lld: must be at least 0 (no profile)", (long long)profile_steps);
    std::string command = argv[0];
    for (int i = 1; i < argc; ++i)
        if (std::string(argv[i]) == "--json") ++i;  // where the report goes is not part of what was measured
        else command += " " + std::string(argv[i]);

    const ModelSpec model = config.model_spec();
    const TrainState state = initial_state(make_parameters(model), model, config.seed);
    auto runner = std::make_unique<Runner>(config, state);
    const Throughput t = measure(config, *runner);
    const bool ok = std::isfinite(runner->loss()) && !runner->skipped();
    std::printf("%s %s on %s | %d x %d, %lld tokens a step | %.2f ms (by events %.2f) | %s tok/s | MFU %s | SOL %s | %.1f GiB | loss %.3f%s\n",
                model.name.c_str(), config.recipe.c_str(), runner->engine().device_name().c_str(), config.micro_batch, model.seq_len,
                (long long)config.global_batch_tokens, t.ms, t.device_ms, format_rate(t.tokens_per_s).c_str(), format_percent(t.mfu, 1).c_str(),
                format_percent(t.sol, 1).c_str(), t.memory_gib, runner->loss(), ok ? "" : " NOT FINITE");
    const std::string figure = message("loss %.3f", runner->loss());
    const std::string device = runner->engine().device_name();
    runner.reset();  // its memory is the traced engine's

    const Json test{{"name", model.name + " " + config.recipe + " trains"}, {"status", ok ? "pass" : "fail"}, {"figure", figure}};
    Json json{{"tests", Json::array({test})}, {"bench", Json::array({train_row(config, t, command)})}};
    bool busy = true;
    if (profile_steps > 0) {
        const Profile profile = trace(config, state, peak_of(device), profile_steps);
        print_profile(profile, t.ms);
        json["tests"].push_back(idle_test(config, profile, t.ms));
        busy = json["tests"].back()["status"] == "pass";
        Json& row = json["bench"][0];
        row["busy_ms"] = rounded(profile.busy_ms);
        row["launches"] = profile.launches;
        for (size_t i = 0; i < std::min(kRows, profile.rows.size()); ++i) row["kernels"].push_back(kernel_json(profile.rows[i]));
    }
    if (const std::string& path = options.own.at("json"); !path.empty()) write_json(path, json);
    return ok && busy;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc, argv) ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
