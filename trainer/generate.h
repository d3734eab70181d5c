// Continues a text, token by token, with the model's own forward pass over the whole context. There is no cache of keys and
// values: every token costs a forward pass of one micro-batch, whatever the number of samples in it.
#pragma once
#include <functional>
#include <span>

#include "trainer/engine.h"
#include "trainer/sampler.h"

struct GenerateOptions {
    EngineOptions shape;      // of the engine; logit_rows samples at most
    SamplerOptions sampler;
    int samples = 1;
    int max_tokens = 0;       // of a sample
    int vocab_size = 0;       // only tokens below are drawn; 0: all of the model's, which may have more than the tokenizer
    int stop_token = -1;      // ends a sample and is not reported; -1: none
    int64_t step = 0;         // of training, for the draws
    // Several ranks that gather weights for every pass: puts rank 0's tokens of a round in place of this rank's, so that all
    // make the same passes even if their logits differ in the last place.
    std::function<void(std::span<int> tokens)> agree = {};
    std::function<void()> before_each = {};  // round, if given: it may throw, on all ranks alike, to abandon the rest
};

// Calls on_token(sample, token) for every token as it is drawn, round by round, until each sample has its tokens or has
// stopped. Contexts longer than seq_len lose their beginning. In a micro-batch every row and every position is text of
// the samples, so that a recipe with one scale a tensor sees no padding; still, its logits depend a little on the rows.
void generate(Engine& engine, std::span<const int> prompt, const GenerateOptions& options,
              const std::function<void(int sample, int token)>& on_token);
