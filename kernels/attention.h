// Causal multi-head attention in BF16 on tensor cores (FlashAttention-2 order of work), float softmax.
//
//   S = scale * Q K^T, causal;  P = softmax(S);  O = P V;  LSE = log(sum(exp(S)))         scale = 1/sqrt(head_dim)
//   backward: D = rowsum(dO * O); dV = P^T dO; dS = P * (dO V^T - D); dQ = scale * dS K; dK = scale * dS^T Q
//
// qkv is packed as the QKV matmul writes it: (B, T, (H + 2*KV) * head_dim), row = [q heads | k heads | v heads].
// H % KV == 0 (grouped heads: query head h reads kv head h / (H/KV)). head_dim: multiple of 8, 8..256. Any T >= 1.
// Pointers 16-byte aligned. Deterministic: no float atomics (dK, dV and dQ come from separate kernels).
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/quant_slot.h"

struct AttentionShape {
    int B, T;
    int H, KV;      // query heads, key/value heads
    int head_dim;
};

struct AttentionForward {
    AttentionShape shape;
    const __nv_bfloat16* qkv;   // (B, T, (H + 2 KV) head_dim)
    __nv_bfloat16* out;         // (B, T, H head_dim)
    float* lse;                 // (B, H, T), natural logarithm
    QuantSlot* amax;            // amax of the BF16-rounded out, or null
};
void attention_forward(const AttentionForward& p, cudaStream_t stream);

struct AttentionBackward {
    AttentionShape shape;
    const __nv_bfloat16* qkv;
    const __nv_bfloat16* out;
    const __nv_bfloat16* dout;  // (B, T, H head_dim)
    const float* lse;
    __nv_bfloat16* dqkv;        // (B, T, (H + 2 KV) head_dim), every element written
    QuantSlot* amax;            // amax of the BF16-rounded dqkv, or null
    void* workspace;            // attention_backward_workspace_bytes(shape), 256-byte aligned
};
size_t attention_backward_workspace_bytes(const AttentionShape& shape);
void attention_backward(const AttentionBackward& p, cudaStream_t stream);
