#include "trainer/run/evaluation.h"

#include <algorithm>
#include <vector>

Validation::Validation(const Config& config) : T_(config.model_spec().seq_len), B_(config.micro_batch) {
    if (config.val.empty() || config.eval_every == 0) return;
    loader_ = std::make_unique<DataLoader>(DataLoaderOptions{.shards = find_shards(config.val, "val"), .seq_len = T_, .samples_per_step = B_,
                                                             .shuffle = false, .vocab_size = config.model_spec().vocab_size});
    samples_ = std::min(loader_->samples_per_epoch(), config.eval_tokens / T_);
}

Validation::Result Validation::run(Engine& engine) const {
    std::vector<int> inputs(size_t(B_ * T_)), targets(size_t(B_ * T_));
    double sum = 0;
    for (int64_t first = 0; first < samples_; first += B_) {
        loader_->fill(first / B_, 0, B_, inputs.data(), targets.data());
        const int64_t valid = std::min(B_, samples_ - first);  // the last micro-batch may be part: mask what lies behind
        std::fill(targets.begin() + valid * T_, targets.end(), -1);
        sum += engine.evaluate(inputs, targets);
    }
    return {sum / double(samples_ * T_), samples_ * T_};
}
