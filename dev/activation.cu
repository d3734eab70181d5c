// GELU against float64, over every BF16 input too, and its speed. See kernels/activation.h.
#include "kernels/activation.h"

#include <bit>
#include <limits>
#include <memory>
#include <numbers>

#include "dev/harness.h"
#include "trainer/reference/quantizer.h"

namespace {

using bf16 = __nv_bfloat16;

// Storing a BF16 (8 significant bits) costs at most half a unit in the last place, 2^-8 of the value. For very
// negative inputs gelu and its derivative are small differences of float numbers near 1, each off by up to two units
// of 2^-24, and the derivative multiplies that by up to 9 where it still matters (|x| = 5): an absolute error of up
// to some 4e-6.
constexpr double kRelative = 4e-3, kAbsolute = 5e-6;
constexpr Tolerance kTolerance{.relative = kRelative};

double tanh_argument(double x) { return std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x); }
double gelu_reference(double x) { return x / (1 + std::exp(-2 * tanh_argument(x))); }  // = x/2 (1 + tanh)
double gelu_derivative_reference(double x) {
    const double s = 1 / (1 + std::exp(-2 * tanh_argument(x)));
    if (s == 0 || s == 1) return s;
    return s + x * s * (1 - s) * 2 * std::sqrt(2 / std::numbers::pi) * (1 + 3 * 0.044715 * x * x);
}

uint32_t amax_bits_of(const std::vector<bf16>& x) { return std::bit_cast<uint32_t>(amax_of(to_float(x))); }

struct Result {
    std::vector<bf16> out;
    uint32_t amax_bits;
    bool guards_intact;
};

