#include "trainer/run/micro_batch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/cuda_check.h"
#include "trainer/checkpoint.h"
#include "trainer/gpu_info.h"
#include "trainer/metrics.h"
#include "trainer/run/plan.h"
#include "trainer/run/start.h"

namespace {

constexpr int kMostCandidates = 4;
constexpr int64_t kReferenceTokens = 4096;  // of a micro-batch on the reference device: more only takes more memory there
constexpr double kReserve = 768.0 * (1 << 20);  // for graphs, kernels' code and what tuning borrows

bool on_gpu(const Config& config) { return config.device != "cpu" && gpu_obstacle().empty(); }

double free_device_memory() {
    size_t free_bytes = 0, all = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &all));
    return double(free_bytes);
}

bool fits(const Config& config, const Parallel& parallel, double free_bytes) {
    if (config.device == "cpu") return config.micro_batch_tokens() <= std::max<int64_t>(kReferenceTokens, config.model_spec().seq_len);
    return total_bytes(plan_gpu_engine(engine_options(config, parallel)).memory) + kReserve <= free_bytes;
}

// The largest that divide a rank's batch and fit, largest first.
std::vector<int> candidates(Config config, const Parallel& parallel, double free_bytes, size_t most) {
    const int64_t ranks = parallel.world->size(), all = config.global_batch_tokens / config.model_spec().seq_len, sequences = all / ranks;
    REQUIRE(all % ranks == 0, "--global-batch-tokens %lld: is %lld sequences, must be a multiple of the %lld ranks", (long long)config.global_batch_tokens,
            (long long)all, (long long)ranks);
    std::vector<int> found;
    for (int64_t size = std::min<int64_t>(sequences, 4096); size >= 1 && found.size() < most; --size) {
        if (sequences % size != 0) continue;
        config.micro_batch = int(size);
        if (find_recipe(config.recipe).quantizes() && config.micro_batch_tokens() % 16 != 0) continue;
        if (config.micro_batch_tokens() <= (int64_t(1) << 30) && fits(config, parallel, free_bytes)) found.push_back(int(size));
    }
    REQUIRE(!found.empty(), "--micro-batch auto: not even one sequence of %d tokens fits: choose a smaller --model or --seq-len", config.model_spec().seq_len);
    return found;
}

// Tokens a second of the median of a few steps, after one that captures graphs; two micro-batches a step if there are so many.
double measure(Config config, const TrainState& start) {
    const int64_t micro = config.micro_batch_tokens();
    config.global_batch_tokens = std::min<int64_t>(config.global_batch_tokens / micro, 2) * micro;
    const std::unique_ptr<Engine> engine = make_engine(config);
    engine->load(start);
    std::vector<int> tokens(size_t(config.global_batch_tokens));
    uint32_t state = 12345;
    for (int& token : tokens) token = int((state = state * 1664525u + 1013904223u) >> 8) % config.model_spec().vocab_size;
    std::vector<double> seconds;
    for (int64_t step = 0; step < 4; ++step) {
        engine->enqueue_step({.step = step, .learning_rate = 0, .inverse_valid_tokens = 1.0f / float(tokens.size())}, tokens, tokens);
        const double s = engine->collect().seconds;
        if (step > 0) seconds.push_back(s);
    }
    std::sort(seconds.begin(), seconds.end());
    return double(tokens.size()) / seconds[1];
}

int micro_batch_of(const std::string& its_config_toml) {
    Config saved;
    read_toml(its_config_toml, "the checkpoint's configuration", saved);
    return saved.micro_batch;
}

}  // namespace

int largest_micro_batch(const Config& config, const Parallel& parallel, double device_bytes) { return candidates(config, parallel, device_bytes, 1).front(); }

Config choose_micro_batch(Config config) {
    if (config.micro_batch > 0) return config;
    if (config.device != "cpu" && !on_gpu(config)) {
        REQUIRE(config.device == "auto", "--device gpu: %s", gpu_obstacle().c_str());
        config.device = "cpu";
    }
    std::string checkpoint = config.resume;
    if (checkpoint == "auto") checkpoint = find_latest(config.out);
    else if (!checkpoint.empty()) checkpoint = find_checkpoint(checkpoint, "--resume");
    if (!checkpoint.empty()) {
        config.micro_batch = micro_batch_of(load_checkpoint_info(checkpoint).config_toml);
        std::printf("micro-batch auto: %d, as in checkpoint %s\n", config.micro_batch, checkpoint.c_str());
    } else {
        const ModelSpec model = config.model_spec();
        const TrainState start = initial_state(make_parameters(model), model, config.seed);
        double best = 0;
        int choice = 0;
        for (const int size : candidates(config, {}, on_gpu(config) ? free_device_memory() : 0, kMostCandidates)) {
            config.micro_batch = size;
            const double rate = measure(config, start);
            std::printf("micro-batch auto: %d sequences: %s tok/s\n", size, format_rate(rate).c_str());
            std::fflush(stdout);
            if (rate > best) best = rate, choice = size;
        }
        config.micro_batch = choice;
        std::printf("micro-batch auto: %d\n", choice);
    }
    std::fflush(stdout);
    validate(config);
    return config;
}

void note_other_micro_batch(const Config& config, const std::string& checkpoint, const std::string& its_config_toml) {
    int before = 0;
    try {
        before = micro_batch_of(its_config_toml);
    } catch (const Error&) {  // an option that this version doesn't know: then it cannot be told
    }
    if (before > 0 && before != config.micro_batch)
        std::printf("note: checkpoint %s was trained with --micro-batch %d and goes on with %d: sums in another order, not the same bits\n",
                    checkpoint.c_str(), before, config.micro_batch);
}
