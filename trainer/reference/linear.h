// A linear y = x W^T + b in the formats of a recipe, as the GPU computes it: FP8 operands are cast with the exact rule of
// quantizer.h, then multiplied as the numbers they stand for, in float.
#pragma once
#include <cstdint>
#include <vector>

#include "trainer/recipe.h"

namespace reference {

class Linear {
  public:
    Linear(const Recipe& recipe, int out_features, int in_features);

    int out() const { return out_; }
    int in() const { return in_; }
    bool fp8() const { return fp8_; }

    // What the products use: the master, its BF16 copy, or the values of its FP8 codes and what they are scaled by.
    void use(const float* weight, float inv_scale, const float* bias) {
        weight_ = {weight, inv_scale};
        bias_ = bias;
    }

    // y (rows, out). Not rounded. *nonfinite = 1 when an amax is infinite or NaN.
    void forward(const float* x, float* y, int rows, uint32_t* nonfinite);

    struct Backward {
        const float* x;   // (rows, in), what forward got
        const float* dy;  // (rows, out)
        float* dx;        // (rows, in)
        float* dweight;   // (out, in), accumulated into
        float* dbias;     // (out), accumulated into
        int rows;
    };
    void backward(const Backward& p, uint32_t* nonfinite);

  private:
    struct Operand {
        const float* values;
        float inv_scale;
    };
    // x itself, or the values of its FP8 codes in `codes`.
    Operand operand(const float* x, int64_t n, Dtype format, std::vector<float>& codes, uint32_t* nonfinite) const;

    const Recipe recipe_;
    int out_, in_;
    bool fp8_;
    Operand weight_{nullptr, 1.0f};
    const float* bias_ = nullptr;
    std::vector<float> x_codes_, dy_codes_;
};

}  // namespace reference
