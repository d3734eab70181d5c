#include "trainer/reference/linear.h"

#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"
#include "kernels/common/mark.h"
#include "trainer/reference/matmul.h"
#include "trainer/reference/ops.h"
#include "trainer/reference/quantizer.h"

namespace reference {

Linear::Linear(const Recipe& recipe, int out_features, int in_features)
    : recipe_(recipe), out_(out_features), in_(in_features),
      fp8_(recipe.quantizes() && fp8_obstacle(out_features, in_features).empty()) {
    REQUIRE(!recipe.power_of_two_scales, "recipe %s: power-of-two scales are not implemented here", recipe.name.c_str());
    REQUIRE(recipe.output.a.dtype == recipe.grad_weight.b.dtype && recipe.output.b.dtype == recipe.grad_input.b.dtype &&
                recipe.grad_input.a.dtype == recipe.grad_weight.a.dtype,
            "recipe %s: casts one tensor to two formats, which is not implemented here", recipe.name.c_str());
}

Linear::Operand Linear::operand(const float* x, int64_t n, Dtype format, std::vector<float>& codes, uint32_t* nonfinite) const {
    if (!fp8_) return {x, 1.0f};
    const Mark mark("quantize");
    const float amax = amax_of({x, size_t(n)});
    if (!std::isfinite(amax)) *nonfinite = 1;
    const float scale = scale_from_amax(amax, format);
    codes.resize(size_t(n));
    round_to_fp8(x, scale, format, codes.data(), n);
    return {codes.data(), 1.0f / scale};
}

void Linear::forward(const float* x, float* y, int rows, uint32_t* nonfinite) {
    const Operand input = operand(x, int64_t(rows) * in_, recipe_.output.a.dtype, x_codes_, nonfinite);
    matmul({.a = input.values, .b = weight_.values, .b_transposed = true, .d = y, .bias = bias_,
            .alpha = input.inv_scale * weight_.inv_scale, .M = rows, .N = out_, .K = in_});
}

void Linear::backward(const Backward& p, uint32_t* nonfinite) {
    add_column_sums(p.dy, p.dbias, p.rows, out_);
    const Operand input = operand(p.x, int64_t(p.rows) * in_, recipe_.grad_weight.b.dtype, x_codes_, nonfinite);
    const Operand gradient = operand(p.dy, int64_t(p.rows) * out_, recipe_.grad_input.a.dtype, dy_codes_, nonfinite);
    matmul({.a = gradient.values, .b = weight_.values, .d = p.dx, .alpha = gradient.inv_scale * weight_.inv_scale,
            .M = p.rows, .N = in_, .K = out_});
    matmul({.a = gradient.values, .a_transposed = true, .b = input.values, .d = p.dweight,
            .alpha = gradient.inv_scale * input.inv_scale, .accumulate = true, .M = out_, .N = in_, .K = p.rows});
}

}  // namespace reference
