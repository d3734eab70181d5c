// Shapes of the models. One row a model; --n-layers, --dim, ... override fields of the chosen row.
#pragma once
#include <cstdint>
#include <span>
#include <string>

struct ModelSpec {
    std::string name;
    int n_layers;    // L
    int dim;         // C, width of the residual stream
    int n_heads;     // H
    int ffn_dim;     // width of the MLP
    int vocab_size;  // V, as published; see padded_vocab()
    int seq_len;     // T: context length and rows of the position embedding

    int head_dim() const { return dim / n_heads; }

    // Rows of the token embedding in memory: a multiple of 128, so that the head's GEMMs have legal, fast dimensions.
    // The extra rows are zero, receive zero gradient, take no part in the softmax and never reach a file.
    int padded_vocab() const { return (vocab_size + 127) / 128 * 128; }
};

std::span<const ModelSpec> model_table();

// The row of that name; an unknown name is an Error that lists the table.
ModelSpec find_model(const std::string& name);

// Throws Error naming the field, its value and the rule.
void validate(const ModelSpec& spec);

// FLOPs of one token, forward and backward: 6 per matmul parameter (head included, lookup tables not), and causal
// attention counted half: 6 * n_layers * (n_heads * head_dim) * T.
struct TokenFlops {
    double block_linears, head, attention;
    double total() const { return block_linears + head + attention; }
};
TokenFlops flops_per_token(const ModelSpec& spec, int T);
