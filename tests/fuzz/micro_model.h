// The smallest legal model, so that its files are seeds of a few kilobytes.
#pragma once
#include "trainer/model_spec.h"

inline ModelSpec micro_model() {
    return {.name = "micro", .n_layers = 1, .dim = 16, .n_heads = 1, .ffn_dim = 16, .vocab_size = 4, .seq_len = 2};
}
