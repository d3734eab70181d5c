#include "trainer/run/plan.h"

#include <cstdio>

#include "kernels/common/check.h"
#include "kernels/common/peak.h"
#include "trainer/gpu_info.h"
#include "trainer/metrics.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/micro_batch.h"
#include "trainer/run/start.h"

using ll = long long;

namespace {

constexpr const char* kAssumedDevice = "NVIDIA H100 80GB HBM3";
constexpr double kAssumedDeviceBytes = 79.1 * (1 << 30);
// Share of the speed of light (each GEMM at the peak of its format) that a step reaches. 124M and 1558M on an H200 measured
// 37 and 40 % with FP8 linears, 47 and 54 % in BF16 (tests/gpu_report/train.json).
constexpr double kAssumedSolFp8 = 0.38, kAssumedSolBf16 = 0.5;

void print_time(const Config& config, double tokens_per_s, const std::string& how) {
    const double step_s = double(config.global_batch_tokens) / tokens_per_s;
    std::printf("time    about %s a step, %s tok/s, %s for %lld steps without evaluation (%s)\n", format_duration(step_s).c_str(),
                format_rate(tokens_per_s).c_str(), format_duration(step_s * double(config.steps)).c_str(), ll(config.steps), how.c_str());
}

void plan_on_gpu(const Config& config, const Parallel& parallel, bool has_gpu) {
    const std::string device = has_gpu ? gpu_info(0).name : kAssumedDevice;
    const double device_bytes = has_gpu ? gpu_info(0).memory_bytes : kAssumedDeviceBytes;
    const EnginePlan plan = plan_gpu_engine(engine_options(config, parallel));
    print_linears(plan.linears);
    const double bytes = total_bytes(plan.memory);
    const int ranks = parallel.world->size();
    std::printf("memory  of %s%s, %s%s\n%s", ranks > 1 ? "each " : "", device.c_str(), format_bytes(device_bytes).c_str(), has_gpu ? "" : " (assumed: no GPU here)",
                format_memory_table(plan.memory).c_str());
    if (bytes > device_bytes) std::printf("memory  does not fit: lower --micro-batch%s, or let --micro-batch auto choose\n", ranks > 1 ? ", raise --shard" : "");
    const Peak peak = peak_of(device);
    const bool fp8 = find_recipe(config.recipe).quantizes();
    const double share = fp8 ? kAssumedSolFp8 : kAssumedSolBf16;
    const double sol_of_one = speed_of_light(1.0, flops_per_token(config.model_spec(), config.model_spec().seq_len), peak, fp8);
    if (!(sol_of_one > 0)) std::printf("time    unknown: the peak of %s is not in the table\n", device.c_str());
    else print_time(config, share / sol_of_one * ranks, message("assumed: %.0f %% of the peak of every GEMM's format%s", 100 * share, ranks > 1 ? ", no time lost to the ranks" : ""));
}

// What a step there needs at the least, and a time by the rate of two cores on small models (5 GFLOP/s), where trying it would take long.
void guess_on_reference(const Config& config) {
    constexpr double kAssumedFlops = 5e9;
    const ModelSpec model = config.model_spec();
    std::printf("memory  of the reference device: more than %s of weights, gradients and moments (too large to be tried here)\n",
                format_bytes(4.0 * sizeof(float) * double(make_parameters(model).published_count())).c_str());
    print_time(config, kAssumedFlops / flops_per_token(model, model.seq_len).total(), message("assumed: %.0f GFLOP/s", kAssumedFlops / 1e9));
}

void plan_on_reference(const Config& config) {
    constexpr double kMostTriedFlops = 1e10;
    const ModelSpec shape = config.model_spec();
    if (flops_per_token(shape, shape.seq_len).total() * double(config.micro_batch_tokens()) > kMostTriedFlops) return guess_on_reference(config);
    Config one = config;
    one.global_batch_tokens = config.micro_batch_tokens();
    const std::unique_ptr<Engine> engine = make_engine(one);
    print_linears(engine->linear_table());
    std::printf("memory  of the reference device\n%s", format_memory_table(engine->memory_table()).c_str());
    const ModelSpec model = config.model_spec();
    engine->load(initial_state(make_parameters(model), model, config.seed));
    const std::vector<int> tokens(size_t(one.global_batch_tokens), 1);
    engine->enqueue_step({.step = 0, .learning_rate = 0, .inverse_valid_tokens = 1.0f / float(tokens.size())}, tokens, tokens);
    print_time(config, double(tokens.size()) / engine->collect().seconds, "measured on one micro-batch");
}

}  // namespace

double total_bytes(const std::vector<MemoryRow>& rows) {
    double sum = 0;
    for (const MemoryRow& row : rows) sum += row.bytes;
    return sum;
}

void dry_run(Config config, int ranks) {
    const bool has_gpu = gpu_obstacle().empty();
    const Parallel parallel = planned_parallel(ranks, parallel_options(config));
    if (config.micro_batch == 0) config.micro_batch = largest_micro_batch(config, parallel, has_gpu ? gpu_info(0).memory_bytes : kAssumedDeviceBytes);
    const ModelSpec model = config.model_spec();
    const ParameterList list = make_parameters(model, parallel.group->size());
    print_model(config, list);
    std::printf("step    %lld tokens = %d micro-batches of %d x %d; %lld steps, %s tokens\n", ll(config.global_batch_tokens),
                config.micro_batches_per_step(), config.micro_batch, model.seq_len, ll(config.steps),
                format_rate(double(config.steps) * double(config.global_batch_tokens)).c_str());
    if (ranks > 1) std::printf("ranks   %d: --shard %s, %d groups of %d\n", ranks, config.shard.c_str(), ranks / list.ranks, list.ranks);
    const double state = 3.0 * sizeof(float) * double(list.published_count());
    std::printf("save    %s a checkpoint on disk, %s of host memory while training\n", format_bytes(state).c_str(),
                format_bytes(3.0 * sizeof(float) * double(held_by(list, 0, list.ranks).elements)).c_str());
    if (!config.train.empty()) {
        const DataLoader train = training_data(config);
        std::printf("data    %lld tokens in %zu shards, %.2f epochs\n", ll(train.tokens()), train.shards(),
                    double(config.steps) * double(train.samples_per_step()) / double(train.samples_per_epoch()));
    }
    const Validation validation(config);  // only whether --val can be opened
    if (config.device == "cpu") plan_on_reference(config);
    else plan_on_gpu(config, parallel, has_gpu);
}
