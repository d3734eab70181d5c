// Draws a token from logits.
#pragma once
#include <cstdint>
#include <span>

struct SamplerOptions {
    float temperature = 1.0f;  // 0: always the likeliest token
    int top_k = 0;             // only the likeliest so many; 0: all
    uint64_t seed = 0;
};

// What a draw depends on besides the logits: nothing of it is the order of calls or the size of a batch.
struct DrawKey {
    int64_t step;  // of training, so that samples of one run differ
    int sample, position;
};

// Softmax over logits / temperature of the top_k likeliest, in double. Of equal logits the lower token comes first.
// An Error for logits without a finite maximum.
int draw_token(std::span<const float> logits, const SamplerOptions& options, const DrawKey& key);
