// Softmax cross-entropy against float64, and its speed. See kernels/classifier.h.
#include "kernels/classifier.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>

#include "dev/harness.h"
#include "trainer/reference/quantizer.h"

namespace {

using bf16 = __nv_bfloat16;

// Storing a BF16 (8 significant bits) costs at most half a unit in the last place, 2^-8 of the value; the exponential
// and the sum in float add some 1e-5. Gradients are small numbers, so the floor is far below them.
constexpr Tolerance kGradientTolerance{.relative = 4e-3, .absolute = 1e-12};
// The sum of exponentials is good to about 64 * 2^-24, which is an absolute error of its logarithm; losses are about
// 1 to 12, but for huge logits, where 2^-24 of the loss counts.
constexpr Tolerance kLossTolerance{.relative = 4e-6, .absolute = 1e-3};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
    int rows, V, Vp;
    std::vector<bf16> logits;  // NaN in the padding and in masked rows: neither may count
    std::vector<int> targets;

    Case(int rows, int V, int Vp, float stddev, double masked_share)
        : rows(rows), V(V), Vp(Vp), targets(random_ints(rows, 0, V)) {
        std::vector<float> x = random_normal(size_t(rows) * Vp, stddev);
        const std::vector<float> draw = random_uniform(rows, 0, 1);
        for (int row = 0; row < rows; ++row) {
            if (draw[row] < masked_share) targets[row] = -1 - row;
            const auto first = x.begin() + int64_t(row) * Vp;
            std::fill(targets[row] < 0 ? first : first + V, first + Vp, kNan);
        }
        logits = to_bf16(x);
    }

    struct Result {
        std::vector<bf16> logits;
        std::vector<float> losses;
        bool guards_intact;
    };
    Result run(const float* gradient_scale) const {
        DeviceBuffer<bf16> device_logits(logits);
        DeviceBuffer<int> device_targets(targets);
        DeviceBuffer<float> losses(rows), scale(std::vector<float>{gradient_scale ? *gradient_scale : 0.0f});
        classifier({.logits = device_logits.get(),
                    .targets = device_targets.get(),
                    .losses = losses.get(),
                    .gradient_scale = gradient_scale ? scale.get() : nullptr,
                    .rows = rows,
                    .V = V,
                    .Vp = Vp},
                   nullptr);
        CUDA_CHECK(cudaDeviceSynchronize());
        return {device_logits.download(), losses.download(), device_logits.guards_intact() && losses.guards_intact()};
    }
};

void check(Report& report, int rows, int V, int Vp, float stddev = 2, double masked_share = 0.25) {
    const std::string shape = message("%dx%d of %d, std %g, %g masked", rows, V, Vp, stddev, masked_share);
    const Case test(rows, V, Vp, stddev, masked_share);
    const float gradient_scale = 0.37f;
    const Case::Result result = test.run(&gradient_scale);

    const std::vector<float> x = to_float(test.logits);
    std::vector<double> gradient(x.size()), losses(rows);
#pragma omp parallel for
    for (int row = 0; row < rows; ++row) {
        if (test.targets[row] < 0) continue;
        const float* const values = x.data() + size_t(row) * Vp;
        const double max = *std::max_element(values, values + V);
        double sum = 0;
        for (int v = 0; v < V; ++v) sum += std::exp(values[v] - max);
        losses[row] = max + std::log(sum) - values[test.targets[row]];
        for (int v = 0; v < V; ++v)
            gradient[size_t(row) * Vp + v] =
                (std::exp(values[v] - max) / sum - (v == test.targets[row])) * double(gradient_scale);
    }
    report.compare("classifier.losses", shape, result.losses, losses, rows, 1, kLossTolerance);
    report.compare("classifier.gradient", shape, to_float(result.logits), gradient, rows, Vp, kGradientTolerance);
    report.expect("classifier.guards", shape, result.guards_intact, "");

    int64_t wrong = 0;  // must be zero exactly
    for (int row = 0; row < rows; ++row)
        for (int v = test.targets[row] < 0 ? 0 : V; v < Vp; ++v)
            wrong += !(__bfloat162float(result.logits[size_t(row) * Vp + v]) == 0.0f);
    report.expect("classifier.zeros", shape, wrong == 0, message("%lld wrong", static_cast<long long>(wrong)));

    const Case::Result again = test.run(&gradient_scale);
    report.compare_bits("classifier.twice", shape, again.logits, result.logits);
    report.compare_bits("classifier.twice", shape, again.losses, result.losses);

    const Case::Result losses_only = test.run(nullptr);
    report.compare_bits("classifier.losses_only", shape, losses_only.losses, result.losses);
    report.compare_bits("classifier.logits_untouched", shape, losses_only.logits, test.logits);
}

