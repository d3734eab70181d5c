// Token files -> batches. The global batch of a step is a pure function of (shards, seed, step, sizes): nothing is stored
// between calls, so resuming needs only the step number, and ranks take slices of the same global batch.
//
//   sample   T + 1 consecutive tokens of one shard at offset i * T: T inputs, and the T targets one further on. The tokens
//            behind a shard's last whole sample (fewer than T + 1) are not used.
//   epoch    every sample once, in an order of its own that follows from (seed, epoch)
//   batch    samples [step * samples_per_step, (step + 1) * samples_per_step) of the endless row of epochs, so a batch
//            at an epoch's end takes its rest from the next epoch
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "data/token_file.h"

// The shards meant by `where`, in byte order of their names: for a folder, its *.bin files whose name contains `split`
// ("train", "val"); otherwise the files that match `where` as a glob pattern. None is an error.
std::vector<std::string> find_shards(const std::string& where, const std::string& split);

struct DataLoaderOptions {
    std::vector<std::string> shards;
    int64_t seq_len = 1024;
    int64_t samples_per_step = 1;
    uint64_t seed = 0;
    bool shuffle = true;     // false: sample i is the i-th chunk, for validation
    int32_t vocab_size = 0;  // a token or a shard's claim beyond it is an error; 0: not checked
};

class DataLoader {
  public:
    explicit DataLoader(DataLoaderOptions options);

    // Samples [first_sample, first_sample + n_samples) of the global batch of `step`.
    // inputs, targets: (n_samples, seq_len). Thread-safe.
    void fill(int64_t step, int64_t first_sample, int64_t n_samples, int32_t* inputs, int32_t* targets) const;

    int64_t samples_per_epoch() const { return first_sample_.back(); }
    int64_t samples_per_step() const { return options_.samples_per_step; }
    int64_t seq_len() const { return options_.seq_len; }
    int64_t tokens() const { return tokens_; }  // in all shards, also those behind the last whole samples
    size_t shards() const { return shards_.size(); }
    // Of the shards' sizes and of tokens at a few hundred places: tells another text of the same length, in no time.
    uint64_t hash() const { return hash_; }
    // What the shards claim: the largest vocabulary, and the tokenizer; 0 or unknown where no header says.
    const TokenFileInfo& info() const { return info_; }
    int32_t vocab_size() const { return info_.vocab_size; }

  private:
    void check_agreement(const TokenFile& shard);
    uint64_t hash_of_places() const;
    void read_sample(int64_t sample, int32_t* inputs, int32_t* targets) const;

    DataLoaderOptions options_;
    std::vector<TokenFile> shards_;
    std::vector<int64_t> first_sample_;  // (shards + 1): shard s holds samples [first_sample_[s], first_sample_[s + 1])
    TokenFileInfo info_;
    int64_t tokens_ = 0;
    uint64_t hash_ = 0;
};
