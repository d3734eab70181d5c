// The shards of one split: FOLDER/train_000000.bin, train_000001.bin, ... of a bounded number of tokens each.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/token_file.h"

class ShardSet {
  public:
    ShardSet(std::string folder, std::string split, const TokenFileInfo& info, int64_t shard_tokens)
        : folder_(std::move(folder)), split_(std::move(split)), info_(info), shard_tokens_(shard_tokens) {}

    void append(std::span<const uint32_t> tokens);
    void close();    // everything written, under temporary names
    void publish();  // renamed into place; until then a failure leaves nothing behind
    int64_t tokens() const { return tokens_; }
    int64_t shards() const { return static_cast<int64_t>(writers_.size()); }

  private:
    std::string folder_, split_;
    TokenFileInfo info_;
    int64_t shard_tokens_;
    int64_t tokens_ = 0;
    std::vector<std::unique_ptr<TokenFileWriter>> writers_;  // all but the last are closed
};

// Whether a file name is one that a ShardSet gives: train_ or val_, six digits, .bin.
bool is_shard_name(const std::string& name);
