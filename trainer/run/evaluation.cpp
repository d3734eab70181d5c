#include "trainer/run/evaluation.h"

#include <algorithm>
#include <vector>

Validation::Validation(const Config& config) : T_(config.model_spec().seq_len), B_(config.micro_batch) {
    if (config.val.empty()) return;
    loader_ = std::make_unique<DataLoader>(DataLoaderOptions{.shards = find_shards(config.val, "val"), .seq_len = T_, .samples_per_step = B_,
                                                             .shuffle = false, .vocab_size = config.model_spec().vocab_size});
    samples_ = std::min(loader_->samples_per_epoch(), config.eval_tokens / T_);
}

Validation::Result Validation::run(Engine& engine, Communicator& ranks, const std::function<void()>& before_each) const {
    std::vector<int> inputs(size_t(B_ * T_)), targets(size_t(B_ * T_));
    const int64_t batches = (samples_ + B_ - 1) / B_, turns = (batches + ranks.size() - 1) / ranks.size();
    std::vector<double> losses(size_t(turns * ranks.size()));  // of each rank, its turns
    for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t batch = turn * ranks.size() + ranks.rank();
        if (before_each) before_each();
        loader_->fill(std::min(batch, batches - 1), 0, B_, inputs.data(), targets.data());
        const int64_t valid = std::clamp<int64_t>(samples_ - batch * B_, 0, B_);  // mask what lies behind the last sample
        std::fill(targets.begin() + valid * T_, targets.end(), -1);
        losses[size_t(ranks.rank() * turns + turn)] = engine.evaluate(inputs, targets);
    }
    ranks.all_gather(losses.data(), turns * int64_t(sizeof(double)));
    double sum = 0;
    for (int64_t batch = 0; batch < batches; ++batch) sum += losses[size_t(batch % ranks.size() * turns + batch / ranks.size())];
    return {sum / double(samples_ * T_), samples_ * T_};
}
