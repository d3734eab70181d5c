// train_gpt_fp8: trains GPT models in FP8 on Hopper GPUs. This file is the program: options -> objects -> step loop.
//
//   options                 trainer/config          what a step computes    trainer/gpu_model, block, linear
//   model and recipe rows   trainer/model_spec, recipe     how it is launched      trainer/gpu_engine
//   tokens                  data/loader             the same on the CPU     trainer/reference
//   log, checkpoints        trainer/metrics, checkpoint    kernels                 kernels/
#include <chrono>
#include <csignal>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <memory>
#include <vector>

#include "data/loader.h"
#include "kernels/common/check.h"
#include "trainer/checkpoint.h"
#include "trainer/config.h"
#include "trainer/engine.h"
#include "trainer/gpu_info.h"
#include "trainer/metrics.h"

namespace {

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C ends the program at once.
volatile std::sig_atomic_t stop_requested = 0;
void request_stop(int signal) {
    stop_requested = 1;
    std::signal(signal, SIG_DFL);
}

// ---------------------------------------------------------------------------------------------------------------------
// Start-up: which device, which engine, where the weights come from

std::unique_ptr<Engine> make_engine(const Config& config) {
    const EngineOptions options{.model = config.model_spec(),
                                .recipe = find_recipe(config.recipe),
                                .micro_batch = config.micro_batch,
                                .seq_len = config.model_spec().seq_len,
                                .micro_batches_per_step = config.micro_batches_per_step(),
                                .adamw = config.adamw(),
                                .use_graphs = !config.no_graph,
                                .deterministic = config.deterministic,
                                .gemm_cache = config.gemm_cache};
    if (config.device == "cpu") return make_reference_engine(options);
    const std::string obstacle = gpu_obstacle();
    if (obstacle.empty()) {
        std::error_code ignored;  // the engine warns when it cannot write the file
        std::filesystem::create_directories(std::filesystem::path(config.gemm_cache).parent_path(), ignored);
        return make_gpu_engine(options);
    }
    REQUIRE(config.device == "auto", "--device gpu: %s", obstacle.c_str());
    std::printf("no usable GPU (%s): using the reference device, slow and meant for small models\n", obstacle.c_str());
    return make_reference_engine(options);
}

struct StartPoint {
    TrainState state;
    std::string resumed_from;  // folder, "" for a fresh start
};

// A folder belongs to one run: its log and checkpoints are never mixed with another's.
void require_own_folder(const Config& config, const std::string& resumed_from) {
    namespace fs = std::filesystem;
    const bool used = fs::exists(fs::path(config.out) / "log.jsonl");
    const bool own = !resumed_from.empty() && fs::weakly_canonical(fs::path(resumed_from) / "..") == fs::weakly_canonical(config.out);
    REQUIRE(!used || own || config.resume == "auto", "--out %s: holds the log.jsonl of another run; continue it with --resume auto, or choose another folder",
            config.out.c_str());
}

StartPoint start_point(const Config& config, const ParameterList& list, const DataLoader& train) {
    std::string path = config.resume;
    if (path == "auto") path = find_latest(config.out);
    require_own_folder(config, path);
    if (path.empty()) return {initial_state(list, config.model_spec(), config.seed), ""};
    Checkpoint checkpoint = load_checkpoint(path, list, config.model_spec());
    // The data order is a function of seed, step and batch: another one would repeat and skip text without a word.
    REQUIRE(checkpoint.info.seed == config.seed, "--seed %llu: checkpoint %s was trained with seed %llu",
            (unsigned long long)config.seed, path.c_str(), (unsigned long long)checkpoint.info.seed);
    REQUIRE(checkpoint.info.tokens_per_step == config.global_batch_tokens, "--global-batch-tokens %lld: checkpoint %s was trained with %lld",
            (long long)config.global_batch_tokens, path.c_str(), (long long)checkpoint.info.tokens_per_step);
    REQUIRE(checkpoint.info.samples_per_epoch == train.samples_per_epoch(), "--train %s: has %lld samples an epoch; checkpoint %s was trained on other data, with %lld",
            config.train.c_str(), (long long)train.samples_per_epoch(), path.c_str(), (long long)checkpoint.info.samples_per_epoch);
    REQUIRE(checkpoint.state.step < config.steps, "--steps %lld: checkpoint %s has finished %lld steps: nothing to do", (long long)config.steps,
            path.c_str(), (long long)checkpoint.state.step);
    if (checkpoint.info.recipe != config.recipe)
        std::printf("note: checkpoint %s was trained with recipe %s and goes on with %s\n", path.c_str(), checkpoint.info.recipe.c_str(), config.recipe.c_str());
    return {std::move(checkpoint.state), path};
}

CheckpointInfo checkpoint_info(const Config& config, const Engine& engine, const DataLoader& train) {
    std::string choices;
    for (const std::string& line : engine.gemm_choices()) choices += line + "\n";
    return {.model = config.model_spec(), .recipe = config.recipe, .seed = config.seed,
            .tokens_per_step = config.global_batch_tokens, .samples_per_epoch = train.samples_per_epoch(), .config_toml = to_toml(config), .gemm_choices = choices};
}

void print_start(const Config& config, const Engine& engine, const ParameterList& list, const DataLoader& train, const StartPoint& start) {
    const ModelSpec m = config.model_spec();
    std::printf("train_gpt_fp8 %s | %s", git_commit().c_str(), engine.device_name().c_str());
    for (const auto& [name, version] : library_versions()) std::printf(" | %s %s", name.c_str(), version.c_str());
    std::printf("\nmodel   %s: %d layers, width %d, %d heads, ffn %d, vocabulary %d (%d in memory), context %d: %lld parameters\n",
                m.name.c_str(), m.n_layers, m.dim, m.n_heads, m.ffn_dim, m.vocab_size, m.padded_vocab(), m.seq_len, (long long)list.published_count());
    std::printf("recipe  %s: %s\n", config.recipe.c_str(), find_recipe(config.recipe).description.c_str());
    for (const LinearRow& row : engine.linear_table()) std::printf("  %-44s %-5s %s\n", row.name.c_str(), row.precision.c_str(), row.reason.c_str());
    std::printf("data    %lld tokens in %zu shards, %lld samples an epoch\n", (long long)train.tokens(), train.shards(), (long long)train.samples_per_epoch());
    const double epochs = double(config.steps) * double(train.samples_per_step()) / double(train.samples_per_epoch());
    std::printf("step    %lld tokens = %d micro-batches of %d x %d; %lld steps, %.2f epochs\n", (long long)config.global_batch_tokens,
                config.micro_batches_per_step(), config.micro_batch, m.seq_len, (long long)config.steps, epochs);
    std::printf("memory\n%s", format_memory_table(engine.memory_table()).c_str());
    if (start.resumed_from.empty()) std::printf("start   random weights, seed %llu\n", (unsigned long long)config.seed);
    else std::printf("start   step %lld of %s\n", (long long)start.state.step, start.resumed_from.c_str());
    std::fflush(stdout);
}

// ---------------------------------------------------------------------------------------------------------------------
// Evaluation: the first batches of the validation data, always the same

class Validation {
  public:
    explicit Validation(const Config& config) : T_(config.model_spec().seq_len), B_(config.micro_batch) {
        if (config.val.empty() || config.eval_every == 0) return;
        loader_ = std::make_unique<DataLoader>(DataLoaderOptions{.shards = find_shards(config.val, "val"), .seq_len = T_, .samples_per_step = B_,
                                                                 .shuffle = false, .vocab_size = config.model_spec().vocab_size});
        const int64_t all_batches = (loader_->samples_per_epoch() + B_ - 1) / B_;
        samples_ = std::min(loader_->samples_per_epoch(), std::min(config.eval_batches, all_batches) * B_);
    }
    explicit operator bool() const { return loader_ != nullptr; }

