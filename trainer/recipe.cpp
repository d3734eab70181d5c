#include "trainer/recipe.h"

#include "kernels/common/check.h"

namespace {
constexpr OperandFormat kF32{Dtype::f32, Granularity::none};
constexpr OperandFormat kBf16{Dtype::bf16, Granularity::none};
constexpr OperandFormat kE4m3{Dtype::e4m3, Granularity::tensor};
constexpr OperandFormat kE5m2{Dtype::e5m2, Granularity::tensor};
}  // namespace

std::span<const Recipe> recipe_table() {
    static const Recipe kTable[] = {
        {.name = "bf16",
         .output = {kBf16, kBf16, false},
         .grad_input = {kBf16, kBf16, false},
         .grad_weight = {kBf16, kBf16, false},
         .power_of_two_scales = false,
         .reference_device_only = false,
         .description = "BF16 operands, FP32 accumulation"},
        {.name = "tensorwise",
         .output = {kE4m3, kE4m3, true},
         .grad_input = {kE5m2, kE4m3, false},
         .grad_weight = {kE5m2, kE4m3, false},
         .power_of_two_scales = false,
         .reference_device_only = false,
         .description = "FP8, one dynamic scale a tensor: E4M3 forward, E5M2 gradients, fast accumulation T/F/F"},
        {.name = "f32",
         .output = {kF32, kF32, false},
         .grad_input = {kF32, kF32, false},
         .grad_weight = {kF32, kF32, false},
         .power_of_two_scales = false,
         .reference_device_only = true,
         .description = "float throughout (reference device only)"},
    };
    return kTable;
}

const Recipe& find_recipe(const std::string& name) {
    std::string known;
    for (const Recipe& row : recipe_table()) {
        if (row.name == name) return row;
        known += (known.empty() ? "" : ", ") + row.name;
    }
    throw Error(message("--recipe %s: no such recipe; choose one of %s", name.c_str(), known.c_str()));
}

std::string fp8_obstacle(int out_features, int in_features) {
    if (out_features % 16) return message("out=%d is not a multiple of 16", out_features);
    if (in_features % 16) return message("in=%d is not a multiple of 16", in_features);
    return "";
}
