// The loop over steps with an engine whose losses are made up.
#include "trainer/run/training_loop.h"

#include <gtest/gtest.h>

#include <deque>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/host/test_data_support.h"
#include "trainer/checkpoint.h"

namespace {

// Skips as a device does: a loss or norm above the step's limits leaves the weights as they are.
class MadeUpLosses final : public Engine {
  public:
    MadeUpLosses(std::function<float(int64_t)> loss, int64_t elements) : loss_(std::move(loss)), elements_(size_t(elements)) {}

    void load(const TrainState&) override {}
    std::shared_future<void> snapshot(TrainState& into) override {
        snapshots_of_its_size += into.params.size() == elements_ && into.m.size() == elements_ && into.v.size() == elements_;
        for (std::vector<float>* flat : {&into.params, &into.m, &into.v}) flat->assign(elements_, 0.0f);
        std::promise<void> copied;
        copied.set_value();
        return copied.get_future().share();
    }
    void enqueue_step(const StepInputs& in, std::span<const int>, std::span<const int>) override { enqueued_.push_back(in); }
    StepResult collect() override {
        StepResult result;
        static_cast<StepState&>(result) = {.in = enqueued_.front(), .loss_sum = loss_(enqueued_.front().step), .grad_norm = 1.0f};
        enqueued_.pop_front();
        result.skip_update = result.loss_sum > result.in.loss_limit;
        result.skipped_steps = skipped_ += result.skip_update;
        result.seconds = 1;
        return result;
    }
    int steps_ahead() const override { return 1; }
    std::vector<float> gradients(const StepInputs&, std::span<const int>, std::span<const int>) override { return {}; }
    double evaluate(std::span<const int>, std::span<const int>) override { return 0; }
    void token_losses(std::span<const int>, std::span<const int>, std::span<float>) override {}
    void logits(std::span<const int>, std::span<const int>, std::span<float>) override {}
    uint64_t weights_digest() override { return 0; }
    std::string device_name() const override { return "none"; }
    std::vector<MemoryRow> memory_table() const override { return {}; }
    std::vector<LinearRow> linear_table() const override { return {}; }

    int snapshots_of_its_size = 0;

  private:
    std::function<float(int64_t)> loss_;
    size_t elements_;
    std::deque<StepInputs> enqueued_;
    int64_t skipped_ = 0;
};

Config small_run(const TempFolder& folder, int64_t steps) {
    Config config;
    config.model = "tiny";
    config.n_layers = 1, config.dim = 16, config.n_heads = 1, config.ffn_dim = 16, config.vocab_size = 256, config.seq_len = 16;
    config.recipe = "bf16";
    config.train = write_shard(folder / "train.bin", 0, 200, 256);
    config.micro_batch = 1;
    config.global_batch_tokens = 16;
    config.steps = steps;
    config.warmup_steps = 0;
    config.checkpoint_every = 0;
    config.log_every = steps;
    config.out = folder / "run";
    return config;
}

MadeUpLosses made_up(const Config& config, std::function<float(int64_t)> loss) {
    return {std::move(loss), make_parameters(config.model_spec()).flat_elements};
}

// The step records of a whole run.
std::vector<nlohmann::json> run(const Config& config, MadeUpLosses& engine) {
    const ParameterList list = make_parameters(config.model_spec());
    const Held held = held_by(list, 0, 1);
    World world(Launch{}, 1);
    const Parallel parallel;
    const DataLoader data({.shards = {config.train}, .seq_len = 16, .samples_per_step = 1});
    const Validation validation(config);
    ProfiledSteps profile(config);
    RunLog log({.out = config.out, .total_steps = config.steps, .log_every = config.log_every}, {});
    TrainState state;
    TrainingLoop({.config = config, .engine = engine, .list = list, .train = data, .validation = validation, .log = log, .choices = nullptr, .samples = nullptr,
                  .profile = profile, .state = state, .world = world, .held = held, .parallel = parallel}).run();
    std::vector<nlohmann::json> steps;
    std::istringstream lines(read_file(config.out + "/log.jsonl"));
    for (std::string line; std::getline(lines, line);) {
        nlohmann::json record = nlohmann::json::parse(line);
        if (record.at("kind") == "step") steps.push_back(std::move(record));
    }
    return steps;
}

// A detector that took the skipped steps in would call the end of a long spike normal, and learn from it.
TEST(TrainingLoop, SkippedStepsAreNoneThatLaterOnesAreComparedWith) {
    const TempFolder folder;
    Config config = small_run(folder, 80);
    config.outlier_window = 16;
    config.skip_outliers = "loss";
    const auto in_spike = [](int64_t step) { return step >= 30 && step < 60; };
    MadeUpLosses engine = made_up(config, [&](int64_t step) { return in_spike(step) ? 50.0f : step % 2 ? 3.0f : 3.1f; });
    const std::vector<nlohmann::json> steps = run(config, engine);
    ASSERT_EQ(steps.size(), 80u);
    for (int64_t step = 0; step < 80; ++step)
        EXPECT_EQ(steps[size_t(step)].at("skipped").get<bool>(), in_spike(step)) << "step " << step << ": " << steps[size_t(step)];
    EXPECT_EQ(steps.back().at("skipped_steps"), 30);
}

// Into memory that has its size before the first snapshot.
TEST(TrainingLoop, SavesEverySoManySteps) {
    const TempFolder folder;
    Config config = small_run(folder, 12);
    config.checkpoint_every = 5;
    config.keep = 0;
    MadeUpLosses engine = made_up(config, [](int64_t) { return 3.0f; });
    run(config, engine);
    EXPECT_EQ(engine.snapshots_of_its_size, 3);
    for (const int step : {5, 10, 12}) EXPECT_TRUE(verify_checkpoint(config.out + message("/step_%06d", step), CheckpointFiles::all));
}

}  // namespace
