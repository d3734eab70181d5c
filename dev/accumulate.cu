// Sums of gradients and their rounding to BF16, bit for bit against float additions on the host, and their speed.
#include "kernels/accumulate.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <memory>

#include "dev/harness.h"
#include "trainer/reference/quantizer.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// NaN compares equal to NaN: its payload is the hardware's.
std::vector<uint32_t> bits(const std::vector<float>& x) {
    std::vector<uint32_t> y(x.size());
    std::transform(x.begin(), x.end(), y.begin(), [](float v) { return std::isnan(v) ? 0x7fffffffu : std::bit_cast<uint32_t>(v); });
    return y;
}

// Values whose sums and roundings are decided by single bits, and the special ones, in front of random numbers.
std::vector<float> values(size_t n, float size) {
    std::vector<float> x = random_normal(n, size);
    const float special[] = {0.0f, -0.0f, kInfinity, -kInfinity, kNan, 1e-45f, 3.4e38f, 1.00390625f, 1.01171875f, 0x1.01p0f, 0x1.010002p0f, 0x1.00fffep0f};
    for (size_t i = 0; i < n && i < std::size(special); i++) x[i * 7 % n] = special[i];
    return x;
}

void check_sum(Report& report, size_t n, Dtype dtype, bool add_to_sum) {
    const std::vector<float> before = values(n, 1.0f);
    const std::vector<__nv_bfloat16> small = to_bf16(values(n, 0.3f));
    const std::vector<float> more = dtype == Dtype::bf16 ? to_float(small) : values(n, 0.3f);
    std::vector<float> expected(n);
    for (size_t i = 0; i < n; i++) expected[i] = add_to_sum ? before[i] + more[i] : more[i];
    DeviceBuffer<float> sum(n);  // NaN where it is only to be overwritten
    if (add_to_sum) sum.upload(before);
    const DeviceBuffer<float> wide(more);
    const DeviceBuffer<__nv_bfloat16> narrow(small);
    const void* add = dtype == Dtype::bf16 ? static_cast<const void*>(narrow.get()) : wide.get();
    accumulate({.sum = sum.get(), .add = add, .dtype = dtype, .add_to_sum = add_to_sum, .n = int64_t(n)}, nullptr);
    const std::string shape = message("%s n=%zu", name_of(dtype), n);
    report.compare_bits(add_to_sum ? "added" : "overwritten", shape, bits(sum.download()), bits(expected));
    report.expect("accumulate guards", shape, sum.guards_intact() && wide.guards_intact() && narrow.guards_intact(), "intact");
}

// As slices of several ranks arrive: one behind the other, with what is no part of them between.
void check_parts(Report& report, size_t n, int parts, Dtype dtype, bool add_to_sum) {
    const size_t stride = (n + 7) / 8 * 8 + 8;
    const std::vector<float> before = values(n, 1.0f);
    const std::vector<__nv_bfloat16> small = to_bf16(values(stride * size_t(parts), 0.3f));
    const std::vector<float> more = dtype == Dtype::bf16 ? to_float(small) : values(stride * size_t(parts), 0.3f);
    std::vector<float> expected(n);
    for (size_t i = 0; i < n; i++) {
        expected[i] = add_to_sum ? before[i] + more[i] : more[i];
        for (int part = 1; part < parts; part++) expected[i] += more[size_t(part) * stride + i];
    }
    DeviceBuffer<float> sum(n);  // NaN where it is only to be overwritten
    if (add_to_sum) sum.upload(before);
    const DeviceBuffer<float> wide(more);
    const DeviceBuffer<__nv_bfloat16> narrow(small);
    accumulate({.sum = sum.get(), .add = dtype == Dtype::bf16 ? static_cast<const void*>(narrow.get()) : wide.get(), .dtype = dtype, .add_to_sum = add_to_sum,
                .n = int64_t(n), .parts = parts, .stride = int64_t(stride)}, nullptr);
    const std::string shape = message("%s n=%zu, %d parts", name_of(dtype), n, parts);
    report.compare_bits(add_to_sum ? "parts added" : "parts alone", shape, bits(sum.download()), bits(expected));
    report.expect("accumulate guards", shape, sum.guards_intact() && wide.guards_intact() && narrow.guards_intact(), "intact");
}