    struct Result {
        double loss;
        int64_t tokens;
    };
    Result run(Engine& engine) const {
        std::vector<int> inputs(size_t(B_ * T_)), targets(size_t(B_ * T_));
        double sum = 0;
        for (int64_t first = 0; first < samples_; first += B_) {
            loader_->fill(first / B_, 0, B_, inputs.data(), targets.data());
            const int64_t valid = std::min(B_, samples_ - first);  // the last batch may be part: mask what wrapped around
            std::fill(targets.begin() + valid * T_, targets.end(), -1);
            sum += engine.evaluate(inputs, targets);
        }
        return {sum / double(samples_ * T_), samples_ * T_};
    }

  private:
    int64_t T_, B_;
    int64_t samples_ = 0;
    std::unique_ptr<DataLoader> loader_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The loop

class Training {
  public:
    Training(const Config& config, Engine& engine, const ParameterList& list, const DataLoader& train, const Validation& validation, RunLog& log)
        : config_(config), engine_(engine), list_(list), train_(train), validation_(validation), log_(log),
          inputs_(size_t(config.global_batch_tokens)), targets_(size_t(config.global_batch_tokens)) {}

    void run(TrainState& state) {
        int64_t step = state.step;
        if (step == 0) evaluate(0);
        while (step < config_.steps && !stop_requested) {
            enqueue(step++);
            const bool checkpoint = config_.checkpoint_every > 0 && step % config_.checkpoint_every == 0 && step < config_.steps;
            const bool evaluation = config_.eval_every > 0 && step % config_.eval_every == 0 && step < config_.steps;
            const size_t ahead = checkpoint || evaluation ? 0 : size_t(engine_.steps_ahead());
            while (pending_.size() > ahead) finish_one();
            if (evaluation) evaluate(step);
            if (checkpoint) save(state, step);
        }
        while (!pending_.empty()) finish_one();
        const bool stopped = step < config_.steps;  // whoever asked may not wait for an evaluation
        if (!stopped) evaluate(step);
        save(state, step);
        if (stopped) std::printf("stopped after step %lld; the same command with --out %s --resume auto goes on\n", (long long)step, config_.out.c_str());
    }

