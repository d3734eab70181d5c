// One transformer block (GPT-2) on the GPU.
//
//   x1 = residual + delta               delta: the branch output of the block before (none for the first block)
//   x2 = x1 + proj(attention(qkv(norm1(x1))))
//   residual' = x2, delta' = fc2(gelu(fc1(norm2(x2))))
//
// The residual additions are done by the norm that follows, so every block hands on a pair (residual, delta).
//
// Saved from forward to backward, bytes a token: x1, x2 4C; qkv 6C; attention output 2C; LSE 4H; pre-activation 2F; norm
// statistics 16; and the linears' inputs: FP8 (in, tokens) copies C + C + C + F, or in BF16 2C + 0 + 2C + 2F.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "trainer/linear.h"
#include "trainer/model_spec.h"

// Buffers that all blocks share.
struct BlockScratch {
    __nv_bfloat16* norm_out = nullptr;    // (tokens, C)
    __nv_bfloat16* branch_out = nullptr;  // (tokens, C): output of proj or fc2, until the next norm adds it
    __nv_bfloat16* wide = nullptr;        // (tokens, max(3C, F)): gradient of the pre-activation, then of qkv
    __nv_bfloat16* dresidual = nullptr;   // (tokens, C): gradient of the residual stream, updated in place
    __nv_bfloat16* dbranch = nullptr;     // (tokens, C)
    void* norm_workspace = nullptr;
    void* attention_workspace = nullptr;
    LinearScratch linear;
};

struct NormParameters {
    const float* weight = nullptr;
    const float* bias = nullptr;
    float* dweight = nullptr;
    float* dbias = nullptr;
};

struct Residual {
    const __nv_bfloat16* residual;
    const __nv_bfloat16* delta;  // to be added, or null
};

class Block {
  public:
    Block(const ModelSpec& model, const Recipe& recipe, const AttentionOptions& attention, int B, int T, int layer);

    void request(Arena& arena);
    void plan(Gemm& gemm) const;
    size_t attention_workspace_bytes() const;
    AttentionChoice attention_backends() const;

    NormParameters norm1, norm2;
    Linear qkv, proj, fc1, fc2;

    // Where the embedding writes when this is the first block.
    __nv_bfloat16* x1() const { return x1_; }

    Residual forward(const Residual& in, bool keep_for_backward, Gemm& gemm, const BlockScratch& scratch, cudaStream_t stream) const;

    // scratch.dresidual holds the gradient of this block's output, its amax in fc2.grad_slot; on return, the gradient of
    // its input, with its amax raised in `amax_below` (the fc2.grad_slot of the block below, or null).
    void backward(Position position, QuantSlot* amax_below, Gemm& gemm, const BlockScratch& scratch, cudaStream_t stream) const;

  private:
    struct Statistics {
        float* mean = nullptr;
        float* rstd = nullptr;
    };
    const __nv_bfloat16* forward_mlp(bool keep_for_backward, Gemm& gemm, const BlockScratch& scratch, cudaStream_t stream) const;
    // Where a linear's BF16 input is written: kept for its backward, or in scratch when a quantized copy is kept instead.
    static __nv_bfloat16* input_of(const Linear& linear, __nv_bfloat16* kept, __nv_bfloat16* scratch) {
        return linear.fp8() ? scratch : kept;
    }

    AttentionShape attention_;
    AttentionOptions attention_options_;
    int tokens_, C_, F_;
    __nv_bfloat16* x1_ = nullptr;              // (tokens, C)
    __nv_bfloat16* x2_ = nullptr;              // (tokens, C)
    Statistics stats1_, stats2_;               // (tokens)
    __nv_bfloat16* qkv_out_ = nullptr;         // (tokens, 3C)
    __nv_bfloat16* attention_out_ = nullptr;   // (tokens, C)
    float* lse_ = nullptr;                     // (B, H, T)
    __nv_bfloat16* pre_activation_ = nullptr;  // (tokens, F)
    __nv_bfloat16* norm1_out_ = nullptr;       // (tokens, C), BF16 linears only
    __nv_bfloat16* norm2_out_ = nullptr;       // (tokens, C), BF16 linears only
    __nv_bfloat16* activation_ = nullptr;      // (tokens, F), BF16 linears only
};
