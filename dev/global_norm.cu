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

void checks(Report& report) {
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
}
}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "global_norm", checks, benches); }
