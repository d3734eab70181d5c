// A linear layer y = x W^T + b on the GPU, in the formats of a recipe. The only code that knows why something is cast.
//
// The layer hands its amax slots to the kernels that produce x and dy; those raise the amax while they write, and
// forward() and backward() then cast (with the transposed copy that the weight gradient needs) and multiply.
// A layer that runs in BF16 (recipe, or dimensions that FP8 tensor cores refuse) hands out null slots.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <string>

#include "kernels/common/arena.h"
#include "kernels/gemm.h"
#include "kernels/quantize.h"
#include "trainer/position.h"
#include "trainer/recipe.h"

// Scratch that all linears share, one stream at a time.
struct LinearScratch {
    uint8_t* codes = nullptr;             // largest (tokens, features) operand in FP8
    uint8_t* codes_transposed = nullptr;  // largest (features, tokens) gradient in FP8
    void* workspace = nullptr;            // quantize_workspace_bytes of the largest
    uint32_t* nonfinite = nullptr;        // device flag of the step
};

struct LinearSpec {
    std::string name;
    int tokens, in, out;
};

class Linear {
  public:
    Linear(const LinearSpec& spec, const Recipe& recipe);

    // Set-up, in this order: memory, then plans (after the arena is allocated).
    void request(Arena& arena);
    void plan(Gemm& gemm) const;

    // Parameters, set by the owner after the arena is allocated.
    const __nv_bfloat16* bias = nullptr;               // (out), rounded copy
    const __nv_bfloat16* weight_bf16 = nullptr;        // (out, in), when !fp8()
    const uint8_t* weight_codes = nullptr;             // (out, in), when fp8()
    const uint8_t* weight_codes_transposed = nullptr;  // (in, out), when fp8(); backward reads it
    const QuantSlot* weight_slot = nullptr;            // when fp8()
    QuantSlot* input_slot = nullptr;        // amax of x, zeroed every micro-batch; null when !fp8()
    QuantSlot* grad_slot = nullptr;         // amax of dy
    float* dweight = nullptr;               // (out, in), written or accumulated into: see position.h
    float* dbias = nullptr;                 // (out), accumulated into

    bool fp8() const { return obstacle_.empty(); }
    const std::string& obstacle() const { return obstacle_; }  // why not FP8
    const LinearSpec& spec() const { return spec_; }
    const char* kind() const { return spec_.name.c_str() + spec_.name.find('.', 2) + 1; }  // "attn.c_attn" of "h.3.attn.c_attn"

    struct Forward {
        const __nv_bfloat16* x;                   // (tokens, in); must stay as it is until backward when !fp8()
        Producer producer = Producer::identity;   // FP8 only: apply this to x while casting
        __nv_bfloat16* y;                         // (tokens, out)
        bool keep_for_backward = true;
    };
    void forward(const Forward& p, Gemm& gemm, const LinearScratch& scratch, cudaStream_t stream) const;

    struct Backward {
        const __nv_bfloat16* dy;  // (tokens, out)
        const __nv_bfloat16* x;   // what forward got; not read when fp8()
        __nv_bfloat16* dx;        // (tokens, in)
        Position position;
    };
    void backward(const Backward& p, Gemm& gemm, const LinearScratch& scratch, cudaStream_t stream) const;

  private:
    GemmShape output_shape() const;
    GemmShape grad_input_shape() const;
    GemmShape grad_weight_shape(Position position) const;

    LinearSpec spec_;
    const Recipe& recipe_;
    std::string obstacle_;
    uint8_t* saved_input_transposed_ = nullptr;  // (in, tokens), from forward to backward
};
