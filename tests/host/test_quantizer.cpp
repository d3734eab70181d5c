// The exact FP8 and BF16 rules of trainer/reference/quantizer.h against PyTorch and torchao, bit for bit, and exhaustively
// against the definition.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "tests/host/golden_file.h"
#include "trainer/recipe.h"
#include "trainer/reference/linear.h"
#include "trainer/reference/quantizer.h"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr Dtype kFormats[] = {Dtype::e4m3, Dtype::e5m2};

// Equal bits, except that all NaNs are one.
bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

// The sign of a NaN code is not part of the rule: PyTorch keeps it, the GPU's cast drops it.
bool same_code(uint8_t a, uint8_t b, Dtype format) {
    return a == b || (std::isnan(decode_fp8(a, format)) && std::isnan(decode_fp8(b, format)));
}

const GoldenFile& golden() {
    static const GoldenFile file("fp8_quantizer.safetensors");
    return file;
}

// Codes of the finite non-negative numbers are consecutive, smallest first.
int finite_codes(Dtype format) { return format == Dtype::e4m3 ? 0x7f : 0x7c; }

}  // namespace

TEST(QuantizerAgainstTorch, ValuesOfAllCodes) {
    for (const Dtype format : kFormats) {
        const std::vector<float> values = golden().floats(std::string(name_of(format)) + ".values");
        ASSERT_EQ(values.size(), 256u);
        for (int code = 0; code < 256; ++code)
            EXPECT_TRUE(same(decode_fp8(uint8_t(code), format), values[size_t(code)])) << name_of(format) << " code " << code;
    }
}

TEST(QuantizerAgainstTorch, SingleCasts) {
    for (const Dtype format : kFormats) {
        const std::string name = std::string(name_of(format)) + ".cast";
        const std::vector<float> x = golden().floats(name + ".x");
        const std::vector<uint8_t> codes = golden().bytes(name + ".codes");
        ASSERT_GT(x.size(), 900u);
        for (size_t i = 0; i < x.size(); ++i)
            EXPECT_TRUE(same_code(encode_fp8(x[i], format), codes[i], format))
                << name_of(format) << " " << x[i] << ": " << int(encode_fp8(x[i], format)) << ", torch " << int(codes[i]);
    }
}

TEST(QuantizerAgainstTorch, TensorwiseScalesAndCodes) {
    for (const Dtype format : kFormats) {
        const std::vector<std::string> cases = golden().names_before(std::string(".") + name_of(format) + ".scale");
        ASSERT_EQ(cases.size(), 18u);
        for (const std::string& name : cases) {
            SCOPED_TRACE(name + " " + name_of(format));
            const std::string prefix = name + "." + name_of(format);
            const std::vector<float> x = golden().floats(prefix + ".x");
            const std::vector<uint8_t> codes = golden().bytes(prefix + ".codes");
            const float amax = amax_of(x), scale = scale_from_amax(amax, format);
            EXPECT_TRUE(same(amax, golden().floats(prefix + ".amax").at(0))) << amax;
            EXPECT_TRUE(same(scale, golden().floats(prefix + ".scale").at(0))) << scale;
            for (size_t i = 0; i < x.size(); ++i)
                ASSERT_TRUE(same_code(encode_fp8(x[i] * scale, format), codes[i], format))
                    << "element " << i << " = " << x[i] << ": " << int(encode_fp8(x[i] * scale, format)) << ", torchao " << int(codes[i]);
        }
    }
}

TEST(QuantizerAgainstTorch, Bf16) {
    const std::vector<float> x = golden().floats("bf16.x"), rounded = golden().floats("bf16.rounded");
    for (size_t i = 0; i < x.size(); ++i)
        ASSERT_TRUE(same(round_to_bf16(x[i]), rounded[i])) << x[i] << ": " << round_to_bf16(x[i]) << ", torch " << rounded[i];
}

