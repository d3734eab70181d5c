// The linear layer of every recipe against its definition: quantize on the host, multiply in float64.
//
// Unlike a comparison of whole models, where one changed rounding is amplified by everything behind it, here both sides
// multiply the same codes. So a wrong format (gradients in E4M3), scale, orientation or accumulation shows at once: the
// errors allowed are those of one BF16 rounding and of the tensor cores' accumulator, ten times below one of FP8.
#include "dev/harness.h"
#include "kernels/common/arena.h"
#include "trainer/linear.h"
#include "trainer/reference/quantizer.h"

namespace {

struct Case {
    int tokens, in, out;
    const char* recipe;
};

std::string text_of(const Case& c) { return message("%s %d tokens, %d -> %d", c.recipe, c.tokens, c.in, c.out); }

// What a GEMM multiplies in place of x: x itself, its BF16 rounding, or codes times the dequantization scale.
std::vector<double> as_multiplied(const std::vector<float>& x, OperandFormat format) {
    std::vector<double> values(x.size());
    const float scale = is_fp8(format.dtype) ? scale_from_amax(amax_of(x), format.dtype) : 1.0f;
    for (size_t i = 0; i < x.size(); ++i)
        values[i] = is_fp8(format.dtype) ? double(decode_fp8(encode_fp8(x[i] * scale, format.dtype), format.dtype)) * double(1.0f / scale)
                                         : double(round_to_bf16(x[i]));
    return values;
}

// Element (i, j) of a (rows, cols) product summed over k, both operands given by their strides.
struct Strided {
    const std::vector<double>& values;
    int64_t row, k;
};
std::vector<double> product(int rows, int cols, int depth, Strided a, Strided b) {
    std::vector<double> out(size_t(rows) * cols);
#pragma omp parallel for
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < cols; ++j) {
            double sum = 0;
            for (int k = 0; k < depth; ++k) sum += a.values[size_t(i * a.row + k * a.k)] * b.values[size_t(j * b.row + k * b.k)];
            out[size_t(i) * cols + j] = sum;
        }
    return out;
}

std::vector<double> plus_rows(std::vector<double> y, const std::vector<float>& bias) {
    for (size_t i = 0; i < y.size(); ++i) y[i] += double(bias[i % bias.size()]);
    return y;
}

// One layer with everything around it that the trainer gives it.
struct Layer {
    explicit Layer(const Case& c)
        : recipe(find_recipe(c.recipe)), linear({"layer.check", c.tokens, c.in, c.out}, recipe), gemm({.cache_file = "", .autotune = false}),
          slots(3), nonfinite(1), weight_codes(size_t(c.in) * size_t(c.out)), weight_codes_transposed(weight_codes.size()), codes(size_t(c.tokens) * size_t(std::max(c.in, c.out))), transposed(codes.size()),
          workspace(quantize_workspace_bytes(c.tokens, std::max(c.in, c.out))) {
        linear.request(arena);
        arena.allocate();
        linear.plan(gemm);
        slots.zero();
        nonfinite.zero();
        if (linear.fp8()) {
            linear.weight_slot = slots.get(), linear.input_slot = slots.get() + 1, linear.grad_slot = slots.get() + 2;
            linear.weight_codes = weight_codes.get(), linear.weight_codes_transposed = weight_codes_transposed.get();
        }
        scratch = {.codes = codes.get(), .codes_transposed = transposed.get(), .workspace = workspace.get(), .nonfinite = nonfinite.get()};
    }
    Arena arena;
    const Recipe& recipe;
    Linear linear;
    Gemm gemm;
    DeviceBuffer<QuantSlot> slots;
    DeviceBuffer<uint32_t> nonfinite;
    DeviceBuffer<uint8_t> weight_codes, weight_codes_transposed, codes, transposed, workspace;
    LinearScratch scratch;
};

