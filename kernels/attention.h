// Causal multi-head attention in BF16 on tensor cores (FlashAttention-2 order of work), float softmax.
//
//   S = scale * Q K^T, causal;  P = softmax(S);  O = P V;  LSE = log(sum(exp(S)))         scale = 1/sqrt(head_dim)
//   backward: D = rowsum(dO * O); dV = P^T dO; dS = P * (dO V^T - D); dQ = scale * dS K; dK = scale * dS^T Q
//
// qkv is packed as the QKV matmul writes it: (B, T, (H + 2*KV) * head_dim), row = [q heads | k heads | v heads].
// H % KV == 0 (grouped heads: query head h reads kv head h / (H/KV)). head_dim: multiple of 8, 8..256. Any T >= 1.
// Pointers 16-byte aligned. Nothing is allocated in a call, and calls can be captured in a CUDA graph.
//
// Several backends compute this (kernels/attention/backends.h). They agree on every array, so the forward of one may be
// followed by the backward of another.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <string>

#include "kernels/common/quant_slot.h"

struct AttentionShape {
    int B, T;
    int H, KV;      // query heads, key/value heads
    int head_dim;
};

enum class AttentionBackend : uint8_t { automatic, hopper, mma, cudnn };
inline constexpr const char* kAttentionBackendNames[] = {"auto", "hopper", "mma", "cudnn"};
AttentionBackend attention_backend(const std::string& name);  // throws Error for any other

struct AttentionOptions {
    AttentionBackend backend = AttentionBackend::automatic;  // the first of our own that takes the shape on this GPU
    bool deterministic = false;  // same bits every run, also from a backend that would be faster without
};

struct AttentionForward {
    AttentionShape shape;
    const __nv_bfloat16* qkv;   // (B, T, (H + 2 KV) head_dim)
    __nv_bfloat16* out;         // (B, T, H head_dim)
    float* lse;                 // (B, H, T), natural logarithm
    QuantSlot* amax;            // amax of the BF16-rounded out, or null
    void* workspace = nullptr;  // attention_forward_workspace_bytes(shape, options), 256-byte aligned; may be null if that is 0
    AttentionOptions options = {};
};
size_t attention_forward_workspace_bytes(const AttentionShape& shape, const AttentionOptions& options = {});
void attention_forward(const AttentionForward& p, cudaStream_t stream);

struct AttentionBackward {
    AttentionShape shape;
    const __nv_bfloat16* qkv;
    const __nv_bfloat16* out;
    const __nv_bfloat16* dout;  // (B, T, H head_dim)
    const float* lse;
    __nv_bfloat16* dqkv;        // (B, T, (H + 2 KV) head_dim), every element written
    QuantSlot* amax;            // amax of the BF16-rounded dqkv, or null
    void* workspace;            // attention_backward_workspace_bytes(shape, options), 256-byte aligned
    AttentionOptions options = {};
};
size_t attention_backward_workspace_bytes(const AttentionShape& shape, const AttentionOptions& options = {});
void attention_backward(const AttentionBackward& p, cudaStream_t stream);

// Which backend runs this shape on this GPU, and why not one that comes before it.
struct AttentionChoice {
    std::string forward, backward;  // names
    std::string reason;             // "" when the first choice is taken in both directions
};
AttentionChoice attention_choice(const AttentionShape& shape, const AttentionOptions& options = {});
