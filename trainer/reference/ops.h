// GPT-2's operations in float, forward and backward. Formulas are those of kernels/{embedding,layernorm,attention,
// activation,classifier}.h. Nothing here rounds to BF16: the caller does, where the GPU stores BF16.
//
// Sums over rows or over a row's columns are kept in double. What a gradient accumulates into (dwte, dweight, dbias ...)
// is float. Arrays are row-major, C is the width of the residual stream, rows = B * T.
#pragma once
#include <cstdint>

namespace reference {

// out = a + b; may alias either.
void add(const float* a, const float* b, float* out, int64_t n);

// sums (N) += sum over rows of x (rows, N): a bias gradient.
void add_column_sums(const float* x, float* sums, int rows, int N);

struct EmbeddingForward {
    const int* tokens;  // (B, T)
    const float* wte;   // (V, C)
    const float* wpe;   // (T, C)
    float* out;         // (B, T, C)
    int B, T, C;
};
void embedding_forward(const EmbeddingForward& p);

struct EmbeddingBackward {
    const int* tokens;
    const float* dout;  // (B, T, C)
    float* dwte;        // accumulated into
    float* dwpe;        // accumulated into
    int B, T, C;
};
void embedding_backward(const EmbeddingBackward& p);

struct LayerNormForward {
    const float* x;       // (rows, C)
    const float* weight;  // (C)
    const float* bias;    // (C)
    float* out;           // (rows, C)
    float* mean;          // (rows)
    float* rstd;          // (rows)
    int rows, C;
    float eps = 1e-5f;
};
void layernorm_forward(const LayerNormForward& p);

struct LayerNormBackward {
    const float* x;
    const float* dout;    // (rows, C)
    const float* weight;
    const float* mean;
    const float* rstd;
    const float* dresidual_in;  // (rows, C), or null for zero
    float* dresidual_out;       // (rows, C) = dresidual_in + gradient of x; may alias dresidual_in, not dout
    float* dweight;             // (C), accumulated into
    float* dbias;               // (C), accumulated into
    int rows, C;
};
void layernorm_backward(const LayerNormBackward& p);

// GELU, tanh form.
void gelu_forward(const float* h, float* out, int64_t n);
void gelu_backward(const float* h, const float* dout, float* dh, int64_t n);  // dh may alias dout

struct AttentionShape {
    int B, T, H, head_dim;
};
struct AttentionForward {
    AttentionShape shape;
    const float* qkv;  // (B, T, 3 * H * head_dim): [q heads | k heads | v heads]
    float* out;        // (B, T, H * head_dim)
    float* lse;        // (B, H, T)
};
void attention_forward(const AttentionForward& p);

struct AttentionBackward {
    AttentionShape shape;
    const float* qkv;
    const float* out;
    const float* dout;
    const float* lse;
    float* dqkv;  // every element written
};
void attention_backward(const AttentionBackward& p);

struct Classifier {
    float* logits;        // (rows, V); replaced by their gradient
    const int* targets;   // (rows); negative: masked, loss and gradient 0
    float* losses;        // (rows)
    bool with_gradient;   // false: losses only, logits stay untouched
    float gradient_scale;
    int rows, V;
};
void classifier(const Classifier& p);

}  // namespace reference
