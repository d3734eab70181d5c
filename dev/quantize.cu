// The FP8 casts against the host quantizer, bit for bit, and their speed.
#include "kernels/quantize.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <optional>

#include "dev/harness.h"
#include "dev/parts/quantize/pieces.h"
#include "dev/parts/quantize/slots.h"
#include "dev/parts/quantize/weights.h"
#include "kernels/common/device.cuh"
#include "trainer/reference/quantizer.h"

namespace {
// The product's kernel must not be its own reference: the GELU is rounded here, and the codes are made on the host.
__global__ void rounded_gelu(const bf16* x, bf16* y, int64_t n) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) y[i] = __float2bfloat16_rn(gelu(__bfloat162float(x[i])));
}

std::vector<bf16> produced(const std::vector<bf16>& x, Producer producer) {
    if (producer == Producer::identity) return x;
    const DeviceBuffer<bf16> in(x), out(x.size());
    const auto n = static_cast<int64_t>(x.size());
    rounded_gelu<<<static_cast<unsigned>(ceil_div(n, 256)), 256>>>(in.get(), out.get(), n);
    CUDA_CHECK_LAUNCH();
    return out.download();
}

uint16_t bits_of(bf16 x) { return std::bit_cast<uint16_t>(x); }

// Codes of all 65536 BF16 numbers, then of a matrix by look-up: references of 100 million elements stay cheap.
std::vector<uint8_t> codes_of(const std::vector<bf16>& x, float scale, Dtype format) {
    std::vector<uint8_t> table(65536), codes(x.size());
    for (int i = 0; i < 65536; i++) table[i] = encode_fp8(bf16_value(uint16_t(i)) * scale, format);
#pragma omp parallel for
    for (size_t i = 0; i < x.size(); i++) codes[i] = table[bits_of(x[i])];
    return codes;
}
template <class T>
std::vector<T> transposed(const std::vector<T>& x, int64_t rows, int64_t cols) {
    std::vector<T> y(x.size());
#pragma omp parallel for
    for (int64_t c = 0; c < cols; c++)
        for (int64_t r = 0; r < rows; r++) y[c * rows + r] = x[r * cols + c];
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// One matrix through the fused kernel

struct Case {
    std::string name;
    int M, N;
    Dtype format;
    Producer producer = Producer::identity;
    std::optional<float> amax = {};  // of the slot, where it is not the matrix's own
};

void check_cast(Report& report, const Case& c, const std::vector<bf16>& x) {
    const std::vector<bf16> values = produced(x, c.producer);
    const float amax = c.amax ? *c.amax : amax_of(to_float(values));
    const std::vector<uint8_t> expected = codes_of(values, scale_from_amax(amax, c.format), c.format);
    const std::string shape = message("%s %s %s", shape_text(c.M, c.N).c_str(), name_of(c.format),
                                      c.producer == Producer::gelu ? "gelu" : "identity");

    const DeviceBuffer<bf16> in(x);
    const DeviceBuffer<uint8_t> q(x.size()), qt(x.size());
    DeviceBuffer<QuantSlot> slot(std::vector<QuantSlot>{measured_slot(amax)});
    const DeviceBuffer<uint32_t> nonfinite(std::vector<uint32_t>{0});
    QuantizeActivation call{.x = in.get(), .q = q.get(), .qt = qt.get(), .dbias = nullptr, .slot = slot.get(),
                            .nonfinite = nonfinite.get(), .workspace = nullptr, .M = c.M, .N = c.N, .format = c.format,
                            .producer = c.producer};
    quantize_activation(call, nullptr);
    report.compare_bits(c.name + " q", shape, q.download(), expected);
    report.compare_bits(c.name + " qt", shape, qt.download(), transposed(expected, c.M, c.N));
    const QuantSlot after = slot.download()[0];
    const bool slot_right = slot_is_right(after, amax, c.format);
    const bool flag_right = nonfinite.download()[0] == (std::isfinite(amax) ? 0u : 1u);

    // Each output alone, without a flag.
    call.nonfinite = nullptr;
    const DeviceBuffer<uint8_t> q_alone(x.size()), qt_alone(x.size());
    call.q = q_alone.get(), call.qt = nullptr;
    quantize_activation(call, nullptr);
    call.q = nullptr, call.qt = qt_alone.get();
    quantize_activation(call, nullptr);
    const bool alone_right = q_alone.download() == q.download() && qt_alone.download() == qt.download();
    const bool guards = q.guards_intact() && qt.guards_intact() && q_alone.guards_intact() &&
                        qt_alone.guards_intact() && slot.guards_intact() && nonfinite.guards_intact();
    report.expect(c.name + " slot, flag, single outputs, guards", shape,
                  slot_right && flag_right && alone_right && guards,
                  message("scale %g, inverse %g, amax %g; slot %d flag %d single %d guards %d", double(after.scale),
                          double(after.inv_scale), double(amax), slot_right, flag_right, alone_right, guards));
}

// The bias gradient: fused with the cast, again, and alone.
void check_dbias(Report& report, const Case& c, const std::vector<bf16>& x) {
    const std::vector<bf16> values = produced(x, c.producer);
    const std::string shape = message("%s %s %s", shape_text(c.M, c.N).c_str(), name_of(c.format),
                                      c.producer == Producer::gelu ? "gelu" : "identity");
    const std::vector<float> before = random_normal(size_t(c.N));
    std::vector<double> reference(before.begin(), before.end());
#pragma omp parallel for
    for (int n = 0; n < c.N; n++)
        for (int m = 0; m < c.M; m++) reference[n] += bf16_value(bits_of(values[size_t(m) * c.N + n]));

    const float amax = amax_of(to_float(values));
    const DeviceBuffer<bf16> in(x);
    const DeviceBuffer<uint8_t> q(x.size()), qt(x.size()), workspace(quantize_workspace_bytes(c.M, c.N));
    DeviceBuffer<QuantSlot> slot(std::vector<QuantSlot>{measured_slot(amax)});
    std::vector<std::vector<float>> results;
    const auto run = [&](bool cast) {
        const DeviceBuffer<float> dbias(before);
        quantize_activation({.x = in.get(), .q = cast ? q.get() : nullptr, .qt = cast ? qt.get() : nullptr,
                             .dbias = dbias.get(), .slot = cast ? slot.get() : nullptr, .nonfinite = nullptr,
                             .workspace = workspace.get(), .M = c.M, .N = c.N, .format = c.format,
                             .producer = c.producer}, nullptr);
        results.push_back(dbias.download());
        return dbias.guards_intact();
    };
    const bool has_alone = c.producer == Producer::identity;
    const bool fused = run(true), again = run(true), alone = !has_alone || run(false);
    // A column is added in a tree: 8 rows, 16 patch rows, rows of tiles in 32 lanes, 32 lanes. Fewer than 200 roundings of
    // 2^-24 each lie on one element's way to the sum, and they are random: sqrt(200) * 2^-24 * |partial sums| is below
    // 1e-6 of the root of the sum of squares, which is the size of a sum of random numbers.
    report.compare(c.name + " dbias", shape, results[0], reference, 1, c.N, {.relative = 1e-6, .absolute = 1e-3});
    if (has_alone) report.compare_bits(c.name + " dbias alone", shape, results[2], results[0]);
    const std::vector<uint8_t> expected = codes_of(values, scale_from_amax(amax, c.format), c.format);
    const bool same_again = results[1] == results[0], q_right = q.download() == expected;
    const bool qt_right = qt.download() == transposed(expected, c.M, c.N);
    const bool guards = fused && again && alone && q.guards_intact() && qt.guards_intact() && workspace.guards_intact();
    report.expect(c.name + " dbias again, codes beside it, guards", shape, same_again && q_right && qt_right && guards,
                  message("again %d q %d qt %d guards %d", same_again, q_right, qt_right, guards));
}

// Every BF16 number there is under several scales. With amax = fp8_max the scale is 1, so among them are every code's
// value, every midpoint between two codes, the subnormals, values that overflow, both zeros, infinities and NaNs.
void check_every_bf16(Report& report) {
    std::vector<bf16> every(65536);
    for (int i = 0; i < 65536; i++) every[i] = std::bit_cast<bf16>(uint16_t(i));
    for (const Dtype format : kFormats)
        for (const float amax : {fp8_max(format), 1.0f, 3.17e-5f, 2.71e20f, 3.3e38f, 1e-12f, 1e-13f, 1e-40f, 0.0f,
                                 kInfinity, kNan}) {
            const std::string name = message("every bf16, amax %g:", double(amax));
            check_cast(report, {.name = name, .M = 256, .N = 256, .format = format, .amax = amax}, every);
        }
    for (const Dtype format : kFormats) {
        const std::vector<uint8_t> codes = codes_of(every, 1.0f, format);
        bool exact = true;  // every finite code's value is a BF16 number and comes back as itself
        for (int code = 0; code < 256; code++) {
            const float value = decode_fp8(uint8_t(code), format);
            if (std::isfinite(value)) exact &= round_to_bf16(value) == value && codes[bf16_bits(value)] == code;
        }
        report.expect("every code is reached", name_of(format), exact, "exact round trips");
    }
}

void check_shapes(Report& report) {
    struct Shape {
        int M, N;
    };
    std::vector<Shape> shapes = {{1, 1},     {3, 5},     {16, 16},   {17, 33},    {127, 129}, {128, 128},
                                 {144, 272}, {1000, 48}, {64, 4096}, {257, 1040}, {520, 131}};
    for (const auto [M, N] : shapes)
        for (const Dtype format : kFormats)
            for (const Producer producer : {Producer::identity, Producer::gelu}) {
                const std::vector<bf16> x = to_bf16(random_normal(size_t(M) * N, 2.0f));
                check_cast(report, {.name = "random", .M = M, .N = N, .format = format, .producer = producer}, x);
                check_dbias(report, {.name = "random", .M = M, .N = N, .format = format, .producer = producer}, x);
            }
    check_cast(report, {.name = "zeros", .M = 48, .N = 80, .format = Dtype::e4m3},
               std::vector<bf16>(48 * 80, std::bit_cast<bf16>(uint16_t(0))));

    // So many tiles that a block of the bias gradient alone walks a strip of several; the last strip is short, and the matrix
    // narrow, so small.
    shapes = {{524304, 16}};
    if (!report.small_only) shapes.insert(shapes.end(), {{524289, 3}, {16384, 1600}, {65536, 768}, {16384, 6400}});
    for (const auto [M, N] : shapes) {
        const std::vector<bf16> x = to_bf16(random_normal(size_t(M) * N));
        if (!report.small_only) check_cast(report, {.name = "strips", .M = M, .N = N, .format = Dtype::e4m3}, x);
        check_dbias(report, {.name = "strips", .M = M, .N = N, .format = Dtype::e5m2}, x);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// amax

template <class T>
void check_amax_of(Report& report, const std::string& name, const std::vector<T>& x, uint32_t before, float expected,
                   void (*amax)(const T*, int64_t, QuantSlot*, cudaStream_t)) {
    const DeviceBuffer<T> in(x);
    QuantSlot slot = measured_slot(0.0f);
    slot.amax_bits = before;
    const DeviceBuffer<QuantSlot> out(std::vector<QuantSlot>{slot});
    amax(in.get(), int64_t(x.size()), out.get(), nullptr);
    const uint32_t got = out.download()[0].amax_bits, want = std::max(before, std::bit_cast<uint32_t>(expected));
    report.expect(name, message("n=%zu", x.size()), got == want && out.guards_intact(), message("0x%08x", got));
}

void check_amax(Report& report) {
    std::vector<size_t> sizes = {1, 7, 8, 9, 255, 4099, 100003, (1 << 20) + 5};
    if (!report.small_only) sizes.push_back((size_t(1) << 26) + 13);
    for (const size_t n : sizes) {
        std::vector<float> x = random_normal(n);
        x[n - 1] = -100.0f;  // the last element, which only the tail reads
        const std::vector<bf16> rounded = to_bf16(x);
        check_amax_of(report, "amax_f32", x, 0, amax_of(x), amax_f32);
        check_amax_of(report, "amax_bf16", rounded, 0, amax_of(to_float(rounded)), amax_bf16);
    }
    for (const float special : {kInfinity, -kInfinity, kNan, -kNan, -0.0f, 1e-40f})
        for (const size_t at : {size_t(0), size_t(5), size_t(3000), size_t(4098)}) {
            std::vector<float> x = std::isfinite(special) ? std::vector<float>(4099, 0.0f) : random_normal(4099);
            x[at] = special;
            const std::vector<bf16> rounded = to_bf16(x);
            const std::string name = message(" with %g at %zu", double(special), at);
            check_amax_of(report, "amax_f32" + name, x, 0, amax_of(x), amax_f32);
            check_amax_of(report, "amax_bf16" + name, rounded, 0, amax_of(to_float(rounded)), amax_bf16);
        }
    check_amax_of(report, "amax_f32 keeps a larger one", random_normal(1000), std::bit_cast<uint32_t>(1e9f), 0.0f,
                  amax_f32);
}

// Indices beyond 2^31: a matrix of zeros but for its last 16 rows, and only they are looked at.
void check_beyond_2_to_31(Report& report) {
    constexpr int kEnd = 16, N = 16, M = (1 << 27) + kEnd;
    constexpr int64_t n = int64_t(M) * N, end = n - kEnd * N;
    const std::string shape = shape_text(M, N);
    const std::vector<bf16> values = to_bf16(random_normal(kEnd * N));
    const float amax = amax_of(to_float(values));
    DeviceBuffer<bf16> x{size_t(n)};
    x.zero();
    CUDA_CHECK(cudaMemcpy(x.get() + end, values.data(), values.size() * sizeof(bf16), cudaMemcpyHostToDevice));
    const DeviceBuffer<QuantSlot> slot(std::vector<QuantSlot>{measured_slot(0.0f)});
    amax_bf16(x.get(), n, slot.get(), nullptr);
    const DeviceBuffer<uint8_t> q{size_t(n)}, qt{size_t(n)};
    quantize_activation({.x = x.get(), .q = q.get(), .qt = qt.get(), .dbias = nullptr, .slot = slot.get(),
                         .nonfinite = nullptr, .workspace = nullptr, .M = M, .N = N, .format = Dtype::e4m3}, nullptr);
    const cudaError_t status = cudaDeviceSynchronize();
    report.expect("beyond 2^31 elements: runs", shape, status == cudaSuccess, cudaGetErrorString(status));

    const std::vector<uint8_t> expected = codes_of(values, scale_from_amax(amax, Dtype::e4m3), Dtype::e4m3);
    std::vector<uint8_t> rows(expected.size()), columns(expected.size());
    CUDA_CHECK(cudaMemcpy(rows.data(), q.get() + end, rows.size(), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy2D(columns.data(), kEnd, qt.get() + M - kEnd, M, kEnd, N, cudaMemcpyDeviceToHost));
    const bool slot_right = slot_is_right(slot.download()[0], amax, Dtype::e4m3);
    report.expect("beyond 2^31 elements: slot, guards", shape,
                  slot_right && q.guards_intact() && qt.guards_intact(), message("amax %g", double(amax)));
    report.compare_bits("beyond 2^31 elements: q", shape, rows, expected);
    report.compare_bits("beyond 2^31 elements: qt", shape, columns, transposed(expected, kEnd, N));
}

void checks(Report& report) {
    check_every_bf16(report);
    check_shapes(report);
    check_amax(report);
    for (const Dtype format : kFormats) check_weights(report, format);
    for (const Dtype format : kFormats) check_pieces(report, format);
    check_scales(report);
    check_transposes(report);
    if (!report.small_only) check_beyond_2_to_31(report);
}

// ---------------------------------------------------------------------------------------------------------------------
// Speed

void bench_activations(Report& report, int M, int N) {
    const size_t n = size_t(M) * N;
    const int sets = n < (size_t(1) << 26) ? 3 : 1;  // at least 200 MB of inputs, or inputs larger than that
    const std::vector<bf16> pool = to_bf16(random_normal(size_t(1) << 22));
    std::vector<std::unique_ptr<DeviceBuffer<bf16>>> x;
    std::vector<std::unique_ptr<DeviceBuffer<uint8_t>>> q, qt;
    for (int i = 0; i < sets; i++) {
        x.push_back(filled(n, pool));
        q.push_back(std::make_unique<DeviceBuffer<uint8_t>>(n));
        qt.push_back(std::make_unique<DeviceBuffer<uint8_t>>(n));
    }
    const DeviceBuffer<QuantSlot> slot(std::vector<QuantSlot>{measured_slot(6.0f)});
    const DeviceBuffer<float> dbias(std::vector<float>(size_t(N), 0.0f));
    const DeviceBuffer<uint8_t> workspace(quantize_workspace_bytes(M, N));

    report.bench({.name = "amax_bf16", .shape = shape_text(M, N), .bytes = 2.0 * double(n), .sets = sets},
                 [&](int set, cudaStream_t s) { amax_bf16(x[set]->get(), int64_t(n), slot.get(), s); });
    struct Variant {
        const char* name;
        Dtype format;
        Producer producer;
        bool q, qt, dbias;
    };
    for (const Variant& v : {Variant{"cast+transpose e4m3", Dtype::e4m3, Producer::identity, true, true, false},
                             Variant{"cast+transpose e5m2", Dtype::e5m2, Producer::identity, true, true, false},
                             Variant{"cast+transpose+dbias e5m2", Dtype::e5m2, Producer::identity, true, true, true},
                             Variant{"cast+transpose+dbias e4m3", Dtype::e4m3, Producer::identity, true, true, true},
                             Variant{"gelu+cast+transpose e4m3", Dtype::e4m3, Producer::gelu, true, true, false},
                             Variant{"gelu+cast+transpose+dbias e4m3", Dtype::e4m3, Producer::gelu, true, true, true},
                             Variant{"cast e4m3", Dtype::e4m3, Producer::identity, true, false, false},
                             Variant{"transpose e4m3", Dtype::e4m3, Producer::identity, false, true, false},
                             Variant{"dbias alone", Dtype::e4m3, Producer::identity, false, false, true}})
        report.bench({.name = v.name, .shape = shape_text(M, N),
                      .bytes = double(n) * (2.0 + v.q + v.qt) + 8.0 * v.dbias * N, .sets = sets},
                     [&](int set, cudaStream_t s) {
                         quantize_activation({.x = x[set]->get(), .q = v.q ? q[set]->get() : nullptr,
                                              .qt = v.qt ? qt[set]->get() : nullptr,
                                              .dbias = v.dbias ? dbias.get() : nullptr,
                                              .slot = v.q || v.qt ? slot.get() : nullptr, .nonfinite = nullptr,
                                              .workspace = workspace.get(), .M = M, .N = N, .format = v.format,
                                              .producer = v.producer}, s);
                     });
}

void benches(Report& report) {
    for (const int N : {768, 2304, 3072}) bench_activations(report, 65536, N);
    for (const int N : {1600, 4800, 6400}) bench_activations(report, 16384, N);
    bench_weights(report, "124M", 12, 768);
    bench_weights(report, "1558M", 48, 1600);
    bench_pieces(report, "124M", 12, 768);
    bench_pieces(report, "1558M", 48, 1600);
}
}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "quantize", checks, benches); }
