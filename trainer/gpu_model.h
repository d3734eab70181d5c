// GPT-2 on the GPU: embedding, blocks, final norm, head and loss, forward and backward of one micro-batch. The parameters are
// those of a GpuParameters; the order of work, with what ranks exchange in between, is that of sharding_schedule.h.
//
// The head runs in chunks of tokens (logits, loss, gradients of one chunk at a time), so the full logits never exist.
#pragma once
#include <cuda_runtime.h>

#include <optional>
#include <span>
#include <vector>

#include "trainer/block.h"
#include "trainer/engine.h"
#include "trainer/gpu_parameters.h"

class GpuModel {
  public:
    GpuModel(const EngineOptions& options, const ParameterList& list, GpuParameters& parameters);

    // Set-up: request memory, allocate the arena, then bind the pointers (the parameters are bound) and plan the GEMMs.
    void request(Arena& arena);
    void bind(StepState* state);
    void plan(Gemm& gemm) const;
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
    void hidden(Gemm& gemm, cudaStream_t stream) const;
    // The BF16 logits after the tokens at `positions`, at most options.logit_rows of them: (positions, padded vocabulary),
    // on the device until the next pass.
    const __nv_bfloat16* logits(std::span<const int> positions, Gemm& gemm, cudaStream_t stream) const;

  private:
    // One micro-batch on its way through a schedule.
    struct Pass {
        std::optional<Position> position;  // without one: no gradients
        Gemm& gemm;
        Residual residual{nullptr, nullptr};
    };
    void enqueue(const Operation& operation, Pass& pass, cudaStream_t stream) const;
    void embed(Pass& pass, cudaStream_t stream) const;
    void forward(int layer, Pass& pass, cudaStream_t stream) const;
    void final_norm(const Pass& pass, cudaStream_t stream) const;  // fills final_x_ and final_norm_out_
    void head_with_gradients(const Pass& pass, cudaStream_t stream) const;
    void backward(int layer, const Pass& pass, cudaStream_t stream) const;
    void embed_backward(cudaStream_t stream) const;
    // Without a position: losses only.
    void head(std::optional<Position> position, Gemm& gemm, cudaStream_t stream) const;
    GemmShape logits_shape(int rows) const;
    GemmShape head_grad_input_shape(int rows) const;
    GemmShape head_grad_weight_shape(int rows, bool accumulate) const;
    void request_scratch(Arena& arena);

    const EngineOptions& options_;
    const ParameterList& list_;
    GpuParameters& parameters_;
    int tokens_, chunk_;
    std::vector<Block> blocks_;
    BlockScratch scratch_;
    StepState* state_ = nullptr;
    NormParameters final_norm_;

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
