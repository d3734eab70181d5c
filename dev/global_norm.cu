// The sum of squares of the gradients against a double sum, and its speed.
#include "kernels/global_norm.h"

#include <algorithm>
#include <limits>

#include "dev/harness.h"

namespace {
size_t n_partials() { return static_cast<size_t>(global_norm_partials()); }

double total_of(const std::vector<float>& partials) {
    double sum = 0;
    for (const float partial : partials) sum += double(partial);
    return sum;
}

void check(Report& report, const std::string& name, const std::vector<float>& x) {
    const std::string shape = message("n=%zu", x.size());
    const DeviceBuffer<float> in(x), partials(n_partials()), again(n_partials());
    sum_of_squares(in.get(), int64_t(x.size()), partials.get(), nullptr);
    sum_of_squares(in.get(), int64_t(x.size()), again.get(), nullptr);
    double reference = 0;
    for (const float value : x) reference += double(value) * double(value);
    const double sum = total_of(partials.download());
    // A group of four squares is rounded three times in float on any one element's way, a block's partial sum once
    // more, each by at most 2^-24; everything between is double.
    constexpr double kTolerance = 0x1p-22;
    const double error = reference == 0 ? std::fabs(sum) : std::fabs(sum - reference) / reference;
    report.expect(name, shape, error <= kTolerance, message("sum %g, rel %.1e tol %.1e", sum, error, kTolerance));
    report.compare_bits(name + " again", shape, again.download(), partials.download());
    report.expect(name + " guards", shape, partials.guards_intact() && again.guards_intact(), "intact");
}

// As many as one to many units leave, in the kernel's order: a thread's in turn, then pairs of threads, whose sums are the same from either side.
void check_fold(Report& report, size_t n) {
    constexpr size_t kThreads = size_t(kFoldedPartials) * 32;
    std::vector<float> x = random_normal(n, 1e6f);
    for (float& value : x) value = std::fabs(value);
    std::vector<double> sums(kThreads);
    for (size_t i = 0; i < n; ++i) sums[i % kThreads] += double(x[i]);
    std::vector<float> expected;
    for (size_t warp = 0; warp < kThreads; warp += 32) {
        for (size_t half = 16; half > 0; half /= 2)
            for (size_t lane = 0; lane < half; ++lane) sums[warp + lane] += sums[warp + lane + half];
        expected.push_back(float(sums[warp]));
    }
    const DeviceBuffer<float> in(x), folded(size_t{kFoldedPartials});
    fold_partials(in.get(), int(n), folded.get(), nullptr);
    const std::vector<float> got = folded.download();
    report.compare_bits("fold", message("n=%zu", n), got, expected);
    const double of_all = total_of(x), error = of_all == 0 ? total_of(got) : std::fabs(total_of(got) / of_all - 1);
    report.expect("fold keeps the sum", message("n=%zu", n), error <= 0x1p-24, message("rel %.1e", error));
    report.expect("fold guards", message("n=%zu", n), folded.guards_intact(), "intact");
}

void checks(Report& report) {
    for (const size_t n : {size_t(0), size_t(1), size_t(33), size_t(1023), size_t(1025), 3 * n_partials(), 97 * n_partials()}) check_fold(report, n);
    std::vector<size_t> sizes = {0, 4, 8, 36, 1020, 4096, 100004, (size_t(1) << 20) + 4};
    if (!report.small_only) sizes.push_back((size_t(1) << 26) + 12);
    for (const size_t n : sizes) {
        check(report, "normal", random_normal(n));
        check(report, "small values", random_normal(n, 1e-9f));
    }
    // Equal values: roundings do not average out.
    check(report, "equal values", std::vector<float>(report.small_only ? 1 << 20 : 1 << 27, 0.1f));

    for (const float special : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
        for (const size_t at : {size_t(0), size_t(99999), size_t(100003)}) {
            std::vector<float> x = random_normal(100004);
            x[at] = special;
            const DeviceBuffer<float> in(x), partials(n_partials());
            sum_of_squares(in.get(), int64_t(x.size()), partials.get(), nullptr);
            const double sum = total_of(partials.download());
            report.expect("not hidden", message("%g at %zu", double(special), at),
                          std::isnan(special) ? std::isnan(sum) : std::isinf(sum), message("sum %g", sum));
        }
}

void benches(Report& report) {
    struct Model {
        const char* name;
        size_t parameters;
    };
    const std::vector<float> pool = random_normal(size_t(1) << 22);
    const DeviceBuffer<float> partials(n_partials());
    for (const Model& model : {Model{"124M", 124475904}, Model{"1558M", 1557686400}}) {
        const size_t n = model.parameters;
        const DeviceBuffer<float> x(n);
        for (size_t at = 0; at < n; at += pool.size())
            CUDA_CHECK(cudaMemcpy(x.get() + at, pool.data(), std::min(pool.size(), n - at) * sizeof(float),
                                  cudaMemcpyHostToDevice));
        report.bench({.name = "sum_of_squares", .shape = model.name, .bytes = 4.0 * double(n)},
                     [&](int, cudaStream_t s) { sum_of_squares(x.get(), int64_t(n), partials.get(), s); });
    }
    const size_t units = 97;  // of 1558M
    const DeviceBuffer<float> of_units(random_normal(units * n_partials())), folded(size_t{kFoldedPartials});
    report.bench({.name = "fold_partials", .shape = "97 units", .bytes = 4.0 * double(units * n_partials())},
                 [&](int, cudaStream_t s) { fold_partials(of_units.get(), int(units * n_partials()), folded.get(), s); });
}
}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "global_norm", checks, benches); }
