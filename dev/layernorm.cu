// Layer normalization against float64, and its speed. See kernels/layernorm.h.
#include "kernels/layernorm.h"

#include <bit>
#include <limits>
#include <memory>

#include "dev/harness.h"
#include "trainer/reference/quantizer.h"

namespace {

using bf16 = __nv_bfloat16;

// Storing a BF16 (8 significant bits) costs at most half a unit in the last place, 2^-8 of the value; the float
// arithmetic before it adds some 1e-6.
constexpr Tolerance kBf16Tolerance{.relative = 4e-3};
// Float sums of at most 64 terms a thread, then a tree of ten levels: at most 74 * 2^-24 of the sum of magnitudes,
// which for inputs of mean 1 and deviation 2 is about twice the sum.
constexpr Tolerance kFloatTolerance{.relative = 1e-5};

constexpr float kEps = 1e-5f;

std::vector<float> plus(std::vector<float> x, float constant) {
    for (float& value : x) value += constant;
    return x;
}
std::vector<bf16> random_bf16(size_t n, float mean, float stddev) {
    return to_bf16(plus(random_normal(n, stddev), mean));
}
std::string shape_of(int rows, int C, const char* what) { return message("%dx%d %s", rows, C, what); }

uint32_t amax_bits_of(const std::vector<bf16>& x) { return std::bit_cast<uint32_t>(amax_of(to_float(x))); }
uint32_t amax_bits_of(const DeviceBuffer<QuantSlot>& slot) { return slot.download()[0].amax_bits; }

// ---------------------------------------------------------------------------------------------------------------------
// Forward

struct ForwardResult {
    std::vector<bf16> residual_out, out;
    std::vector<float> mean, rstd;
    uint32_t amax_bits;
    bool guards_intact;
};
enum class ForwardAlias { none, residual, delta };

struct ForwardCase {
    int rows, C;
    std::vector<bf16> residual, delta;  // delta may be empty
    std::vector<float> weight, bias;

    ForwardCase(int rows, int C, bool has_delta)
        : rows(rows), C(C), residual(random_bf16(size_t(rows) * C, 1, 2)),
          delta(has_delta ? random_bf16(size_t(rows) * C, 0, 1) : std::vector<bf16>{}),
          weight(plus(random_normal(C, 0.3f), 1)), bias(random_normal(C, 0.5f)) {}

