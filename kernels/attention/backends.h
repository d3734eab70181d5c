// The backends behind kernels/attention.h. Arguments that reach them have been asserted by kernels/attention.cu.
//
// To add one: declare its functions here, and name them in a row of the forward or the backward table of
// kernels/attention.cu, above the backends that it is faster than. Its file kernels/attention/NAME.cu is found by wildcard.
//   refusal          "" if the backend runs this shape on the current GPU, else why not, with the values
//   workspace_bytes  for p.workspace
#pragma once
#include "kernels/attention.h"

// mma.cu: mma.sync, any GPU from sm_80 on, every shape of the contract; deterministic.
void mma_attention_forward(const AttentionForward& p, cudaStream_t stream);
size_t mma_attention_backward_workspace_bytes(const AttentionShape& shape, const AttentionOptions& options);
void mma_attention_backward(const AttentionBackward& p, cudaStream_t stream);

// hopper_forward.cu: TMA and wgmma, sm_90a, head dimensions 64 and 128; deterministic.
std::string hopper_attention_forward_refusal(const AttentionShape& shape, const AttentionOptions& options);
size_t hopper_attention_forward_workspace_bytes(const AttentionShape& shape, const AttentionOptions& options);
void hopper_attention_forward(const AttentionForward& p, cudaStream_t stream);

// hopper_backward.cu: TMA and wgmma, sm_90a, head_dim 64 and 128; deterministic.
std::string hopper_attention_backward_refusal(const AttentionShape& shape, const AttentionOptions& options);
size_t hopper_attention_backward_workspace_bytes(const AttentionShape& shape, const AttentionOptions& options);
void hopper_attention_backward(const AttentionBackward& p, cudaStream_t stream);

// cudnn.cpp: NVIDIA's library, where it is installed; never chosen by itself.
std::string cudnn_attention_forward_refusal(const AttentionShape& shape, const AttentionOptions& options);
size_t cudnn_attention_forward_workspace_bytes(const AttentionShape& shape, const AttentionOptions& options);
void cudnn_attention_forward(const AttentionForward& p, cudaStream_t stream);
std::string cudnn_attention_backward_refusal(const AttentionShape& shape, const AttentionOptions& options);
size_t cudnn_attention_backward_workspace_bytes(const AttentionShape& shape, const AttentionOptions& options);
void cudnn_attention_backward(const AttentionBackward& p, cudaStream_t stream);

// amax.cu, for backends that cannot do it on the way: raises slot->amax_bits to the maximum of |x|. n % 8 == 0.
void attention_amax(const __nv_bfloat16* x, int64_t n, QuantSlot* slot, cudaStream_t stream);
