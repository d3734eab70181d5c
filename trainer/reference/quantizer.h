// The exact FP8 quantizer on the host: the rule that every GPU cast must reproduce bit for bit.
//
//   scale = float(double(fp8_max) / max(double(amax), 1e-12))        torchao float8_utils.py, amax_to_scale
//   q     = round-to-nearest-even(clamp(float(x * scale), ±fp8_max))  torchao to_fp8_saturated
//
// Non-finite values are not hidden: a NaN input gives kFp8Nan, an infinite amax gives scale 0 and inf * 0 = NaN.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/common/dtype.h"

// Round to nearest even to bfloat16 and back. NaN stays NaN.
float round_to_bf16(float x);
uint16_t bf16_bits(float x);          // upper half of the rounded value
float bf16_value(uint16_t bits);

// max |x|; NaN if any element is NaN, inf if any is infinite and none NaN.
float amax_of(std::span<const float> x);

float scale_from_amax(float amax, Dtype format);

// One code; `x` is already multiplied by the scale. Saturates at ±fp8_max(format), inf included.
uint8_t encode_fp8(float x, Dtype format);
float decode_fp8(uint8_t code, Dtype format);

// Whole arrays, for the reference device. `out` may alias x. round_to_fp8: decode_fp8(encode_fp8(x * scale)), bit for bit.
void round_to_bf16(const float* x, float* out, int64_t n);
void round_to_fp8(const float* x, float scale, Dtype format, float* out, int64_t n);
