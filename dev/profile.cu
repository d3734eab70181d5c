// Training throughput of a model on random tokens, and where a step's time goes.
//
//   profile [--profile-steps N] [--json FILE] [the trainer's options; --steps: how many are timed]
//
// First the steps are timed as the trainer runs them, one step ahead, without a profiler: the median of the times between
// two results by the host's clock; the engine's own measure, by events, is printed beside it. Then a second engine, made
// after CUPTI is switched on (so that its graphs' nodes are traced), runs a few steps whose kernels, copies and fills are
// recorded. "idle" compares the device's busy time (union of all records) with the untraced step; the trace's own span is
// longer, because tracing spreads short kernels.
#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

#include "dev/run_options.h"
#include "kernels/common/cuda_check.h"
#include "kernels/common/peak.h"
#include "trainer/metrics.h"

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

// ---------------------------------------------------------------------------------------------------------------------
// The trace

struct Activity {
    std::string name;
    uint64_t start_ns, end_ns;
};

// CUPTI is loaded when it is needed: a toolkit without it still builds and runs everything else.
template <class Function>
Function* cupti_function(const char* name) {
    static void* const library = [] {
        for (const char* file : {"libcupti.so.13", "libcupti.so.12", "libcupti.so"})
            if (void* handle = dlopen(file, RTLD_NOW)) return handle;
        return static_cast<void*>(nullptr);
    }();
    REQUIRE(library != nullptr, "tracing needs CUPTI (libcupti.so of the CUDA Toolkit on LD_LIBRARY_PATH); --profile-steps 0 does without");
    void* function = dlsym(library, name);
    REQUIRE(function != nullptr, "this CUPTI has no %s", name);
    return reinterpret_cast<Function*>(function);
}
#define CUPTI(name) cupti_function<decltype(name)>(#name)

void cupti_check(CUptiResult status, const char* call) {
    if (status == CUPTI_SUCCESS) return;
    const char* text = nullptr;
    CUPTI(cuptiGetResultString)(status, &text);
    throw Error(message("%s: %s", call, text ? text : "unknown error"));
}
#define CUPTI_CHECK(name, ...) cupti_check(CUPTI(name)(__VA_ARGS__), #name)

// Filled by CUPTI's own thread; read after trace_stop().
std::mutex trace_mutex;
std::vector<Activity> trace_records;
size_t trace_dropped = 0;

// "void (anonymous namespace)::f<(int)3>(args)" becomes "f<(int)3>".
std::string short_name(const char* mangled) {
    int status = 0;
    const std::unique_ptr<char, void (*)(void*)> demangled(abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
    std::string name = status == 0 ? demangled.get() : mangled;
    if (name.starts_with("void ")) name = name.substr(5);
    for (size_t at; (at = name.find("(anonymous namespace)::")) != std::string::npos;) name.erase(at, 23);
    int depth = 0;
    for (size_t i = 0; i < name.size(); ++i) {  // the argument list opens outside of template brackets
        depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
        if (name[i] == '(' && depth == 0) return name.substr(0, i);
    }
    return name;
}

void keep_record(const CUpti_Activity* record) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
        const auto* r = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
        trace_records.push_back({short_name(r->name), r->start, r->end});
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
        const auto* r = reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
        const bool to_device = r->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_HTOD, to_host = r->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOH;
        trace_records.push_back({to_device ? "copy, host to device" : to_host ? "copy, device to host" : "copy", r->start, r->end});
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
        const auto* r = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
        trace_records.push_back({"fill", r->start, r->end});
    }
}

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* max_records) {
    *size = size_t(8) << 20;
    *max_records = 0;  // as many as fit
    *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
}

void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t, size_t valid) {
    const std::lock_guard lock(trace_mutex);
    CUpti_Activity* record = nullptr;
    while (valid > 0 && CUPTI(cuptiActivityGetNextRecord)(buffer, valid, &record) == CUPTI_SUCCESS) keep_record(record);
    size_t dropped = 0;
    if (CUPTI(cuptiActivityGetNumDroppedRecords)(context, stream, &dropped) == CUPTI_SUCCESS) trace_dropped += dropped;
    std::free(buffer);
}

constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};

void trace_start() {
    CUPTI_CHECK(cuptiActivityRegisterCallbacks, give_buffer, take_buffer);
    for (const CUpti_ActivityKind kind : kKinds) CUPTI_CHECK(cuptiActivityEnable, kind);
}

