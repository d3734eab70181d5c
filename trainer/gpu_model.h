// GPT-2 on the GPU: embedding, blocks, final norm, head and loss, forward and backward of one micro-batch.
//
// The head runs in chunks of tokens (logits, loss, gradients of one chunk at a time), so the full logits never exist.
#pragma once
#include <cuda_runtime.h>

#include <optional>
#include <span>
#include <vector>

#include "trainer/block.h"
#include "trainer/engine.h"

// Flat device arrays in the order of ParameterList that the model reads and adds gradients to.
struct ParameterArrays {
    float* params = nullptr;
    float* grads = nullptr;
};

class GpuModel {
  public:
    explicit GpuModel(const EngineOptions& options, const ParameterList& list);

    // Set-up: request memory, allocate the arena, then bind the pointers and plan the GEMMs.
    void request(Arena& arena);
    void bind(const ParameterArrays& arrays, StepState* state);
    void plan(Gemm& gemm) const;

    // The BF16 copy and the amax slot that the optimizer keeps up to date for a parameter; null where there is none.
    __nv_bfloat16* bf16_copy(int parameter) const { return bf16_copies_[size_t(parameter)]; }
    QuantSlot* weight_slot(int parameter) const;
    std::vector<QuantizeWeight> quantized_weights(const float* params) const;
    void zero_weight_amaxes(cudaStream_t stream) const;
    std::vector<LinearRow> linear_table() const;

    // Device buffers of one micro-batch that the caller fills: (B, T) each.
    int* inputs() const { return inputs_; }
    int* targets() const { return targets_; }
    const float* losses() const { return losses_; }  // (B, T), of the last forward pass with a head

    // Writes or adds the micro-batch's gradients (position.h) and adds its loss to state->loss_sum. Capturable.
    void forward_backward(Position position, Gemm& gemm, cudaStream_t stream) const;
    // Adds the sum of the losses to *loss_sum (device).
    void evaluate(float* loss_sum, Gemm& gemm, cudaStream_t stream) const;
    // The forward pass up to the head, for logits(). Capturable.
    void hidden(Gemm& gemm, cudaStream_t stream) const { forward_blocks(false, gemm, stream); }
    // The BF16 logits after the tokens at `positions`, at most options.logit_rows of them: (positions, padded vocabulary),
    // on the device until the next pass.
    const __nv_bfloat16* logits(std::span<const int> positions, Gemm& gemm, cudaStream_t stream) const;

  private:
    // Fills final_x_ and final_norm_out_.
    void forward_blocks(bool keep_for_backward, Gemm& gemm, cudaStream_t stream) const;
    // Without a position: losses only.
    void head(std::optional<Position> position, Gemm& gemm, cudaStream_t stream) const;
    GemmShape logits_shape(int rows) const;
    GemmShape head_grad_input_shape(int rows) const;
    GemmShape head_grad_weight_shape(int rows, bool accumulate) const;
    void request_scratch(Arena& arena);

    const EngineOptions& options_;
    const ParameterList& list_;
    int tokens_, chunk_;
    std::vector<Block> blocks_;
    BlockScratch scratch_;
    ParameterArrays arrays_;
    StepState* state_ = nullptr;
    NormParameters final_norm_;

    std::vector<__nv_bfloat16*> bf16_copies_;  // by parameter
    QuantSlot* weight_slots_ = nullptr;        // 4 a block
    QuantSlot* micro_slots_ = nullptr;         // 8 a block, zeroed every micro-batch
    int* inputs_ = nullptr;
    int* targets_ = nullptr;
    __nv_bfloat16* final_x_ = nullptr;         // (tokens, C): the residual stream after the last block
    __nv_bfloat16* final_norm_out_ = nullptr;  // (tokens, C)
    float* final_mean_ = nullptr;
    float* final_rstd_ = nullptr;
    __nv_bfloat16* logit_inputs_ = nullptr;    // (logit_rows, C): rows of final_norm_out_
    __nv_bfloat16* logits_ = nullptr;          // (chunk, padded V), turned into their gradients in place
    float* losses_ = nullptr;                  // (tokens)
    void* embedding_workspace_ = nullptr;
};