    ForwardResult run(ForwardAlias alias = ForwardAlias::none) const {
        DeviceBuffer<bf16> device_residual(residual), device_delta(delta.empty() ? residual : delta);
        DeviceBuffer<bf16> residual_out(residual.size()), out(residual.size());
        DeviceBuffer<float> device_weight(weight), device_bias(bias), mean(rows), rstd(rows);
        DeviceBuffer<QuantSlot> amax(1);
        amax.zero();
        const DeviceBuffer<bf16>& destination = alias == ForwardAlias::residual ? device_residual
                                                : alias == ForwardAlias::delta  ? device_delta
                                                                                : residual_out;
        layernorm_forward({.residual = device_residual.get(),
                           .delta = delta.empty() ? nullptr : device_delta.get(),
                           .residual_out = delta.empty() ? nullptr : destination.get(),
                           .weight = device_weight.get(),
                           .bias = device_bias.get(),
                           .out = out.get(),
                           .mean = mean.get(),
                           .rstd = rstd.get(),
                           .amax = amax.get(),
                           .rows = rows,
                           .C = C,
                           .eps = kEps},
                          nullptr);
        CUDA_CHECK(cudaDeviceSynchronize());
        return {destination.download(), out.download(), mean.download(), rstd.download(), amax_bits_of(amax),
                destination.guards_intact() && out.guards_intact() && mean.guards_intact() && rstd.guards_intact() &&
                    amax.guards_intact()};
    }
};

void check_forward(Report& report, int rows, int C, bool has_delta) {
    const std::string shape = shape_of(rows, C, has_delta ? "with addition" : "plain");
    const ForwardCase test(rows, C, has_delta);
    const ForwardResult result = test.run();

    std::vector<float> x = to_float(test.residual);
    if (has_delta) {
        const std::vector<float> delta = to_float(test.delta);
        for (size_t i = 0; i < x.size(); ++i) x[i] = round_to_bf16(x[i] + delta[i]);
        report.compare_bits("layernorm_forward.residual_out", shape, result.residual_out, to_bf16(x));
    }
    std::vector<double> out(x.size()), mean(rows), rstd(rows);
    for (int row = 0; row < rows; ++row) {
        const float* const values = x.data() + size_t(row) * C;
        double sum = 0, squares = 0;
        for (int c = 0; c < C; ++c) sum += values[c];
        mean[row] = sum / C;
        for (int c = 0; c < C; ++c) squares += (values[c] - mean[row]) * (values[c] - mean[row]);
        rstd[row] = 1 / std::sqrt(squares / C + double(kEps));
        for (int c = 0; c < C; ++c)
            out[size_t(row) * C + c] = (values[c] - mean[row]) * rstd[row] * test.weight[c] + test.bias[c];
    }
    report.compare("layernorm_forward.out", shape, to_float(result.out), out, rows, C, kBf16Tolerance);
    report.compare("layernorm_forward.mean", shape, result.mean, mean, rows, 1, kFloatTolerance);
    report.compare("layernorm_forward.rstd", shape, result.rstd, rstd, rows, 1, kFloatTolerance);
    report.expect("layernorm_forward.amax", shape, result.amax_bits == amax_bits_of(result.out),
                  message("bits %08x", result.amax_bits));
    report.expect("layernorm_forward.guards", shape, result.guards_intact, "");

    const auto same = [&](const char* name, const ForwardResult& other) {
        report.compare_bits(name, shape, other.out, result.out);
        report.compare_bits(name, shape, other.mean, result.mean);
        report.compare_bits(name, shape, other.rstd, result.rstd);
        if (has_delta) report.compare_bits(name, shape, other.residual_out, result.residual_out);
    };
    same("layernorm_forward.twice", test.run());
    if (!has_delta) return;
    same("layernorm_forward.onto_residual", test.run(ForwardAlias::residual));
    same("layernorm_forward.onto_delta", test.run(ForwardAlias::delta));
}

// A non-finite input makes its row NaN, and amax shows it.
void check_forward_nonfinite(Report& report, int rows, int C) {
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        ForwardCase test(rows, C, false);
        const int bad_row = rows / 2;
        test.residual[size_t(bad_row) * C + C - 1] = __float2bfloat16(bad);
        const ForwardResult result = test.run();
        bool ok = true;
        for (int row = 0; row < rows; ++row)
            ok = ok && std::isnan(__bfloat162float(result.out[size_t(row) * C])) == (row == bad_row);
        report.expect("layernorm_forward.nonfinite", shape_of(rows, C, std::isnan(bad) ? "NaN" : "inf"),
                      ok && std::isnan(std::bit_cast<float>(result.amax_bits)),
                      message("amax bits %08x", result.amax_bits));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

struct BackwardResult {
    std::vector<bf16> dresidual_out;
    std::vector<float> dweight, dbias;
    uint32_t amax_bits;
    bool guards_intact;
};
enum class BackwardAlias { none, dresidual_in, dout };

struct BackwardCase {
    int rows, C;
    std::vector<bf16> x, dout, dresidual_in;  // dresidual_in may be empty
    std::vector<float> weight, mean, rstd, dweight, dbias;

    BackwardCase(int rows, int C, bool has_dresidual)
        : rows(rows), C(C), x(random_bf16(size_t(rows) * C, 1, 2)), dout(random_bf16(size_t(rows) * C, 0.1f, 1)),
          dresidual_in(has_dresidual ? random_bf16(size_t(rows) * C, 0, 1) : std::vector<bf16>{}),
          weight(plus(random_normal(C, 0.3f), 1)), mean(rows), rstd(rows), dweight(random_normal(C)),
          dbias(random_normal(C)) {
        const std::vector<float> values = to_float(x);
        for (int row = 0; row < rows; ++row) {
            double sum = 0, squares = 0;
            for (int c = 0; c < C; ++c) sum += values[size_t(row) * C + c];
            for (int c = 0; c < C; ++c) squares += std::pow(values[size_t(row) * C + c] - sum / C, 2);
            mean[row] = float(sum / C);
            rstd[row] = float(1 / std::sqrt(squares / C + double(kEps)));
        }
    }

    BackwardResult run(BackwardAlias alias = BackwardAlias::none) const {
        DeviceBuffer<bf16> device_x(x), device_dout(dout), device_dresidual(dresidual_in.empty() ? x : dresidual_in);
        DeviceBuffer<bf16> dresidual_out(x.size());
        DeviceBuffer<float> device_weight(weight), device_mean(mean), device_rstd(rstd), device_dweight(dweight),
            device_dbias(dbias);
        DeviceBuffer<uint8_t> workspace(layernorm_backward_workspace_bytes(C));
        DeviceBuffer<QuantSlot> amax(1);
        amax.zero();
        const DeviceBuffer<bf16>& destination = alias == BackwardAlias::dresidual_in ? device_dresidual
                                                : alias == BackwardAlias::dout       ? device_dout
                                                                                     : dresidual_out;
        layernorm_backward({.x = device_x.get(),
                            .dout = device_dout.get(),
                            .weight = device_weight.get(),
                            .mean = device_mean.get(),
                            .rstd = device_rstd.get(),
                            .dresidual_in = dresidual_in.empty() ? nullptr : device_dresidual.get(),
                            .dresidual_out = destination.get(),
                            .dweight = device_dweight.get(),
                            .dbias = device_dbias.get(),
                            .amax = amax.get(),
                            .workspace = workspace.get(),
                            .rows = rows,
                            .C = C},
                           nullptr);
        CUDA_CHECK(cudaDeviceSynchronize());
        return {destination.download(), device_dweight.download(), device_dbias.download(), amax_bits_of(amax),
                destination.guards_intact() && device_dweight.guards_intact() && device_dbias.guards_intact() &&
                    workspace.guards_intact() && amax.guards_intact()};
    }
};

void check_backward(Report& report, int rows, int C, bool has_dresidual) {
    const std::string shape = shape_of(rows, C, has_dresidual ? "with addition" : "plain");
    const BackwardCase test(rows, C, has_dresidual);
    const BackwardResult result = test.run();

    const std::vector<float> x = to_float(test.x), dout = to_float(test.dout),
                             before = has_dresidual ? to_float(test.dresidual_in) : std::vector<float>(x.size());
    std::vector<double> dresidual(x.size()), dweight(test.dweight.begin(), test.dweight.end()),
        dbias(test.dbias.begin(), test.dbias.end());
    for (int row = 0; row < rows; ++row) {
        const size_t first = size_t(row) * C;
        const double mean = test.mean[row], rstd = test.rstd[row];
        double sum_g = 0, sum_g_xhat = 0;
        for (int c = 0; c < C; ++c) {
            const double xhat = (x[first + c] - mean) * rstd, g = double(dout[first + c]) * test.weight[c];
            sum_g += g;
            sum_g_xhat += g * xhat;
            dweight[c] += dout[first + c] * xhat;
            dbias[c] += dout[first + c];
        }
        for (int c = 0; c < C; ++c) {
            const double xhat = (x[first + c] - mean) * rstd, g = double(dout[first + c]) * test.weight[c];
            dresidual[first + c] = before[first + c] + rstd * (g - sum_g / C - xhat * (sum_g_xhat / C));
        }
    }
    report.compare("layernorm_backward.dresidual_out", shape, to_float(result.dresidual_out), dresidual, rows, C,
                   kBf16Tolerance);
    report.compare("layernorm_backward.dweight", shape, result.dweight, dweight, 1, C, kFloatTolerance);
    report.compare("layernorm_backward.dbias", shape, result.dbias, dbias, 1, C, kFloatTolerance);
    report.expect("layernorm_backward.amax", shape, result.amax_bits == amax_bits_of(result.dresidual_out),
                  message("bits %08x", result.amax_bits));
    report.expect("layernorm_backward.guards", shape, result.guards_intact, "");

    const auto same = [&](const char* name, const BackwardResult& other) {
        report.compare_bits(name, shape, other.dresidual_out, result.dresidual_out);
        report.compare_bits(name, shape, other.dweight, result.dweight);
        report.compare_bits(name, shape, other.dbias, result.dbias);
    };
    same("layernorm_backward.twice", test.run());
    same("layernorm_backward.onto_dout", test.run(BackwardAlias::dout));
    if (has_dresidual) same("layernorm_backward.onto_dresidual_in", test.run(BackwardAlias::dresidual_in));
}

void check_backward_nonfinite(Report& report, int rows, int C) {
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        BackwardCase test(rows, C, true);
        test.dout[size_t(rows / 2) * C + C - 1] = __float2bfloat16(bad);
        const BackwardResult result = test.run();
        report.expect("layernorm_backward.nonfinite", shape_of(rows, C, std::isnan(bad) ? "NaN" : "inf"),
                      !std::isfinite(std::bit_cast<float>(result.amax_bits)) && !std::isfinite(result.dbias[C - 1]) &&
                          std::isfinite(result.dbias[0]),
                      message("amax bits %08x", result.amax_bits));
    }
}

void checks(Report& report) {
    struct Shape {
        int rows, C;
    };
    // Every template and its edges; the first ones have more rows than the grid takes at once.
    std::vector<Shape> shapes = {{9001, 8}, {1, 8}, {3, 264}, {2, 520}, {67, 768}, {5, 1032}, {19, 1600},
                                 {1, 2048}, {3, 2056}, {2, 4096}, {2, 4104}, {1, 5120}, {3, 8200}, {2, 16384}};
    if (!report.small_only)
        for (const Shape& shape :
             {Shape{9001, 768}, {5003, 1600}, {1031, 1280}, {2999, 2048}, {701, 4096}, {577, 5120}, {307, 16384}})
            shapes.push_back(shape);
    for (const auto& [rows, C] : shapes) {
        for (const bool addition : {false, true}) {
            check_forward(report, rows, C, addition);
            check_backward(report, rows, C, addition);
        }
    }
    for (const Shape& shape : {Shape{37, 768}, {5, 4096}}) {
        check_forward_nonfinite(report, shape.rows, shape.C);
        check_backward_nonfinite(report, shape.rows, shape.C);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Speed

// A random block, repeated: sooner made than n random numbers.
std::vector<bf16> bench_values(size_t n) {
    const std::vector<bf16> block = to_bf16(random_normal(size_t(1) << 22));
    std::vector<bf16> values(n);
    for (size_t i = 0; i < n; ++i) values[i] = block[i % block.size()];
    return values;
}

struct BenchSet {
    DeviceBuffer<bf16> x, delta, y, z;
    DeviceBuffer<float> weight, bias, mean, rstd, dweight, dbias;
    DeviceBuffer<uint8_t> workspace;
    DeviceBuffer<QuantSlot> amax{1};

    BenchSet(const std::vector<bf16>& values, int rows, int C)
        : x(values), delta(values), y(values), z(values), weight(random_normal(C)), bias(random_normal(C)),
          mean(random_normal(rows)), rstd(random_uniform(rows, 0.5f, 2.0f)), dweight(random_normal(C)),
          dbias(random_normal(C)), workspace(layernorm_backward_workspace_bytes(C)) {
        amax.zero();
    }
};

void benches(Report& report) {
    struct Shape {
        int rows, C;
    };
    for (const auto& [rows, C] : {Shape{65536, 768}, {16384, 1600}, {16384, 4096}}) {
        const std::vector<bf16> values = bench_values(size_t(rows) * C);
        constexpr int kSets = 2;
        std::vector<std::unique_ptr<BenchSet>> sets;
        for (int i = 0; i < kSets; ++i) sets.push_back(std::make_unique<BenchSet>(values, rows, C));
        const double tensor_bytes = double(rows) * C * sizeof(bf16);

        for (const bool addition : {false, true}) {
            report.bench({.name = addition ? "layernorm_forward.with_addition" : "layernorm_forward",
                          .shape = shape_of(rows, C, ""),
                          .bytes = (addition ? 4 : 2) * tensor_bytes,
                          .sets = kSets},
                         [&, rows = rows, C = C](int i, cudaStream_t stream) {
                             const BenchSet& set = *sets[i];
                             layernorm_forward({.residual = set.x.get(),
                                                .delta = addition ? set.delta.get() : nullptr,
                                                .residual_out = addition ? set.y.get() : nullptr,
                                                .weight = set.weight.get(),
                                                .bias = set.bias.get(),
                                                .out = set.z.get(),
                                                .mean = set.mean.get(),
                                                .rstd = set.rstd.get(),
                                                .amax = set.amax.get(),
                                                .rows = rows,
                                                .C = C,
                                                .eps = kEps},
                                               stream);
                         });
        }
        report.bench({.name = "layernorm_backward",
                      .shape = shape_of(rows, C, ""),
                      .bytes = 4 * tensor_bytes,
                      .sets = kSets},
                     [&, rows = rows, C = C](int i, cudaStream_t stream) {
                         const BenchSet& set = *sets[i];
                         layernorm_backward({.x = set.x.get(),
                                             .dout = set.delta.get(),
                                             .weight = set.weight.get(),
                                             .mean = set.mean.get(),
                                             .rstd = set.rstd.get(),
                                             .dresidual_in = set.y.get(),
                                             .dresidual_out = set.z.get(),
                                             .dweight = set.dweight.get(),
                                             .dbias = set.dbias.get(),
                                             .amax = set.amax.get(),
                                             .workspace = set.workspace.get(),
                                             .rows = rows,
                                             .C = C},
                                            stream);
                     });
    }
}

}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "layernorm", checks, benches); }