// What has been recorded since the last call.
std::vector<Activity> trace_take() {
    CUDA_CHECK(cudaDeviceSynchronize());
    CUPTI_CHECK(cuptiActivityFlushAll, CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    const std::lock_guard lock(trace_mutex);
    REQUIRE(trace_dropped == 0, "the profiler dropped %zu records", trace_dropped);
    return std::exchange(trace_records, {});
}

struct KernelRow {
    std::string name;
    double calls, ms, share;  // of a step; share of the summed time
};

struct Profile {
    double busy_ms = 0, span_ms = 0, summed_ms = 0;  // of a step
    double launches = 0;
    std::vector<KernelRow> rows;  // longest first
};

Profile summarize(std::vector<Activity> activities, double steps) {
    REQUIRE(!activities.empty(), "the profiler recorded nothing");
    std::sort(activities.begin(), activities.end(), [](const Activity& a, const Activity& b) { return a.start_ns < b.start_ns; });
    Profile profile;
    std::map<std::string, KernelRow> rows;
    uint64_t busy = 0, covered_to = activities.front().start_ns;
    for (const Activity& a : activities) {
        if (a.end_ns > covered_to) busy += a.end_ns - std::max(a.start_ns, covered_to), covered_to = a.end_ns;
        KernelRow& row = rows[a.name];
        row.calls += 1 / steps;
        row.ms += double(a.end_ns - a.start_ns) * 1e-6 / steps;
    }
    profile.busy_ms = double(busy) * 1e-6 / steps;
    profile.span_ms = double(covered_to - activities.front().start_ns) * 1e-6 / steps;
    profile.launches = double(activities.size()) / steps;
    for (const auto& [name, row] : rows) profile.summed_ms += row.ms;
    for (auto& [name, row] : rows) profile.rows.push_back({name, row.calls, row.ms, row.ms / profile.summed_ms});
    std::sort(profile.rows.begin(), profile.rows.end(), [](const KernelRow& a, const KernelRow& b) { return a.ms > b.ms; });
    return profile;
}

Profile trace(const Config& config, const TrainState& state, int64_t steps) {
    trace_start();
    Runner runner(config, state);
    runner.steps(2);  // captures the graphs
    trace_take();
    runner.steps(steps);
    Profile profile = summarize(trace_take(), double(steps));
    for (const CUpti_ActivityKind kind : kKinds) CUPTI_CHECK(cuptiActivityDisable, kind);
    return profile;
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

void print_profile(const Profile& profile, double step_ms) {
    std::printf("busy %.2f ms of a step of %.2f ms: idle %.1f %% (traced span %.2f ms); %.0f launches\n", profile.busy_ms, step_ms,
                100 * (1 - profile.busy_ms / step_ms), profile.span_ms, profile.launches);
    std::printf("%9s %9s %7s  kernel\n", "calls", "ms", "share");
    for (size_t i = 0; i < std::min<size_t>(20, profile.rows.size()); ++i) {
        const KernelRow& row = profile.rows[i];
        std::printf("%9.1f %9.3f %6.1f%%  %.110s\n", row.calls, row.ms, 100 * row.share, row.name.c_str());
    }
}

double rounded(double x) { return std::round(x * 1e4) / 1e4; }

Json train_row(const Config& config, const Throughput& t, const std::string& command) {
    const ModelSpec model = config.model_spec();
    return {{"kind", "train"}, {"model", model.name}, {"recipe", config.recipe}, {"head", "bf16"}, {"gpus", 1}, {"shard", "none"},
            {"seq_len", model.seq_len}, {"micro_batch", config.micro_batch}, {"tokens_per_step", config.global_batch_tokens},
            {"tokens_per_s", std::round(t.tokens_per_s)}, {"ms_per_step", rounded(t.ms)}, {"mfu", rounded(t.mfu)}, {"sol", rounded(t.sol)},
            {"memory_gib", rounded(t.memory_gib)}, {"command", command}};
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
    runner.reset();  // its memory is the traced engine's

    const Json test{{"name", model.name + " " + config.recipe + " trains"}, {"status", ok ? "pass" : "fail"}, {"figure", figure}};
    Json json{{"tests", Json::array({test})}, {"bench", Json::array({train_row(config, t, command)})}};
    if (profile_steps > 0) {
        const Profile profile = trace(config, state, profile_steps);
        print_profile(profile, t.ms);
        Json& row = json["bench"][0];
        row["busy_ms"] = rounded(profile.busy_ms);
        row["launches"] = profile.launches;
        for (size_t i = 0; i < std::min<size_t>(20, profile.rows.size()); ++i)
            row["kernels"].push_back({{"name", profile.rows[i].name}, {"calls", profile.rows[i].calls}, {"ms", rounded(profile.rows[i].ms)}});
    }
    if (const std::string& path = options.own.at("json"); !path.empty()) write_json(path, json);
    return ok;
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