void quantize_master(const Layer& layer, const DeviceBuffer<float>& master, Dtype format) {
    amax_f32(master.get(), int64_t(master.size()), layer.slots.get(), nullptr);
    QuantizeWeight table{.master = master.get(), .q = layer.weight_codes.get(), .qt = layer.weight_codes_transposed.get(), .slot = layer.slots.get(),
                         .N = layer.linear.spec().out, .K = layer.linear.spec().in, .first_tile = 0};
    const int64_t tiles = quantize_weights_plan(&table, 1);
    const DeviceBuffer<QuantizeWeight> device(std::vector<QuantizeWeight>{table});
    quantize_weights(device.get(), 1, tiles, format, nullptr, nullptr, nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
}

void check_layer(Report& report, const Case& c) {
    Layer layer(c);
    const bool fp8 = layer.linear.fp8();
    const std::string text = text_of(c);
    const size_t n_in = size_t(c.tokens) * c.in, n_out = size_t(c.tokens) * c.out, n_w = size_t(c.in) * c.out;
    const std::vector<__nv_bfloat16> x = to_bf16(random_normal(n_in)), dy = to_bf16(random_normal(n_out, 3e-5f)), bias = to_bf16(random_normal(size_t(c.out)));
    const std::vector<float> w = random_normal(n_w, 0.02f), dw_before = random_normal(n_w, 1e-4f);

    const DeviceBuffer<float> master(w);
    const DeviceBuffer<__nv_bfloat16> x_device(x), dy_device(dy), bias_device(bias), w_bf16(to_bf16(w));
    DeviceBuffer<float> dw(n_w), dbias(size_t(c.out));  // dw is NaN: the first micro-batch must write it without reading
    DeviceBuffer<__nv_bfloat16> y(n_out), dx(n_in);
    dbias.zero();
    layer.linear.bias = bias_device.get();
    layer.linear.weight_bf16 = w_bf16.get();
    layer.linear.dweight = dw.get();
    layer.linear.dbias = dbias.get();
    if (fp8) {
        quantize_master(layer, master, layer.recipe.output.b.dtype);
        amax_bf16(x_device.get(), int64_t(n_in), layer.linear.input_slot, nullptr);
        amax_bf16(dy_device.get(), int64_t(n_out), layer.linear.grad_slot, nullptr);
    }
    layer.linear.forward({.x = x_device.get(), .y = y.get()}, layer.gemm, layer.scratch, nullptr);
    const auto backward = [&](Position position) {
        layer.linear.backward({.dy = dy_device.get(), .x = x_device.get(), .dx = dx.get(), .position = position}, layer.gemm, layer.scratch, nullptr);
        CUDA_CHECK(cudaDeviceSynchronize());
    };
    backward(Position::first);
    const std::vector<float> dw_written = dw.download();
    dw.upload(dw_before);
    backward(Position::last);

    // The definition, straight from torchao's table of the recipe.
    const bool tensorwise = std::string(c.recipe) == "tensorwise" && fp8;
    const OperandFormat forward{tensorwise ? Dtype::e4m3 : Dtype::bf16, Granularity::tensor}, gradient{tensorwise ? Dtype::e5m2 : Dtype::bf16, Granularity::tensor};
    const std::vector<double> xq = as_multiplied(to_float(x), forward), wq = as_multiplied(w, forward), dyq = as_multiplied(to_float(dy), gradient);
    const int64_t in = c.in, out = c.out;
    const std::vector<double> dw_product = product(c.out, c.in, c.tokens, {dyq, 1, out}, {xq, 1, in});
    std::vector<double> dw_expected = dw_product;
    for (size_t i = 0; i < n_w; ++i) dw_expected[i] += double(dw_before[i]);
    std::vector<double> dbias_expected(size_t(c.out), 0.0);
    const std::vector<float> dy_float = to_float(dy);
    for (size_t i = 0; i < n_out; ++i) dbias_expected[i % size_t(c.out)] += 2 * double(dy_float[i]);  // added by both calls

    // BF16 outputs: one rounding, 2^-9, as root mean square less. The tensor core keeps about 14 bits of an FP8 partial sum:
    // fast accumulation adds K/32 such roundings of 2^-13 of the sum's running size, slow accumulation those of 128 terms.
    const Tolerance bf16_output{.relative = 4e-3}, f32_output{.relative = fp8 ? 2e-3 : 1e-5};
    report.compare("linear.y", text, to_float(y.download()), plus_rows(product(c.tokens, c.out, c.in, {xq, in, 1}, {wq, in, 1}), to_float(bias)), c.tokens, c.out, bf16_output);
    report.compare("linear.dx", text, to_float(dx.download()), product(c.tokens, c.in, c.out, {dyq, out, 1}, {wq, 1, in}), c.tokens, c.in, {.relative = 4e-3, .absolute = 1e-12});
    report.compare("linear.dW written", text, dw_written, dw_product, c.out, c.in, f32_output);
    report.compare("linear.dW accumulated", text, dw.download(), dw_expected, c.out, c.in, f32_output);
    report.compare("linear.dbias", text, dbias.download(), dbias_expected, 1, c.out, {.relative = 1e-5, .absolute = 1e-12});
    report.expect("linear guards", text, y.guards_intact() && dx.guards_intact() && dw.guards_intact() && dbias.guards_intact() && layer.codes.guards_intact() && layer.transposed.guards_intact() && layer.weight_codes.guards_intact() && layer.weight_codes_transposed.guards_intact(), "intact");
    report.expect("linear precision", text, fp8 == (std::string(c.recipe) == "tensorwise" && c.in % 16 == 0 && c.out % 16 == 0), fp8 ? "FP8" : layer.linear.obstacle());
}

void checks(Report& report) {
    for (const char* recipe : {"bf16", "tensorwise"})
        for (const Case& c : {Case{64, 64, 192, recipe}, Case{48, 16, 16, recipe}, Case{528, 128, 64, recipe}, Case{128, 40, 88, recipe}, Case{16, 256, 1024, recipe}})
            check_layer(report, c);
    if (report.small_only) return;
    for (const char* recipe : {"bf16", "tensorwise"})
        for (const Case& c : {Case{1024, 768, 2304, recipe}, Case{2048, 3072, 768, recipe}}) check_layer(report, c);
}

void no_benches(Report&) {}

}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "linear", checks, no_benches); }