// torchao multiplies the dequantized values in float. Codes and scales are bit-equal, so only the products' roundings
// differ: at most sqrt(K) * 2^-24 of the norm or so, K = 64; a single wrong code would be 100 times that.
TEST(QuantizerAgainstTorch, EmulatedLinear) {
    const int rows = 32, in = 48, out = 64;
    const std::vector<float> x = golden().floats("linear.x"), weight = golden().floats("linear.weight"), dy = golden().floats("linear.dy");
    std::vector<float> effective(weight.size()), y(size_t(rows * out)), dx(x.size()), dweight(weight.size()), dbias(size_t{out});
    uint32_t nonfinite = 0;
    reference::Linear linear(find_recipe("tensorwise"), out, in);
    ASSERT_TRUE(linear.fp8());
    const float scale = scale_from_amax(amax_of(weight), Dtype::e4m3);
    round_to_fp8(weight.data(), scale, Dtype::e4m3, effective.data(), int64_t(weight.size()));
    linear.use(effective.data(), 1.0f / scale, nullptr);
    linear.forward(x.data(), y.data(), rows, &nonfinite);
    linear.backward({.x = x.data(), .dy = dy.data(), .dx = dx.data(), .dweight = dweight.data(), .dbias = dbias.data(), .rows = rows},
                    &nonfinite);
    const auto relative = [](const std::vector<float>& a, const std::vector<float>& b) {
        double difference = 0, norm = 0;
        for (size_t i = 0; i < a.size(); ++i) difference += std::pow(double(a[i]) - b[i], 2), norm += double(b[i]) * b[i];
        return std::sqrt(difference / norm);
    };
    for (size_t i = 0; i < weight.size(); ++i) ASSERT_EQ(effective[i], decode_fp8(encode_fp8(weight[i] * scale, Dtype::e4m3), Dtype::e4m3));
    EXPECT_EQ(nonfinite, 0u);
    EXPECT_LE(relative(y, golden().floats("linear.y")), 5e-7);
    EXPECT_LE(relative(dx, golden().floats("linear.dx")), 5e-7);
    EXPECT_LE(relative(dweight, golden().floats("linear.dweight")), 5e-7);
}

TEST(QuantizedLinear, ReportsNonFiniteAmax) {
    const int rows = 16, in = 16, out = 32;
    std::vector<float> weight(size_t(out * in), 0.5f), y(size_t(rows * out)), dx(size_t(rows * in));
    std::vector<float> dweight(weight.size()), dbias(size_t{out});
    reference::Linear linear(find_recipe("tensorwise"), out, in);
    linear.use(weight.data(), 1.0f, nullptr);
    for (const float bad : {kInf, -kInf, kNan, 1.0f}) {
        const uint32_t expected = std::isfinite(bad) ? 0 : 1;
        std::vector<float> x(size_t(rows * in), 1.0f), dy(size_t(rows * out), 1.0f);
        uint32_t forward = 0, backward = 0;
        x[7] = bad;
        linear.forward(x.data(), y.data(), rows, &forward);
        EXPECT_EQ(forward, expected) << bad;
        x[7] = 1.0f;
        dy[5] = bad;
        linear.backward({.x = x.data(), .dy = dy.data(), .dx = dx.data(), .dweight = dweight.data(), .dbias = dbias.data(), .rows = rows},
                        &backward);
        EXPECT_EQ(backward, expected) << bad;
    }
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(Quantizer, EveryFiniteCodeIsItsOwnCast) {
    for (const Dtype format : kFormats)
        for (int code = 0; code < 256; ++code) {
            const float value = decode_fp8(uint8_t(code), format);
            if (!std::isfinite(value)) continue;
            EXPECT_EQ(encode_fp8(value, format), code) << name_of(format);
        }
}

TEST(Quantizer, TiesGoToTheEvenCodeAndTheRestToTheNearest) {
    for (const Dtype format : kFormats)
        for (int code = 0; code + 1 < finite_codes(format); ++code) {
            const float low = decode_fp8(uint8_t(code), format), high = decode_fp8(uint8_t(code + 1), format);
            ASSERT_LT(low, high);
            const float middle = low + (high - low) / 2;
            const int even = code % 2 ? code + 1 : code;
            EXPECT_EQ(encode_fp8(middle, format), even) << name_of(format) << " " << middle;
            EXPECT_EQ(encode_fp8(-middle, format), even | 0x80) << name_of(format) << " " << -middle;
            EXPECT_EQ(encode_fp8(std::nextafter(middle, 0.0f), format), code);
            EXPECT_EQ(encode_fp8(std::nextafter(middle, kInf), format), code + 1);
        }
}

TEST(Quantizer, SaturatesAndKeepsNan) {
    for (const Dtype format : kFormats) {
        const uint8_t most = encode_fp8(fp8_max(format), format);
        EXPECT_EQ(most, finite_codes(format) - 1);
        for (const float x : {fp8_max(format) * 1.0001f, fp8_max(format) * 1.5f, 3e38f, kInf}) {
            EXPECT_EQ(encode_fp8(x, format), most) << x;
            EXPECT_EQ(encode_fp8(-x, format), most | 0x80) << -x;
        }
        EXPECT_EQ(encode_fp8(kNan, format), kFp8Nan);
        EXPECT_EQ(encode_fp8(-kNan, format), kFp8Nan);
        EXPECT_TRUE(std::isnan(decode_fp8(kFp8Nan, format)));
        EXPECT_EQ(encode_fp8(-0.0f, format), 0x80);
        EXPECT_EQ(encode_fp8(-1e-30f, format), 0x80);
    }
}

// The array form against the scalar form: every upper half of a float, with low halves around the ties.
TEST(Quantizer, ArrayCastEqualsScalarCast) {
    for (const Dtype format : kFormats)
        for (const float scale : {1.0f, 0.37f}) {
            std::vector<float> x, rounded;
            for (uint32_t high = 0; high < 0x10000; ++high)
                for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) x.push_back(std::bit_cast<float>(high << 16 | low));
            rounded.resize(x.size());
            round_to_fp8(x.data(), scale, format, rounded.data(), int64_t(x.size()));
            for (size_t i = 0; i < x.size(); ++i)
                ASSERT_TRUE(same(rounded[i], decode_fp8(encode_fp8(x[i] * scale, format), format)))
                    << name_of(format) << " " << x[i] << " * " << scale << ": " << rounded[i];
        }
}

