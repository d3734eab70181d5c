#include "trainer/linear.h"

#include "kernels/common/check.h"
#include "kernels/common/mark.h"

Linear::Linear(const LinearSpec& spec, const Recipe& recipe) : spec_(spec), recipe_(recipe) {
    obstacle_ = recipe.quantizes() ? fp8_obstacle(spec.out, spec.in) : "recipe " + recipe.name;
}

void Linear::request(Arena& arena) {
    if (!fp8()) return;
    arena.request(saved_input_transposed_, size_t(spec_.in) * spec_.tokens, "saved FP8 linear inputs");
}

void Linear::plan(Gemm& gemm) const {
    for (const GemmShape& shape : {output_shape(), grad_input_shape(), grad_weight_shape(Position::first), grad_weight_shape(Position::last)})
        gemm.plan(shape);
}

// y (tokens, out) = x (tokens, in) * W (out, in)^T + b
GemmShape Linear::output_shape() const {
    const GemmFormats& f = recipe_.output;
    return {.M = spec_.tokens, .N = spec_.out, .K = spec_.in,
            .a = fp8() ? f.a.dtype : Dtype::bf16, .b = fp8() ? f.b.dtype : Dtype::bf16, .d = Dtype::bf16,
            .bias = true, .fast_accumulation = fp8() && f.fast_accumulation};
}

// dx (tokens, in) = dy (tokens, out) * W (out, in)
GemmShape Linear::grad_input_shape() const {
    const GemmFormats& f = recipe_.grad_input;
    return {.M = spec_.tokens, .N = spec_.in, .K = spec_.out,
            .a = fp8() ? f.a.dtype : Dtype::bf16, .b = fp8() ? f.b.dtype : Dtype::bf16, .d = Dtype::bf16,
            .layout_b = fp8() ? Layout::row_k : Layout::col_k, .fast_accumulation = fp8() && f.fast_accumulation};
}

// dW (out, in) = or += dy (tokens, out)^T * x (tokens, in)
GemmShape Linear::grad_weight_shape(Position position) const {
    const GemmFormats& f = recipe_.grad_weight;
    const Layout layout = fp8() ? Layout::row_k : Layout::col_k;
    return {.M = spec_.out, .N = spec_.in, .K = spec_.tokens,
            .a = fp8() ? f.a.dtype : Dtype::bf16, .b = fp8() ? f.b.dtype : Dtype::bf16, .d = Dtype::f32,
            .layout_a = layout, .layout_b = layout, .accumulate = !starts_gradients(position),
            .fast_accumulation = fp8() && f.fast_accumulation};
}

void Linear::forward(const Forward& p, Gemm& gemm, const LinearScratch& scratch, cudaStream_t stream) const {
    const Mark mark(kind());
    if (!fp8()) {
        gemm.run(output_shape(), {.a = p.x, .b = weight_bf16, .d = p.y, .bias = bias}, stream);
        return;
    }
    quantize_activation({.x = p.x, .q = scratch.codes, .qt = p.keep_for_backward ? saved_input_transposed_ : nullptr,
                         .dbias = nullptr, .slot = input_slot, .nonfinite = scratch.nonfinite, .workspace = scratch.workspace,
                         .M = spec_.tokens, .N = spec_.in, .format = recipe_.output.a.dtype, .producer = p.producer}, stream);
    gemm.run(output_shape(), {.a = scratch.codes, .b = weight_codes, .d = p.y, .a_scale = &input_slot->inv_scale,
                              .b_scale = &weight_slot->inv_scale, .bias = bias}, stream);
}

void Linear::backward(const Backward& p, Gemm& gemm, const LinearScratch& scratch, cudaStream_t stream) const {
    const Mark mark(kind());
    // One pass over dy: its column sums are the bias gradient, and in FP8 both orientations of its codes.
    quantize_activation({.x = p.dy, .q = fp8() ? scratch.codes : nullptr, .qt = fp8() ? scratch.codes_transposed : nullptr,
                         .dbias = dbias, .slot = grad_slot, .nonfinite = scratch.nonfinite, .workspace = scratch.workspace,
                         .M = spec_.tokens, .N = spec_.out, .format = fp8() ? recipe_.grad_input.a.dtype : Dtype::e5m2}, stream);
    if (!fp8()) {
        gemm.run(grad_weight_shape(p.position), {.a = p.dy, .b = p.x, .d = dweight}, stream);
        gemm.run(grad_input_shape(), {.a = p.dy, .b = weight_bf16, .d = p.dx}, stream);
        return;
    }
    gemm.run(grad_weight_shape(p.position), {.a = scratch.codes_transposed, .b = saved_input_transposed_, .d = dweight,
                                             .a_scale = &grad_slot->inv_scale, .b_scale = &input_slot->inv_scale}, stream);
    gemm.run(grad_input_shape(), {.a = scratch.codes, .b = weight_codes_transposed, .d = p.dx,
                                  .a_scale = &grad_slot->inv_scale, .b_scale = &weight_slot->inv_scale}, stream);
}
