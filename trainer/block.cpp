#include "trainer/block.h"

#include <algorithm>

#include "kernels/activation.h"
#include "kernels/common/check.h"
#include "kernels/layernorm.h"

Block::Block(const ModelSpec& m, const Recipe& recipe, const AttentionOptions& attention, int B, int T, int layer)
    : qkv({message("h.%d.attn.c_attn", layer), B * T, m.dim, 3 * m.dim}, recipe),
      proj({message("h.%d.attn.c_proj", layer), B * T, m.dim, m.dim}, recipe),
      fc1({message("h.%d.mlp.c_fc", layer), B * T, m.dim, m.ffn_dim}, recipe),
      fc2({message("h.%d.mlp.c_proj", layer), B * T, m.ffn_dim, m.dim}, recipe),
      attention_{.B = B, .T = T, .H = m.n_heads, .KV = m.n_heads, .head_dim = m.head_dim()},
      attention_options_(attention),
      tokens_(B * T), C_(m.dim), F_(m.ffn_dim) {}

void Block::request(Arena& arena) {
    const size_t n = size_t(tokens_), C = size_t(C_), F = size_t(F_);
    arena.request(x1_, n * C, "saved residual stream");
    arena.request(x2_, n * C, "saved residual stream");
    for (Statistics* s : {&stats1_, &stats2_}) {
        arena.request(s->mean, n, "saved norm statistics, LSE");
        arena.request(s->rstd, n, "saved norm statistics, LSE");
    }
    arena.request(lse_, n * size_t(attention_.H), "saved norm statistics, LSE");
    arena.request(qkv_out_, n * 3 * C, "saved qkv, attention output");
    arena.request(attention_out_, n * C, "saved qkv, attention output");
    arena.request(pre_activation_, n * F, "saved pre-activations");
    arena.request(norm1_out_, qkv.fp8() ? 0 : n * C, "saved BF16 linear inputs");
    arena.request(norm2_out_, fc1.fp8() ? 0 : n * C, "saved BF16 linear inputs");
    arena.request(activation_, fc2.fp8() ? 0 : n * F, "saved BF16 linear inputs");
    for (Linear* linear : {&qkv, &proj, &fc1, &fc2}) linear->request(arena);
}

size_t Block::attention_workspace_bytes() const {
    return std::max(attention_forward_workspace_bytes(attention_, attention_options_),
                    attention_backward_workspace_bytes(attention_, attention_options_));
}
AttentionChoice Block::attention_backends() const { return attention_choice(attention_, attention_options_); }

void Block::plan(Gemm& gemm) const {
    for (const Linear* linear : {&qkv, &proj, &fc1, &fc2}) linear->plan(gemm);
}

Residual Block::forward(const Residual& in, bool keep, Gemm& gemm, const BlockScratch& s, cudaStream_t stream) const {
    __nv_bfloat16* y1 = input_of(qkv, norm1_out_, s.norm_out);
    layernorm_forward({.residual = in.residual, .delta = in.delta, .residual_out = x1_, .weight = norm1.weight,
                       .bias = norm1.bias, .out = y1, .mean = stats1_.mean, .rstd = stats1_.rstd, .amax = qkv.input_slot,
                       .rows = tokens_, .C = C_}, stream);
    qkv.forward({.x = y1, .y = qkv_out_, .keep_for_backward = keep}, gemm, s.linear, stream);
    attention_forward({.shape = attention_, .qkv = qkv_out_, .out = attention_out_, .lse = lse_, .amax = proj.input_slot,
                       .workspace = s.attention_workspace, .options = attention_options_}, stream);
    proj.forward({.x = attention_out_, .y = s.branch_out, .keep_for_backward = keep}, gemm, s.linear, stream);

    __nv_bfloat16* y2 = input_of(fc1, norm2_out_, s.norm_out);
    layernorm_forward({.residual = x1_, .delta = s.branch_out, .residual_out = x2_, .weight = norm2.weight,
                       .bias = norm2.bias, .out = y2, .mean = stats2_.mean, .rstd = stats2_.rstd, .amax = fc1.input_slot,
                       .rows = tokens_, .C = C_}, stream);
    fc1.forward({.x = y2, .y = pre_activation_, .keep_for_backward = keep}, gemm, s.linear, stream);
    return {.residual = x2_, .delta = forward_mlp(keep, gemm, s, stream)};
}

const __nv_bfloat16* Block::forward_mlp(bool keep, Gemm& gemm, const BlockScratch& s, cudaStream_t stream) const {
    const int64_t n = int64_t(tokens_) * F_;
    if (fc2.fp8()) {
        // Two passes over the pre-activation (amax, then GELU + cast) move fewer bytes than storing the activation.
        gelu_amax(pre_activation_, n, fc2.input_slot, stream);
        fc2.forward({.x = pre_activation_, .producer = Producer::gelu, .y = s.branch_out, .keep_for_backward = keep},
                    gemm, s.linear, stream);
    } else {
        gelu_forward(pre_activation_, activation_, n, nullptr, stream);
        fc2.forward({.x = activation_, .y = s.branch_out, .keep_for_backward = keep}, gemm, s.linear, stream);
    }
    return s.branch_out;
}

void Block::backward(Position position, QuantSlot* amax_below, Gemm& gemm, const BlockScratch& s, cudaStream_t stream) const {
    fc2.backward({.dy = s.dresidual, .x = activation_, .dx = s.wide, .position = position}, gemm, s.linear, stream);
    gelu_backward(pre_activation_, s.wide, s.wide, int64_t(tokens_) * F_, fc1.grad_slot, stream);
    fc1.backward({.dy = s.wide, .x = norm2_out_, .dx = s.dbranch, .position = position}, gemm, s.linear, stream);
    layernorm_backward({.x = x2_, .dout = s.dbranch, .weight = norm2.weight, .mean = stats2_.mean, .rstd = stats2_.rstd,
                        .dresidual_in = s.dresidual, .dresidual_out = s.dresidual, .dweight = norm2.dweight,
                        .dbias = norm2.dbias, .amax = proj.grad_slot, .workspace = s.norm_workspace, .rows = tokens_,
                        .C = C_}, stream);

    proj.backward({.dy = s.dresidual, .x = attention_out_, .dx = s.dbranch, .position = position}, gemm, s.linear, stream);
    attention_backward({.shape = attention_, .qkv = qkv_out_, .out = attention_out_, .dout = s.dbranch, .lse = lse_,
                        .dqkv = s.wide, .amax = qkv.grad_slot, .workspace = s.attention_workspace, .options = attention_options_}, stream);
    qkv.backward({.dy = s.wide, .x = norm1_out_, .dx = s.dbranch, .position = position}, gemm, s.linear, stream);
    layernorm_backward({.x = x1_, .dout = s.dbranch, .weight = norm1.weight, .mean = stats1_.mean, .rstd = stats1_.rstd,
                        .dresidual_in = s.dresidual, .dresidual_out = s.dresidual, .dweight = norm1.dweight,
                        .dbias = norm1.dbias, .amax = amax_below, .workspace = s.norm_workspace, .rows = tokens_,
                        .C = C_}, stream);
}
