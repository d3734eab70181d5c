// Token and position embedding.
//
//   forward    out[b,t,:] = wte[tokens[b,t],:] + wpe[t,:]                    (sum in float, rounded once to BF16)
//   backward   dwte[v,:] += sum over (b,t) with tokens[b,t] = v of dout[b,t,:]
//              dwpe[t,:] += sum over b of dout[b,t,:]
//
// Backward is deterministic: positions are sorted by token (stable radix sort of CUB), equal tokens are summed in a
// fixed order that does not depend on timing. Capturable; allocates nothing.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

struct EmbeddingForward {
    const int* tokens;          // (B, T), every value in [0, rows of wte)
    const __nv_bfloat16* wte;   // (V, C)
    const __nv_bfloat16* wpe;   // (T, C)
    __nv_bfloat16* out;         // (B, T, C)
    int B, T, C;
};
void embedding_forward(const EmbeddingForward& p, cudaStream_t stream);

struct EmbeddingBackward {
    const int* tokens;           // (B, T)
    const __nv_bfloat16* dout;   // (B, T, C)
    float* dwte;                 // (V, C), accumulated into
    float* dwpe;                 // (T, C), accumulated into
    void* workspace;             // embedding_backward_workspace_bytes(B, T, C, V), 256-byte aligned
    int B, T, C, V;
};
size_t embedding_backward_workspace_bytes(int B, int T, int C, int V);
void embedding_backward(const EmbeddingBackward& p, cudaStream_t stream);
