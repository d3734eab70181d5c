// The precision recipes: one table, one row a recipe. Only `linear` (and the reference device) reads it.
//
// A linear y = x W^T has three GEMMs; each row says in which format either operand of each of them is multiplied.
// Arithmetic of `tensorwise`: torchao's Float8LinearConfig() (dynamic scaling, E4M3 forward, E5M2 gradients).
#pragma once
#include <span>
#include <string>

#include "kernels/common/dtype.h"

enum class Granularity : uint8_t { none, tensor };  // none: not scaled (BF16, FP32)

struct OperandFormat {
    Dtype dtype;
    Granularity granularity;
};

struct GemmFormats {
    OperandFormat a, b;
    bool fast_accumulation;
};

struct Recipe {
    std::string name;
    GemmFormats output;       // y  = x * W^T     a = x,   b = W
    GemmFormats grad_input;   // dx = dy * W      a = dy,  b = W
    GemmFormats grad_weight;  // dW = dy^T * x    a = dy,  b = x
    bool power_of_two_scales;
    bool reference_device_only;  // `f32` exists to compare the loop with PyTorch in float
    std::string description;

    bool quantizes() const { return is_fp8(output.a.dtype); }
    bool rounds_to_bf16() const { return output.a.dtype != Dtype::f32; }
};

std::span<const Recipe> recipe_table();
const Recipe& find_recipe(const std::string& name);  // Error lists the table

// Why a linear of these dimensions cannot use FP8 tensor cores; empty when it can. (Its M, the tokens of a micro-batch,
// must be a multiple of 16 too, because it is the K of the weight gradient: checked once for the run.)
std::string fp8_obstacle(int out_features, int in_features);