  private:
    struct Pending {
        int64_t step;
        float learning_rate;
    };

    void enqueue(int64_t step) {
        train_.fill(step, 0, train_.samples_per_step(), inputs_.data(), targets_.data());
        const StepInputs in{.step = step, .learning_rate = learning_rate(config_.lr_schedule(), step),
                            .inverse_valid_tokens = 1.0f / float(config_.global_batch_tokens)};
        pending_.push_back({step, in.learning_rate});
        engine_.enqueue_step(in, inputs_, targets_);
    }

    void finish_one() {
        const StepResult result = engine_.collect();
        const Pending p = pending_.front();
        pending_.pop_front();
        log_.step({.steps_done = p.step + 1, .loss = result.loss_sum, .grad_norm = result.grad_norm, .learning_rate = p.learning_rate,
                   .seconds = result.seconds, .tokens = config_.global_batch_tokens,
                   .skipped = result.skip_update != 0, .skipped_steps = result.skipped_steps});
        skipped_in_a_row_ = result.skip_update ? skipped_in_a_row_ + 1 : 0;
        REQUIRE(skipped_in_a_row_ < kMostSkippedInARow, "%d steps in a row were not finite and left the weights as they are: lower --lr and resume from an earlier checkpoint",
                kMostSkippedInARow);
    }

    void evaluate(int64_t steps_done) {
        if (!validation_) return;
        const double start = now_s();
        const Validation::Result result = validation_.run(engine_);
        log_.eval(steps_done, result.loss, result.tokens, now_s() - start);
    }

    void save(TrainState& state, int64_t steps_done) {
        const double start = now_s();
        engine_.save(state);
        state.step = steps_done;
        const std::string path = save_checkpoint(config_.out, checkpoint_info(config_, engine_, train_), list_, state);
        prune_checkpoints(config_.out, config_.keep);
        log_.checkpoint(steps_done, path, now_s() - start);
    }

    const Config& config_;
    Engine& engine_;
    const ParameterList& list_;
    const DataLoader& train_;
    const Validation& validation_;
    RunLog& log_;
    std::vector<int> inputs_, targets_;  // the batch being made
    std::deque<Pending> pending_;
    static constexpr int kMostSkippedInARow = 100;  // by then it is not one bad batch
    int skipped_in_a_row_ = 0;
};

std::string command_line(int argc, char** argv) {
    std::string text;
    for (int i = 0; i < argc; ++i) {
        if (i > 0) text += ' ';
        text += argv[i];
    }
    return text;
}

void run(int argc, char** argv) {
    const double program_start = now_s();
    const Config config = parse_config(argc, argv);
    if (config.print_config) {
        std::fputs(to_toml(config).c_str(), stdout);
        return;
    }
    const ModelSpec model = config.model_spec();
    const ParameterList list = make_parameters(model);
    const DataLoader train({.shards = find_shards(config.train, "train"), .seq_len = model.seq_len,
                            .samples_per_step = config.global_batch_tokens / model.seq_len, .seed = config.seed, .shuffle = true,
                            .vocab_size = model.vocab_size});
    const Validation validation(config);

    StartPoint start = start_point(config, list, train);
    const std::unique_ptr<Engine> engine = make_engine(config);
    engine->load(start.state);
    print_start(config, *engine, list, train, start);

    double memory = 0;
    for (const MemoryRow& row : engine->memory_table()) memory += row.bytes;
    RunLog log({.out = config.out, .resuming = !config.resume.empty(), .first_step = start.state.step, .total_steps = config.steps,
                .log_every = config.log_every, .flops = flops_per_token(model, model.seq_len),
                .fp8_linears = find_recipe(config.recipe).quantizes(), .memory_bytes = memory, .device = engine->device_name()},
               {.command = command_line(argc, argv), .config_toml = to_toml(config), .commit = git_commit(), .versions = library_versions(),
                .model = model.name, .recipe = config.recipe, .parameters = list.published_count(), .tokens_per_step = config.global_batch_tokens});
    std::printf("ready after %s\n", format_duration(now_s() - program_start).c_str());
    std::signal(SIGINT, request_stop);
    std::signal(SIGTERM, request_stop);
    Training(config, *engine, list, train, validation, log).run(start.state);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        run(argc, argv);
        return 0;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "error: not enough host memory for this model: choose a smaller --model or --micro-batch\n");
        return 1;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
}