// What is wrong with a row shows in its loss, and nowhere else.
void check_bad_rows(Report& report, int V, int Vp) {
    const std::string shape = message("%d of %d", V, Vp);
    Case test(7, V, Vp, 1, 0);
    constexpr float kInf = std::numeric_limits<float>::infinity();
    test.targets[1] = V;                          // in the padding, or one past the row
    test.targets[2] = std::numeric_limits<int>::max();
    test.logits[size_t(3) * Vp + V - 1] = __float2bfloat16(kNan);
    test.logits[size_t(4) * Vp] = __float2bfloat16(kInf);
    test.targets[5] = V > 1;
    test.logits[size_t(5) * Vp] = __float2bfloat16(-kInf);  // a logit of -inf is a probability of zero
    const float gradient_scale = 1;
    const Case::Result result = test.run(&gradient_scale);
    for (int row = 0; row < test.rows; ++row) {
        const bool bad = row >= 1 && row <= 4;
        report.expect("classifier.bad_rows", shape + message(", row %d", row),
                      bad ? std::isnan(result.losses[row]) : std::isfinite(result.losses[row]),
                      message("loss %g", result.losses[row]));
    }
    report.expect("classifier.bad_rows.guards", shape, result.guards_intact, "");
    report.expect("classifier.bad_rows.gradient", shape + ", row 5",
                  __bfloat162float(result.logits[size_t(5) * Vp]) == 0.0f, "of the logit -inf");
}

void check_accumulate_loss(Report& report, int n) {
    const std::string shape = message("%d", n);
    std::vector<float> losses = random_uniform(n, 0, 12);
    const float scale = 1.0f / n, start = 0.625f;
    const auto run = [&](const float* scale_or_null, uint32_t& nonfinite) {
        DeviceBuffer<float> device_losses(losses), sum(std::vector<float>{start}),
            device_scale(std::vector<float>{scale_or_null ? *scale_or_null : 0.0f});
        DeviceBuffer<uint32_t> flag(1);
        flag.zero();
        accumulate_loss(device_losses.get(), n, scale_or_null ? device_scale.get() : nullptr, sum.get(), flag.get(),
                        nullptr);
        CUDA_CHECK(cudaDeviceSynchronize());
        nonfinite = flag.download()[0];
        return sum.download()[0];
    };
    // In double until the one rounding to float
    const double total = std::accumulate(losses.begin(), losses.end(), 0.0);
    uint32_t nonfinite = 0;
    for (const float* const scale_or_null : {&scale, static_cast<const float*>(nullptr)}) {
        const float sum = run(scale_or_null, nonfinite);
        const double expected = start + (scale_or_null ? double(scale) : 1.0) * total;
        const double error = std::fabs(sum - expected) / expected;
        report.expect(scale_or_null ? "accumulate_loss" : "accumulate_loss.unscaled", shape,
                      error <= 1e-7 && nonfinite == 0, message("off by %.1e", error));
    }
    for (const float bad : {kNan, std::numeric_limits<float>::infinity()}) {
        losses[n / 2] = bad;
        const float sum = run(&scale, nonfinite);
        report.expect("accumulate_loss.nonfinite", shape, !std::isfinite(sum) && nonfinite != 0,
                      message("sum %g", sum));
    }
}

void checks(Report& report) {
    check(report, 9001, 5, 8);  // more rows than the grid takes at once
    check(report, 1, 1, 8, 2, 0);
    check(report, 13, 8, 8);
    check(report, 17, 257, 384);
    check(report, 6, 50257, 50304);
    check(report, 5, 50257, 50304, 2, 1);
    check(report, 7, 257, 384, 1e4f);
    check(report, 3, 57344, 57344, 2, 0);  // the longest row in registers
    check(report, 3, 57345, 57352);        // the shortest that is read twice
    check_bad_rows(report, 257, 384);
    check_bad_rows(report, 8, 8);
    check_bad_rows(report, 60001, 60032);
    for (const int n : {1, 7, 1000, 65537}) check_accumulate_loss(report, n);
    if (report.small_only) return;
    check(report, 601, 50257, 50304);
    check(report, 401, 50257, 50304, 2, 0);
    check(report, 131, 50257, 50304, 1e4f, 0);
    check(report, 301, 128256, 128256);
    check(report, 10007, 257, 384);
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
        int rows, V, Vp;
    };
    for (const auto& [rows, V, Vp] : {Shape{8192, 50257, 50304}, {2048, 50257, 50304}, {4096, 128256, 128256}}) {
        const std::string shape = message("%dx%d of %d", rows, V, Vp);
        const DeviceBuffer<bf16> logits(bench_values(size_t(rows) * Vp));
        const DeviceBuffer<int> targets(random_ints(rows, 0, V));
        const DeviceBuffer<float> losses{size_t(rows)};
        // Every call works on the gradients of the one before: this scale keeps them from becoming all zeros.
        const DeviceBuffer<float> gradient_scale(std::vector<float>{1000.0f});
        for (const bool losses_only : {true, false}) {
            const Classifier call{.logits = logits.get(),
                                  .targets = targets.get(),
                                  .losses = losses.get(),
                                  .gradient_scale = losses_only ? nullptr : gradient_scale.get(),
                                  .rows = rows,
                                  .V = V,
                                  .Vp = Vp};
            report.bench({.name = losses_only ? "classifier.losses_only" : "classifier",
                          .shape = shape,
                          .bytes = (losses_only ? 2.0 : 4.0) * rows * Vp},
                         [&](int, cudaStream_t stream) { classifier(call, stream); });
        }
    }
    const DeviceBuffer<float> losses(random_uniform(65536, 0, 12)), sum(std::vector<float>{0.0f});
    report.bench({.name = "accumulate_loss", .shape = "65536", .bytes = 4.0 * 65536}, [&](int, cudaStream_t stream) {
        accumulate_loss(losses.get(), 65536, nullptr, sum.get(), nullptr, stream);
    });
}

}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "classifier", checks, benches); }
