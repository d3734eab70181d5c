#include "trainer/model_spec.h"

#include "kernels/common/check.h"

std::span<const ModelSpec> model_table() {
    // Radford et al. 2019; sizes as in the published checkpoints. "tiny" is a byte-level model that a CPU trains in
    // two minutes; "mini" has GPT-2's vocabulary and is for tests.
    static const ModelSpec kTable[] = {
        {.name = "gpt2-124M", .n_layers = 12, .dim = 768, .n_heads = 12, .ffn_dim = 3072, .vocab_size = 50257, .seq_len = 1024},
        {.name = "gpt2-355M", .n_layers = 24, .dim = 1024, .n_heads = 16, .ffn_dim = 4096, .vocab_size = 50257, .seq_len = 1024},
        {.name = "gpt2-774M", .n_layers = 36, .dim = 1280, .n_heads = 20, .ffn_dim = 5120, .vocab_size = 50257, .seq_len = 1024},
        {.name = "gpt2-1558M", .n_layers = 48, .dim = 1600, .n_heads = 25, .ffn_dim = 6400, .vocab_size = 50257, .seq_len = 1024},
        {.name = "mini", .n_layers = 4, .dim = 128, .n_heads = 4, .ffn_dim = 512, .vocab_size = 50257, .seq_len = 256},
        {.name = "tiny", .n_layers = 2, .dim = 64, .n_heads = 4, .ffn_dim = 256, .vocab_size = 257, .seq_len = 64},
    };
    return kTable;
}

ModelSpec find_model(const std::string& name) {
    std::string known;
    for (const ModelSpec& row : model_table()) {
        if (row.name == name) return row;
        known += (known.empty() ? "" : ", ") + row.name;
    }
    throw Error(message("--model %s: no such model; choose one of %s", name.c_str(), known.c_str()));
}

void validate(const ModelSpec& s) {
    constexpr int kMostLayers = 2048, kMostFfn = 1 << 18;
    REQUIRE(s.n_layers >= 1 && s.n_layers <= kMostLayers, "--n-layers %d: must be at least 1, at most %d", s.n_layers, kMostLayers);
    REQUIRE(s.n_heads >= 1, "--n-heads %d: must be at least 1", s.n_heads);
    REQUIRE(s.dim >= 8 && s.dim % 8 == 0 && s.dim <= 16384, "--dim %d: must be a multiple of 8 from 8 to 16384", s.dim);
    REQUIRE(s.dim % s.n_heads == 0, "--n-heads %d: must divide --dim %d", s.n_heads, s.dim);
    REQUIRE(s.head_dim() % 8 == 0 && s.head_dim() <= 256,
            "--dim %d / --n-heads %d = head dimension %d: must be a multiple of 8, at most 256", s.dim, s.n_heads, s.head_dim());
    REQUIRE(s.ffn_dim >= 8 && s.ffn_dim % 8 == 0 && s.ffn_dim <= kMostFfn, "--ffn-dim %d: must be a positive multiple of 8, at most %d", s.ffn_dim, kMostFfn);
    constexpr int kMost = 1 << 24;  // of rows; leaves room for products of dimensions in 64 bits, and for padding in 32
    REQUIRE(s.vocab_size >= 2 && s.vocab_size <= kMost, "--vocab-size %d: must be from 2 to %d", s.vocab_size, kMost);
    REQUIRE(s.seq_len >= 1 && s.seq_len <= kMost, "--seq-len %d: must be from 1 to %d", s.seq_len, kMost);
}

TokenFlops flops_per_token(const ModelSpec& s, int T) {
    const double C = s.dim;
    return {.block_linears = 6.0 * s.n_layers * (4 * C * C + 2 * C * s.ffn_dim),
            .head = 6.0 * C * s.vocab_size,
            .attention = 6.0 * s.n_layers * C * T};
}
