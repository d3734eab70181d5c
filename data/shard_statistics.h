// What a token file holds, beyond its header: one pass over its tokens.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "data/token_file.h"

struct TokenCount {
    uint32_t token;
    int64_t count;
};

struct ShardStatistics {
    int64_t tokens = 0;
    uint32_t largest_token = 0;
    int64_t distinct_tokens = 0;
    double entropy_nats = 0;               // of the tokens' frequencies
    std::vector<TokenCount> most_frequent;  // at most kMostFrequent, the smaller token first among equals
    int64_t text_bytes = 0;                // decoded, end-of-text not counted; 0 without a tokenizer

    // Documents begin with end-of-text; 0 where the header does not say which token that is. A shard that begins inside
    // a document counts only those that begin in it.
    int64_t documents = 0;
    int64_t shortest_document = 0, median_document = 0, longest_document = 0;  // tokens, end-of-text included
};
inline constexpr size_t kMostFrequent = 10;

// token_bytes[t]: bytes of token t; empty: text_bytes stays 0. Throws Error where a token is not below the header's vocabulary.
ShardStatistics shard_statistics(const TokenFile& file, std::span<const uint32_t> token_bytes);