void check_rounding(Report& report, const std::string& name, const std::vector<float>& x) {
    const DeviceBuffer<float> in(x);
    const DeviceBuffer<__nv_bfloat16> out(x.size());
    round_to_bf16(in.get(), out.get(), int64_t(x.size()), nullptr);
    std::vector<float> expected(x.size());
    std::transform(x.begin(), x.end(), expected.begin(), [](float v) { return round_to_bf16(v); });
    const std::string shape = message("n=%zu", x.size());
    report.compare_bits(name, shape, bits(to_float(out.download())), bits(expected));
    report.expect("round_to_bf16 guards", shape, in.guards_intact() && out.guards_intact(), "intact");
}

// Every BF16 number, the midpoint to the next, and the floats on both sides of the midpoint.
std::vector<float> every_rounding() {
    std::vector<float> x;
    for (uint32_t upper = 0; upper < 0x10000; upper++)
        for (const uint32_t lower : {0u, 0x7fffu, 0x8000u, 0x8001u}) x.push_back(std::bit_cast<float>(upper << 16 | lower));
    return x;
}

void checks(Report& report) {
    std::vector<size_t> sizes = {1, 2, 3, 4, 5, 255, 1024, 4095, 4096, 4097, 8191, 100003, (1 << 20) + 8};
    if (!report.small_only) sizes.push_back((size_t(1) << 26) + 13);
    for (const size_t n : sizes) {
        for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
            for (const bool add_to_sum : {false, true}) check_sum(report, n, dtype, add_to_sum);
        for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
            for (const int parts : {2, 3, 8})
                if (n <= (1 << 20) + 8) check_parts(report, n, parts, dtype, parts != 3);
        check_rounding(report, "rounded", values(n, 1.0f));
    }
    accumulate({.sum = nullptr, .add = nullptr, .dtype = Dtype::f32, .add_to_sum = true, .n = 0}, nullptr);  // an Error would end the checks
    round_to_bf16(nullptr, nullptr, 0, nullptr);
    check_rounding(report, "rounded: every BF16 and what is between", every_rounding());
}

void benches(Report& report) {
    struct Size {
        const char* name;
        size_t n;
    };
    // A block of 1558M, and several.
    for (const Size& size : {Size{"30.7M", size_t(12) * 1600 * 1600}, Size{"268M", size_t(1) << 28}}) {
        const DeviceBuffer<float> sum(std::vector<float>(size.n, 1.0f)), wide(std::vector<float>(size.n, 1e-6f));
        const DeviceBuffer<__nv_bfloat16> narrow(to_bf16(std::vector<float>(size.n, 1e-6f)));
        struct Variant {
            const char* name;
            Dtype dtype;
            bool add_to_sum;
        };
        for (const Variant& v : {Variant{"accumulate f32", Dtype::f32, true}, Variant{"accumulate bf16", Dtype::bf16, true}, Variant{"overwrite f32", Dtype::f32, false},
                                 Variant{"overwrite bf16", Dtype::bf16, false}}) {
            const void* add = v.dtype == Dtype::bf16 ? static_cast<const void*>(narrow.get()) : wide.get();
            report.bench({.name = v.name, .shape = size.name, .bytes = double(size.n) * (4.0 + 4.0 * v.add_to_sum + double(bytes_of(v.dtype)))}, [&](int, cudaStream_t s) {
                accumulate({.sum = sum.get(), .add = add, .dtype = v.dtype, .add_to_sum = v.add_to_sum, .n = int64_t(size.n)}, s);
            });
        }
        report.bench({.name = "accumulate f32, 2 parts", .shape = size.name, .bytes = double(size.n / 2) * 16}, [&](int, cudaStream_t s) {
            accumulate({.sum = sum.get(), .add = wide.get(), .dtype = Dtype::f32, .add_to_sum = true, .n = int64_t(size.n / 2), .parts = 2, .stride = int64_t(size.n / 2)}, s);
        });
        report.bench({.name = "round_to_bf16", .shape = size.name, .bytes = 6.0 * double(size.n)},
                     [&](int, cudaStream_t s) { round_to_bf16(wide.get(), narrow.get(), int64_t(size.n), s); });
    }
}
}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "accumulate", checks, benches); }