TEST(Quantizer, ScaleOfExtremeAmaxes) {
    EXPECT_EQ(scale_from_amax(0.0f, Dtype::e4m3), float(448.0 / 1e-12));
    EXPECT_EQ(scale_from_amax(1e-20f, Dtype::e5m2), float(57344.0 / 1e-12));
    EXPECT_EQ(scale_from_amax(kInf, Dtype::e4m3), 0.0f);
    EXPECT_TRUE(std::isnan(scale_from_amax(kNan, Dtype::e4m3)));
    EXPECT_EQ(scale_from_amax(448.0f, Dtype::e4m3), 1.0f);
}

TEST(Quantizer, AmaxHidesNothing) {
    EXPECT_EQ(amax_of(std::vector<float>{1.0f, -3.0f, 2.0f}), 3.0f);
    EXPECT_EQ(amax_of(std::vector<float>{1.0f, -kInf, 2.0f}), kInf);
    EXPECT_TRUE(std::isnan(amax_of(std::vector<float>{1.0f, kNan, kInf})));
    EXPECT_EQ(amax_of({}), 0.0f);
}

TEST(Quantizer, Bf16TiesToEven) {
    for (uint32_t bits = 0; bits < 0x7f80; ++bits) {  // every finite non-negative bfloat16
        const float x = bf16_value(uint16_t(bits));
        EXPECT_EQ(round_to_bf16(x), x);
        const float tie = std::bit_cast<float>(bits << 16 | 0x8000);
        EXPECT_EQ(bf16_bits(tie), bits + bits % 2);
        EXPECT_EQ(bf16_bits(-tie), 0x8000 | (bits + bits % 2));
        EXPECT_EQ(bf16_bits(std::nextafter(tie, 0.0f)), bits);
        EXPECT_EQ(bf16_bits(std::nextafter(tie, kInf)), bits + 1);
    }
    EXPECT_TRUE(std::isnan(round_to_bf16(std::bit_cast<float>(0x7f800001u))));  // its upper half alone would be infinity
    EXPECT_EQ(round_to_bf16(kInf), kInf);
}

TEST(Quantizer, ArrayBf16EqualsScalar) {
    std::vector<float> x, rounded;
    for (uint32_t high = 0; high < 0x10000; ++high)
        for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) x.push_back(std::bit_cast<float>(high << 16 | low));
    rounded.resize(x.size());
    round_to_bf16(x.data(), rounded.data(), int64_t(x.size()));
    for (size_t i = 0; i < x.size(); ++i) ASSERT_TRUE(same(rounded[i], round_to_bf16(x[i]))) << x[i];
}
