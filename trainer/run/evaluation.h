// Validation: the first sequences of the validation data, always the same ones, however many a micro-batch holds. The data is
// opened whether or not it will be used (--eval-every 0): a --val that is wrong is an Error at the start.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

#include "data/loader.h"
#include "trainer/config.h"
#include "trainer/engine.h"

class Validation {
  public:
    explicit Validation(const Config& config);
    explicit operator bool() const { return loader_ != nullptr; }  // false: no --val

    std::string tokenizer() const { return tokenizer_name(loader_ ? loader_->info().tokenizer : TokenizerId::unknown); }  // of the data

    struct Result {
        double loss;  // mean of a token
        int64_t tokens;
    };
    // Ranks take turns; all call it. The sum is in the order of micro-batches, whatever the number of ranks.
    // Before each micro-batch of this rank `before_each` is called, if given: it may throw, on all ranks alike, to abandon the rest.
    Result run(Engine& engine, Communicator& ranks, const std::function<void()>& before_each = {}) const;

  private:
    int64_t T_, B_;
    int64_t samples_ = 0;
    std::unique_ptr<DataLoader> loader_;
};
