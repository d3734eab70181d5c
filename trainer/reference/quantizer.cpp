#include "trainer/reference/quantizer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/common/check.h"
#include "kernels/common/mark.h"
#include "trainer/reference/parallel.h"

uint16_t bf16_bits(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (std::isnan(x)) return static_cast<uint16_t>((bits >> 16) | 0x40);  // keep it a NaN when the low half is cut
    const uint32_t to_even = 0x7fff + ((bits >> 16) & 1);
    return static_cast<uint16_t>((bits + to_even) >> 16);
}

float bf16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

float round_to_bf16(float x) { return bf16_value(bf16_bits(x)); }

float amax_of(std::span<const float> x) {
    uint32_t most = 0;
    for (const float value : x) {
        const uint32_t magnitude = std::bit_cast<uint32_t>(value) & 0x7fffffffu;
        most = magnitude > most ? magnitude : most;
    }
    return std::bit_cast<float>(most);
}

float scale_from_amax(float amax, Dtype format) {
    const double clamped = double(amax) < kAmaxEpsilon ? kAmaxEpsilon : double(amax);
    return static_cast<float>(double(fp8_max(format)) / clamped);
}

namespace {
struct Layout {
    int mantissa_bits, bias;
};
constexpr Layout layout_of(Dtype format) { return format == Dtype::e4m3 ? Layout{3, 7} : Layout{2, 15}; }
}  // namespace

float decode_fp8(uint8_t code, Dtype format) {
    REQUIRE(is_fp8(format), "decode_fp8: %s is not an FP8 format", name_of(format));
    const auto [mantissa_bits, bias] = layout_of(format);
    const int exponent = (code & 0x7f) >> mantissa_bits;
    const int mantissa = code & ((1 << mantissa_bits) - 1);
    const float sign = code & 0x80 ? -1.0f : 1.0f;
    if (format == Dtype::e4m3 && (code & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
    if (format == Dtype::e5m2 && exponent == 31)
        return mantissa ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
    const float significand = exponent == 0 ? float(mantissa) : float(mantissa + (1 << mantissa_bits));
    return sign * std::ldexp(significand, (exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
}

uint8_t encode_fp8(float x, Dtype format) {
    REQUIRE(is_fp8(format), "encode_fp8: %s is not an FP8 format", name_of(format));
    if (std::isnan(x)) return kFp8Nan;
    const auto [mantissa_bits, bias] = layout_of(format);
    const uint8_t sign = std::signbit(x) ? 0x80 : 0;
    const float magnitude = std::min(std::fabs(x), fp8_max(format));
    if (magnitude == 0.0f) return sign;
    // The spacing of representable numbers around x: 2^(exponent - mantissa_bits), never finer than a subnormal's.
    const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
    const float units = std::ldexp(magnitude, mantissa_bits - exponent);  // exact: only the exponent changes
    int rounded = static_cast<int>(std::nearbyint(units));                // nearest even, the default rounding mode
    int biased = exponent + bias;
    if (rounded == (2 << mantissa_bits)) rounded >>= 1, ++biased;         // rounded up to the next power of two
    if (rounded < (1 << mantissa_bits)) biased = 0;                       // subnormal
    return static_cast<uint8_t>(sign | (biased << mantissa_bits) | (rounded & ((1 << mantissa_bits) - 1)));
}

namespace {

REFERENCE_VECTORIZED void round_range_to_bf16(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
        const uint32_t rounded = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1);
        out[i] = std::bit_cast<float>(rounded & 0xffff0000u);
    }
}

// Without branches, so that it vectorizes. A normal value is rounded in its bit pattern, a subnormal one by adding and
// taking away the power of two whose float spacing is the subnormal spacing.
REFERENCE_VECTORIZED void round_range_to_fp8(const float* x, float scale, Dtype format, float* out, int64_t n) {
    const auto [mantissa_bits, bias] = layout_of(format);
    const float most = fp8_max(format);
    const int cut = 23 - mantissa_bits;
    const uint32_t below_half = (1u << (cut - 1)) - 1, kept = ~((1u << cut) - 1);
    const float least_normal = std::bit_cast<float>(uint32_t(127 + 1 - bias) << 23);
    const float shift = std::bit_cast<float>(uint32_t(127 + 1 - bias + cut) << 23);
    for (int64_t i = 0; i < n; ++i) {
        const float scaled = x[i] * scale;
        const uint32_t bits = std::bit_cast<uint32_t>(scaled), sign = bits & 0x80000000u;
        const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
        const float clamped = magnitude < most ? magnitude : most;
        const uint32_t clamped_bits = std::bit_cast<uint32_t>(clamped);
        const float normal = std::bit_cast<float>((clamped_bits + below_half + ((clamped_bits >> cut) & 1)) & kept);
        const float subnormal = (clamped + shift) - shift;
        const float rounded = clamped < least_normal ? subnormal : normal;
        const float with_sign = std::bit_cast<float>(std::bit_cast<uint32_t>(rounded) | sign);
        out[i] = scaled != scaled ? std::numeric_limits<float>::quiet_NaN() : with_sign;
    }
}

}  // namespace

void round_to_bf16(const float* x, float* out, int64_t n) {
    const Mark mark("round_to_bf16");
    reference::parallel_ranges(n, reference::grain_for(1), [&](int64_t begin, int64_t end) {
        round_range_to_bf16(x + begin, out + begin, end - begin);
    });
}

void round_to_fp8(const float* x, float scale, Dtype format, float* out, int64_t n) {
    REQUIRE(is_fp8(format), "round_to_fp8: %s is not an FP8 format", name_of(format));
    reference::parallel_ranges(n, reference::grain_for(1), [&](int64_t begin, int64_t end) {
        round_range_to_fp8(x + begin, scale, format, out + begin, end - begin);
    });
}