Result run_forward(const std::vector<bf16>& h, bool in_place = false) {
    DeviceBuffer<bf16> device_h(h), separate(h.size());
    DeviceBuffer<QuantSlot> amax(1);
    amax.zero();
    const DeviceBuffer<bf16>& out = in_place ? device_h : separate;
    gelu_forward(device_h.get(), out.get(), int64_t(h.size()), amax.get(), nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
    return {out.download(), amax.download()[0].amax_bits, out.guards_intact() && amax.guards_intact()};
}
uint32_t run_amax(const std::vector<bf16>& h) {
    DeviceBuffer<bf16> device_h(h);
    DeviceBuffer<QuantSlot> amax(1);
    amax.zero();
    gelu_amax(device_h.get(), int64_t(h.size()), amax.get(), nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
    return amax.download()[0].amax_bits;
}
Result run_backward(const std::vector<bf16>& h, const std::vector<bf16>& dout, bool in_place = false) {
    DeviceBuffer<bf16> device_h(h), device_dout(dout), separate(h.size());
    DeviceBuffer<QuantSlot> amax(1);
    amax.zero();
    const DeviceBuffer<bf16>& dh = in_place ? device_dout : separate;
    gelu_backward(device_h.get(), device_dout.get(), dh.get(), int64_t(h.size()), amax.get(), nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
    return {dh.download(), amax.download()[0].amax_bits, dh.guards_intact() && amax.guards_intact()};
}

void check_random(Report& report, int64_t rows, int64_t cols, float stddev) {
    const std::string shape =
        message("%lldx%lld std %g", static_cast<long long>(rows), static_cast<long long>(cols), stddev);
    const size_t n = size_t(rows * cols);
    const std::vector<bf16> h = to_bf16(random_normal(n, stddev)), dout = to_bf16(random_normal(n));
    const std::vector<float> x = to_float(h), d = to_float(dout);
    std::vector<double> out(n), dh(n);
    for (size_t i = 0; i < n; ++i) out[i] = gelu_reference(x[i]), dh[i] = d[i] * gelu_derivative_reference(x[i]);

    const Result forward = run_forward(h), backward = run_backward(h, dout);
    report.compare("gelu_forward", shape, to_float(forward.out), out, rows, cols, kTolerance);
    report.compare("gelu_backward", shape, to_float(backward.out), dh, rows, cols, kTolerance);
    report.expect("gelu_forward.amax", shape, forward.amax_bits == amax_bits_of(forward.out),
                  message("bits %08x", forward.amax_bits));
    report.expect("gelu_backward.amax", shape, backward.amax_bits == amax_bits_of(backward.out),
                  message("bits %08x", backward.amax_bits));
    const uint32_t amax_bits = run_amax(h);
    report.expect("gelu_amax", shape, amax_bits == forward.amax_bits, message("bits %08x", amax_bits));
    report.expect("gelu.guards", shape, forward.guards_intact && backward.guards_intact, "");
    report.compare_bits("gelu_forward.in_place", shape, run_forward(h, true).out, forward.out);
    report.compare_bits("gelu_backward.in_place", shape, run_backward(h, dout, true).out, backward.out);
}

// Inputs that leave gelu_amax undecided for long, or forever, and non-finite ones.
void check_amax_edges(Report& report, int64_t n) {
    const std::vector<float> normal = random_normal(size_t(n));
    const auto check = [&](const char* name, const std::function<float(size_t, float)>& change, bool finite) {
        std::vector<float> x(normal.size());
        for (size_t i = 0; i < x.size(); ++i) x[i] = change(i, normal[i]);
        const std::vector<bf16> h = to_bf16(x);
        const Result forward = run_forward(h);
        const uint32_t bits = run_amax(h);
        report.expect(message("gelu_amax.%s", name), message("%lld", static_cast<long long>(n)),
                      bits == forward.amax_bits && bits == amax_bits_of(forward.out) &&
                          std::isfinite(std::bit_cast<float>(bits)) == finite,
                      message("bits %08x, of gelu_forward %08x", bits, forward.amax_bits));
    };
    constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
    const size_t last = normal.size() - 1, middle = normal.size() / 2;
    check("negative", [](size_t, float x) { return -std::fabs(x); }, true);
    check("negative_but_last", [&](size_t i, float x) { return i == last ? 0.35f : -std::fabs(x); }, true);
    check("below_threshold", [](size_t, float x) { return std::fmin(x, 0.3f); }, true);
    check("inf", [&](size_t i, float x) { return i == middle ? kInf : x; }, false);
    check("minus_inf", [&](size_t i, float x) { return i == middle ? -kInf : x; }, false);
    check("nan", [&](size_t i, float x) { return i == middle ? kNan : x; }, false);
    check("nan_last", [&](size_t i, float x) { return i == last ? kNan : x; }, false);
    check("nan_among_negative", [&](size_t i, float x) { return i == middle ? kNan : -std::fabs(x); }, false);

    const std::vector<bf16> h = to_bf16(normal);
    std::vector<float> d = normal;
    d[middle] = kInf;
    d[last] = kNan;
    const uint32_t bits = run_backward(h, to_bf16(d)).amax_bits;
    report.expect("gelu_backward.nonfinite", message("%lld", static_cast<long long>(n)),
                  std::isnan(std::bit_cast<float>(bits)), message("bits %08x", bits));
}

// Every BF16. The derivative is checked up to 1e12: beyond it, powers of the input overflow.
void check_every_input(Report& report) {
    std::vector<bf16> h(65536);
    for (size_t i = 0; i < h.size(); ++i) h[i] = std::bit_cast<bf16>(uint16_t(i));
    const std::vector<bf16> ones = to_bf16(std::vector<float>(h.size(), 1.0f));
    const std::vector<float> x = to_float(h), y = to_float(run_forward(h).out);
    const std::vector<float> dy = to_float(run_backward(h, ones).out);

    const auto worst_error = [&](const std::vector<float>& out, double (*reference)(double), double limit) {
        double worst = 0;  // in units of what is allowed; NaN once seen
        for (size_t i = 0; i < x.size(); ++i) {
            if (!(std::fabs(x[i]) <= limit)) continue;
            const double expected = reference(x[i]);
            const double error = std::fabs(out[i] - expected) / (kRelative * std::fabs(expected) + kAbsolute);
            if (!(error <= worst)) worst = error;
        }
        return worst;
    };
    const double forward_error = worst_error(y, gelu_reference, 1e38);
    const double backward_error = worst_error(dy, gelu_derivative_reference, 1e12);
    report.expect("gelu_forward.every_input", "", forward_error <= 1, message("%.3f of the tolerance", forward_error));
    report.expect("gelu_backward.every_input", "", backward_error <= 1,
                  message("%.3f of the tolerance", backward_error));

    bool nan_stays = true;
    for (size_t i = 0; i < x.size(); ++i)
        nan_stays = nan_stays && (!std::isnan(x[i]) || (std::isnan(y[i]) && std::isnan(dy[i])));
    report.expect("gelu.nan_stays", "", nan_stays, "");

    // What gelu_amax relies on
    const size_t decided = bf16_bits(0.3125f), infinity = bf16_bits(std::numeric_limits<float>::infinity());
    bool monotone = true, bounded = true;
    for (size_t i = decided; i < infinity; ++i) monotone = monotone && y[i] <= y[i + 1];
    for (size_t i = 0; i < x.size(); ++i)
        if (std::isfinite(x[i]) && x[i] < 0.3125f) bounded = bounded && std::fabs(y[i]) <= y[decided];
    report.expect("gelu_amax.premise_monotone", "from 0.3125", monotone, "");
    report.expect("gelu_amax.premise_bounded", "below 0.3125", bounded, message("by %g", y[decided]));
}

void checks(Report& report) {
    check_every_input(report);
    check_random(report, 1, 8, 1);
    check_random(report, 1, 8 * 1021, 2);
    check_random(report, 13, 8 * 257, 0.01f);
    check_amax_edges(report, 8 * 4099);
    if (report.small_only) return;
    check_random(report, 4099, 3072, 1);  // more than the grid takes at once
    check_random(report, 1031, 6400, 3);
    check_amax_edges(report, 8 * 2000003);
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

void benches(Report& report) {
    struct Shape {
        int64_t rows, cols;
    };
    for (const auto& [rows, cols] : {Shape{65536, 3072}, {16384, 6400}}) {
        const int64_t n = rows * cols;
        const std::string shape = message("%lldx%lld", static_cast<long long>(rows), static_cast<long long>(cols));
        const DeviceBuffer<bf16> h(bench_values(size_t(n))), dout(bench_values(size_t(n)));
        const DeviceBuffer<bf16> out{size_t(n)};
        DeviceBuffer<QuantSlot> slot(1);
        slot.zero();
        for (QuantSlot* const amax : {static_cast<QuantSlot*>(nullptr), slot.get()}) {
            const char* const with = amax ? ".with_amax" : "";
            report.bench({.name = message("gelu_forward%s", with), .shape = shape, .bytes = 4.0 * double(n)},
                         [&](int, cudaStream_t stream) { gelu_forward(h.get(), out.get(), n, amax, stream); });
            report.bench({.name = message("gelu_backward%s", with), .shape = shape, .bytes = 6.0 * double(n)},
                         [&](int, cudaStream_t stream) {
                             gelu_backward(h.get(), dout.get(), out.get(), n, amax, stream);
                         });
        }
        report.bench({.name = "gelu_amax", .shape = shape, .bytes = 2.0 * double(n)},
                     [&](int, cudaStream_t stream) { gelu_amax(h.get(), n, slot.get(), stream); });
    }
}

}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "activation", checks, benches); }
