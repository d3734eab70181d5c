// cuBLASLt matrix products against float64 products of the same BF16 or FP8 values, and their speed at GPT-2's shapes.
#include "kernels/gemm.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <unistd.h>

#include "dev/harness.h"
#include "kernels/common/peak.h"
#include "kernels/common/quant_slot.h"
#include "trainer/reference/quantizer.h"

namespace {
// ---------------------------------------------------------------------------------------------------------------------
// Operands

// A matrix (rows, K) of normal random numbers: as drawn, as the GEMM sees it, and on the device in its layout.
struct Operand {
    int rows, K;
    std::vector<float> original;
    std::vector<double> values;
    DeviceBuffer<uint8_t> data;
    DeviceBuffer<QuantSlot> slot;
};

Operand make_operand(int rows, int K, Dtype type, Layout layout) {
    const std::vector<float> original = random_normal(size_t(rows) * K);
    const float scale = is_fp8(type) ? scale_from_amax(amax_of(original), type) : 1.0f;
    const float inv_scale = 1.0f / scale;
    std::vector<double> values(original.size());
    std::vector<uint8_t> data(original.size() * bytes_of(type));
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < K; k++) {
            const size_t i = size_t(r) * K + k;
            const size_t stored = layout == Layout::row_k ? i : size_t(k) * rows + r;
            if (is_fp8(type)) {
                data[stored] = encode_fp8(original[i] * scale, type);
                values[i] = double(decode_fp8(data[stored], type)) * inv_scale;
            } else {
                const uint16_t bits = bf16_bits(original[i]);
                std::memcpy(&data[2 * stored], &bits, sizeof bits);
                values[i] = bf16_value(bits);
            }
        }
    const QuantSlot slot{.inv_scale = inv_scale, .scale = scale, .amax_bits = 0, .unused = 0};
    return {.rows = rows,
            .K = K,
            .original = original,
            .values = values,
            .data = DeviceBuffer<uint8_t>(data),
            .slot = DeviceBuffer<QuantSlot>(std::vector<QuantSlot>{slot})};
}

template <class T>
std::vector<double> product(const std::vector<T>& a, const std::vector<T>& b, int M, int N, int K) {  // a * b^T
    std::vector<double> d(size_t(M) * N);
#pragma omp parallel for
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            double sum = 0;
            for (int k = 0; k < K; k++) sum += double(a[size_t(m) * K + k]) * double(b[size_t(n) * K + k]);
            d[size_t(m) * N + n] = sum;
        }
    return d;
}

std::vector<uint8_t> to_bytes(const std::vector<float>& x, Dtype type) {
    std::vector<uint8_t> bytes(x.size() * bytes_of(type));
    if (type == Dtype::f32) std::memcpy(bytes.data(), x.data(), bytes.size());
    else std::memcpy(bytes.data(), to_bf16(x).data(), bytes.size());
    return bytes;
}

std::vector<float> from_bytes(const std::vector<uint8_t>& bytes, Dtype type) {
    std::vector<float> x(bytes.size() / bytes_of(type));
    for (size_t i = 0; i < x.size(); i++) {
        uint16_t half;
        if (type == Dtype::f32) std::memcpy(&x[i], &bytes[4 * i], 4);
        else std::memcpy(&half, &bytes[2 * i], 2), x[i] = bf16_value(half);
    }
    return x;
}

// Everything one run needs. D is poisoned, or holds random numbers of the product's size if the shape accumulates.
struct Problem {
    GemmShape shape;
    Operand a, b;
    std::vector<float> bias, d_before;
    DeviceBuffer<__nv_bfloat16> bias_device;
    DeviceBuffer<uint8_t> d;

    explicit Problem(const GemmShape& s)
        : shape(s),
          a(make_operand(s.M, s.K, s.a, s.layout_a)),
          b(make_operand(s.N, s.K, s.b, s.layout_b)),
          bias(to_float(to_bf16(random_normal(size_t(s.N), std::sqrt(float(s.K)))))),
          d_before(random_normal(size_t(s.M) * s.N, std::sqrt(float(s.K)))),
          bias_device(to_bf16(bias)),
          d(d_before.size() * bytes_of(s.d)) {
        if (s.d == Dtype::bf16) d_before = to_float(to_bf16(d_before));
    }

    GemmOperands operands() const {
        return {.a = a.data.get(),
                .b = b.data.get(),
                .d = d.get(),
                .a_scale = is_fp8(shape.a) ? &a.slot.get()->inv_scale : nullptr,
                .b_scale = is_fp8(shape.b) ? &b.slot.get()->inv_scale : nullptr,
                .bias = shape.bias ? bias_device.get() : nullptr};
    }

    std::vector<uint8_t> run(Gemm& gemm) {
        if (shape.accumulate) d.upload(to_bytes(d_before, shape.d));
        else d.poison();
        gemm.run(shape, operands(), nullptr);
        return d.download();
    }

    std::vector<double> reference() const {
        std::vector<double> d_after = product(a.values, b.values, shape.M, shape.N, shape.K);
        for (size_t i = 0; i < d_after.size(); i++) {
            if (shape.bias) d_after[i] += bias[i % size_t(shape.N)];
            if (shape.accumulate) d_after[i] += d_before[i];
        }
        return d_after;
    }
};

// Output: BF16 rounds to 8 significant bits, at most 2^-8 of each value; FP32's rounding is inside the next term.
// Accumulation: the tensor core adds truncated, one addition an instruction's K of 16 (BF16) or 32 (FP8). BF16 products
// are summed with FP32's 24 bits, FP8 products with 14; fast accumulation keeps the 14 bits over the whole of K, slow
// moves the sum to FP32 every 128. Each addition costs up to one unit of the last bit of the sum; a dozen more for the
// alignment of products inside the instruction.
Tolerance tolerance_of(const GemmShape& s) {
    const double output = s.d == Dtype::bf16 ? 0x1p-8 : 0;
    if (!is_fp8(s.a)) return {output + (s.K / 16 + 16) * 0x1p-23};
    const int additions = (s.fast_accumulation ? s.K : std::min(s.K, 128)) / 32;
    return {output + (additions + 12) * 0x1p-13};
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks

// The shapes of one linear layer's three products, as trainer/linear uses them.
GemmShape forward(int tokens, int in, int out, bool fp8, bool bias) {
    const Dtype type = fp8 ? Dtype::e4m3 : Dtype::bf16;
    return {.M = tokens,
            .N = out,
            .K = in,
            .a = type,
            .b = type,
            .d = Dtype::bf16,
            .bias = bias,
            .fast_accumulation = fp8};
}
GemmShape grad_input(int tokens, int in, int out, bool fp8) {
    GemmShape s{.M = tokens, .N = in, .K = out, .a = Dtype::e5m2, .b = Dtype::e4m3, .d = Dtype::bf16};
    if (!fp8) s.a = s.b = Dtype::bf16, s.layout_b = Layout::col_k;
    return s;
}
GemmShape grad_weight(int tokens, int in, int out, bool fp8) {
    GemmShape s{.M = out, .N = in, .K = tokens, .a = Dtype::e5m2, .b = Dtype::e4m3, .d = Dtype::f32};
    s.accumulate = true;
    if (!fp8) s.a = s.b = Dtype::bf16, s.layout_a = s.layout_b = Layout::col_k;
    return s;
}

void compare_product(Report& report, Gemm& gemm, const GemmShape& shape) {
    gemm.plan(shape);
    Problem problem(shape);
    const std::vector<uint8_t> first = problem.run(gemm);
    report.compare("gemm", shape.key(), from_bytes(first, shape.d), problem.reference(), shape.M, shape.N,
                   tolerance_of(shape));
    report.compare_bits("gemm twice", shape.key(), problem.run(gemm), first);
    report.expect("gemm guards", shape.key(), problem.d.guards_intact(), "nothing written outside D");
}

void check_product(Report& report, Gemm& gemm, const GemmShape& shape) {
    try {
        compare_product(report, gemm, shape);
    } catch (const Error& error) {  // one shape that the library does not take must not hide the others
        report.expect("gemm", shape.key(), false, error.what());
    }
}

// Dimensions that are no multiple of 8: right, or refused with the shape's name.
void check_odd_product(Report& report, Gemm& gemm, const GemmShape& shape) {
    try {
        compare_product(report, gemm, shape);
    } catch (const Error& error) {
        const bool named = std::string(error.what()).find("gemm " + shape.key()) == 0;
        report.expect("gemm refused", shape.key(), named, error.what());
    }
}

void check_products(Report& report, Gemm& gemm) {
    struct Linear {
        int tokens, in, out;
    };
    std::vector<Linear> linears = {{48, 32, 80}, {16, 16, 16}, {48, 144, 96}};
    if (!report.small_only)
        linears.insert(linears.end(), {{128, 256, 192}, {304, 768, 400}, {4096, 192, 256}, {128, 4096, 208}});
    for (const auto [tokens, in, out] : linears)
        for (const bool fp8 : {false, true}) {
            check_product(report, gemm, forward(tokens, in, out, fp8, true));
            check_product(report, gemm, forward(tokens, in, out, fp8, false));
            check_product(report, gemm, grad_input(tokens, in, out, fp8));
            check_product(report, gemm, grad_weight(tokens, in, out, fp8));
            GemmShape fp32_logits = forward(tokens, in, out, fp8, false);
            fp32_logits.d = Dtype::f32;
            fp32_logits.fast_accumulation = false;
            check_product(report, gemm, fp32_logits);
            GemmShape into_bf16 = grad_weight(tokens, in, out, fp8);
            into_bf16.d = Dtype::bf16;
            check_product(report, gemm, into_bf16);
        }
    // The number of tokens is free, also for FP8, where it is the rows of the output.
    for (const int tokens : {1, 37}) {
        for (const bool fp8 : {false, true}) check_product(report, gemm, forward(tokens, 96, 48, fp8, true));
        for (const bool fp8 : {false, true}) check_product(report, gemm, grad_input(tokens, 96, 48, fp8));
    }
    check_product(report, gemm, forward(8, 24, 40, false, true));
    check_product(report, gemm, grad_weight(8, 24, 40, false));
    for (const bool bias : {false, true}) check_odd_product(report, gemm, forward(256, 72, 50, false, bias));
    check_odd_product(report, gemm, grad_input(256, 72, 50, false));
    check_odd_product(report, gemm, forward(13, 7, 11, false, false));
    check_odd_product(report, gemm, grad_weight(13, 7, 11, false));
}

// What FP8 costs: signal to noise of a product of normal numbers against the product before quantization. A code of m
// mantissa bits rounds a normal number with a relative error of about 0.43 * 2^-(m+1) root mean square, so two E4M3
// operands give 28.5 dB (28.5 to 28.6 in a simulation of this case), and E5M2 with E4M3 gives 24.6 dB.
void check_noise(Report& report, Gemm& gemm) {
    struct Case {
        Dtype a;
        bool fast;
        Dtype d;
        double least_db;
    };
    const int size = report.small_only ? 128 : 512, K = report.small_only ? 256 : 1024;
    for (const Case c : {Case{Dtype::e4m3, false, Dtype::f32, 28}, Case{Dtype::e4m3, true, Dtype::bf16, 28},
                         Case{Dtype::e5m2, false, Dtype::f32, 24}, Case{Dtype::e5m2, false, Dtype::bf16, 24}}) {
        GemmShape shape{.M = size, .N = size, .K = K, .a = c.a, .b = Dtype::e4m3, .d = c.d};
        shape.fast_accumulation = c.fast;
        gemm.plan(shape);
        Problem problem(shape);
        const std::vector<float> out = from_bytes(problem.run(gemm), shape.d);
        const std::vector<double> exact = product(problem.a.original, problem.b.original, shape.M, shape.N, shape.K);
        double signal = 0, noise = 0;
        for (size_t i = 0; i < exact.size(); i++) {
            signal += exact[i] * exact[i];
            noise += (out[i] - exact[i]) * (out[i] - exact[i]);
        }
        const double db = 10 * std::log10(signal / noise);
        report.expect("gemm signal to noise", shape.key(), db >= c.least_db,
                      message("%.2f dB, at least %.0f", db, c.least_db));
    }
}

template <class F>
void expect_error(Report& report, const std::string& what, const char* must_contain, const F& function) {
    std::string text = "no error";
    try {
        function();
    } catch (const Error& error) {
        text = error.what();
    }
    report.expect("gemm refuses", what, text.find(must_contain) != std::string::npos, text);
}

void check_refusals(Report& report, Gemm& gemm) {
    const GemmShape fp8 = forward(32, 64, 48, true, true), plain = forward(32, 64, 48, false, false);
    const auto refused = [&](const std::string& what, const char* must_contain, GemmShape shape, auto change) {
        change(shape);
        expect_error(report, what, must_contain, [&] { gemm.plan(shape); });
    };
    refused("K of FP8", "K=72", fp8, [](GemmShape& s) { s.K = 72; });
    refused("N of FP8", "N=40", fp8, [](GemmShape& s) { s.N = 40; });
    refused("two E5M2 operands", "must be e4m3", fp8, [](GemmShape& s) { s.a = s.b = Dtype::e5m2; });
    refused("one FP8 operand", "either both", fp8, [](GemmShape& s) { s.a = Dtype::bf16; });
    refused("FP8 col_k", "row_k", fp8, [](GemmShape& s) { s.layout_b = Layout::col_k; });
    refused("bias on FP32", "a bias needs", fp8, [](GemmShape& s) { s.d = Dtype::f32; });
    refused("FP8 output", "must be bf16 or f32", fp8, [](GemmShape& s) { s.d = Dtype::e4m3; });
    refused("FP32 operand", "must be bf16 or FP8", plain, [](GemmShape& s) { s.b = Dtype::f32; });
    refused("fast accumulation of BF16", "fast accumulation", plain, [](GemmShape& s) { s.fast_accumulation = true; });
    refused("no rows", "must be positive", plain, [](GemmShape& s) { s.M = 0; });

    Problem problem(fp8);
    const std::string key = fp8.key();
    expect_error(report, "an unplanned shape", (key + ": this shape was not planned").c_str(),
                 [&] { gemm.run(fp8, problem.operands(), nullptr); });
    gemm.plan(fp8);
    const auto run_with = [&](const std::string& what, const char* must_contain, auto change) {
        GemmOperands operands = problem.operands();
        change(operands);
        expect_error(report, what, must_contain, [&] { gemm.run(fp8, operands, nullptr); });
    };
    run_with("a misaligned operand", "aligned", [](GemmOperands& o) { o.a = static_cast<const char*>(o.a) + 8; });
    run_with("a misaligned scale", "aligned", [](GemmOperands& o) { o.b_scale++; });
    run_with("a missing scale", "a_scale is missing", [](GemmOperands& o) { o.a_scale = nullptr; });
    run_with("a missing bias", "bias is missing", [](GemmOperands& o) { o.bias = nullptr; });
    run_with("a missing output", "d is missing", [](GemmOperands& o) { o.d = nullptr; });
}

std::vector<std::string> read_lines(const std::string& path) {
    std::vector<std::string> lines;
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) lines.push_back(line);
    return lines;
}

void check_cache(Report& report) {
    std::string folder = (std::filesystem::temp_directory_path() / "gemm-cache-XXXXXX").string();
    REQUIRE(mkdtemp(folder.data()), "no temporary folder %s", folder.c_str());
    const Gemm::Options options{.cache_file = folder + "/algorithms"};
    const std::vector<GemmShape> shapes = {forward(256, 128, 384, false, true), forward(256, 128, 384, true, true),
                                           grad_weight(256, 128, 384, true)};
    const GemmShape another = grad_input(256, 128, 384, true);
    std::vector<std::vector<uint8_t>> results;
    Problem first(shapes[0]), second(shapes[1]), third(shapes[2]);
    Problem* const problems[] = {&first, &second, &third};
    {
        Gemm tuned(options), other(options);
        for (size_t i = 0; i < shapes.size(); i++) {
            tuned.plan(shapes[i]);
            results.push_back(problems[i]->run(tuned));
        }
        other.plan(another);
        tuned.save_cache();
        other.save_cache();  // has not seen what `tuned` wrote
    }
    report.expect("gemm cache", "two writers", read_lines(options.cache_file).size() == 4,
                  message("%zu entries", read_lines(options.cache_file).size()));
    const auto count_cached = [](const Gemm& gemm) {
        return std::count_if(gemm.choices().begin(), gemm.choices().end(), [](const auto& c) { return c.from_cache; });
    };
    {
        Gemm loaded(options);
        for (size_t i = 0; i < shapes.size(); i++) {
            loaded.plan(shapes[i]);
            report.compare_bits("gemm from cache", shapes[i].key(), problems[i]->run(loaded), results[i]);
        }
        loaded.plan(another);
        report.expect("gemm cache", "loaded", count_cached(loaded) == 4, message("%d of 4", int(count_cached(loaded))));
    }
    {
        std::vector<std::string> lines = read_lines(options.cache_file);
        std::ofstream file(options.cache_file);
        std::string& damaged = lines[0];
        damaged[damaged.size() - 30] = damaged[damaged.size() - 30] == '0' ? '1' : '0';  // inside the algorithm
        for (const std::string& line : lines) file << line << "\n";
        file << "\nnonsense\n" << lines[1].substr(0, 40);
    }
    {
        Gemm loaded(options);
        for (const GemmShape& shape : shapes) loaded.plan(shape);
        loaded.plan(another);
        const int cached = int(count_cached(loaded));
        report.expect("gemm cache", "damaged", cached == 3, message("%d of 4", cached));
        loaded.save_cache();
        report.expect("gemm cache", "repaired", read_lines(options.cache_file).size() == 4,
                      message("%zu entries", read_lines(options.cache_file).size()));
    }
    Gemm deep({.cache_file = folder + "/made/by/itself/algorithms"});
    deep.plan(another);
    deep.save_cache();
    report.expect("gemm cache", "in a new folder", read_lines(folder + "/made/by/itself/algorithms").size() == 1, "made");
    Gemm nowhere({.cache_file = options.cache_file + "/below/a/file"});
    nowhere.plan(another);
    nowhere.save_cache();  // a warning
    report.expect("gemm cache", "not writable", !nowhere.choices()[0].from_cache, "goes on without");
    std::filesystem::remove_all(folder);
}

// What a checkpoint records is what the next run takes, also where tuning or the heuristic would take something else.
void check_pinned(Report& report) {
    const GemmShape shape = forward(256, 128, 384, true, true), other = grad_input(256, 128, 384, true);
    Problem problem(shape);
    Gemm first({.cache_file = "", .autotune = false});
    first.plan(shape);
    std::string record = first.record();
    const std::vector<uint8_t> result = problem.run(first);
    {
        Gemm again({.cache_file = "", .autotune = true, .pinned = record});
        again.plan(shape);
        report.expect("gemm pinned", shape.key(), again.choices()[0].pinned && again.choices()[0].us == 0 && again.pin_failure().empty() && again.record() == record,
                      "taken, not tuned, recorded again");
        report.compare_bits("gemm pinned", shape.key(), problem.run(again), result);
        again.plan(other);
        report.expect("gemm pinned", "a shape that is not in the record", again.pin_failure().starts_with("1 of 2 GEMM shapes"), again.pin_failure());
    }
    Gemm elsewhere({.cache_file = "", .autotune = false, .pinned = "Another GPU" + record.substr(record.find('\t'))});
    elsewhere.plan(shape);
    report.expect("gemm pinned", "a record that was changed", !elsewhere.choices()[0].pinned && !elsewhere.pin_failure().empty(), elsewhere.pin_failure());
}

void check_heuristic_only(Report& report) {
    Gemm gemm({.cache_file = "", .autotune = false});
    check_product(report, gemm, forward(128, 256, 192, true, true));
    const GemmChoice& choice = gemm.choices()[0];
    report.expect("gemm without autotuning", choice.key, choice.algorithm == 0 && choice.us == 0 && !choice.from_cache,
                  message("algorithm %d of %d", choice.algorithm, choice.candidates));
}

void checks(Report& report) {
    Gemm gemm({.cache_file = "", .autotune = !report.small_only});  // the sanitizer makes 32 candidates slow
    check_products(report, gemm);
    check_noise(report, gemm);
    check_refusals(report, gemm);
    if (!report.small_only) check_cache(report);
    check_pinned(report);
    check_heuristic_only(report);
}

// ---------------------------------------------------------------------------------------------------------------------
// Benchmarks

// Random values of one type, repeated to fill operands of any size.
class RandomBlock {
  public:
    explicit RandomBlock(Dtype type) : bytes_(to_codes(type)) {}
    void fill(const DeviceBuffer<uint8_t>& out, size_t offset) const {
        for (size_t at = 0; at < out.size();) {
            const size_t n = std::min(out.size() - at, bytes_.size() - offset);
            CUDA_CHECK(cudaMemcpy(out.get() + at, bytes_.get() + offset, n, cudaMemcpyDeviceToDevice));
            at += n;
            offset = 0;
        }
        CUDA_CHECK(cudaDeviceSynchronize());
    }

  private:
    static std::vector<uint8_t> to_codes(Dtype type) {
        const std::vector<float> x = random_normal(size_t(1) << 24);
        if (type == Dtype::bf16) return to_bytes(x, type);
        const float scale = scale_from_amax(amax_of(x), type);
        std::vector<uint8_t> codes(x.size());
#pragma omp parallel for
        for (size_t i = 0; i < x.size(); i++) codes[i] = encode_fp8(x[i] * scale, type);
        return codes;
    }
    DeviceBuffer<uint8_t> bytes_;
};

class GemmBench {
  public:
    explicit GemmBench(Report& report) : report_(report) {
        cudaDeviceProp device{};
        CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
        peak_ = peak_of(device.name);
    }

    void operator()(const char* operation, const std::string& what, const GemmShape& s) {
        const auto start = std::chrono::steady_clock::now();
        gemm_.plan(s);
        planning_s_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

        DeviceBuffer<uint8_t> a(size_t(s.M) * s.K * bytes_of(s.a)), b(size_t(s.N) * s.K * bytes_of(s.b));
        DeviceBuffer<uint8_t> d(size_t(s.M) * s.N * bytes_of(s.d));
        DeviceBuffer<__nv_bfloat16> bias(to_bf16(random_normal(size_t(s.N))));
        DeviceBuffer<QuantSlot> slot(std::vector<QuantSlot>{{.inv_scale = 1, .scale = 1, .amax_bits = 0, .unused = 0}});
        block(s.a).fill(a, 0);
        block(s.b).fill(b, size_t(1) << 23);  // elsewhere in the block, so that A and B differ
        d.zero();
        const float* const scale = is_fp8(s.a) ? &slot.get()->inv_scale : nullptr;
        const GemmOperands operands{.a = a.get(),
                                    .b = b.get(),
                                    .d = d.get(),
                                    .a_scale = scale,
                                    .b_scale = scale,
                                    .bias = s.bias ? bias.get() : nullptr};
        report_.bench({.name = std::string("gemm.") + operation,
                       .shape = what + " " + s.key(),
                       .flops = 2.0 * s.M * s.N * s.K,
                       .peak_tflops = is_fp8(s.a) ? peak_.fp8_tflops : peak_.bf16_tflops},
                      [&](int, cudaStream_t stream) { gemm_.run(s, operands, stream); });
        const GemmChoice& choice = gemm_.choices().back();
        std::printf("    heuristic's first %.1f us, tuned %.1f us: algorithm %d of %d\n", choice.first_us, choice.us,
                    choice.algorithm, choice.candidates);
    }

    void linear(const std::string& what, int tokens, int in, int out, bool fp8) {
        (*this)("forward", what, forward(tokens, in, out, fp8, true));
        (*this)("grad_input", what, grad_input(tokens, in, out, fp8));
        (*this)("grad_weight", what, grad_weight(tokens, in, out, fp8));
    }

    void print_planning_time() const {
        std::printf("planned %zu shapes in %.1f s\n", gemm_.choices().size(), planning_s_);
    }

  private:
    const RandomBlock& block(Dtype type) const {
        return type == Dtype::bf16 ? bf16_ : type == Dtype::e4m3 ? e4m3_ : e5m2_;
    }

    Report& report_;
    Gemm gemm_{Gemm::Options{}};
    RandomBlock bf16_{Dtype::bf16}, e4m3_{Dtype::e4m3}, e5m2_{Dtype::e5m2};
    Peak peak_{};
    double planning_s_ = 0;
};

void benches(Report& report) {
    GemmBench bench(report);
    struct Model {
        const char* name;
        int tokens, C;
    };
    for (const auto& [name, tokens, C] : {Model{"gpt2-124M", 65536, 768}, Model{"gpt2-1558M", 16384, 1600}})
        for (const bool fp8 : {false, true}) {
            const std::string prefix = std::string(name) + " ";
            bench.linear(prefix + "qkv", tokens, C, 3 * C, fp8);
            bench.linear(prefix + "attention out", tokens, C, C, fp8);
            bench.linear(prefix + "mlp in", tokens, C, 4 * C, fp8);
            bench.linear(prefix + "mlp out", tokens, 4 * C, C, fp8);
        }
    constexpr int kChunk = 16384, kPaddedVocabulary = 50304;
    bench("forward", "gpt2-124M head chunk", forward(kChunk, 768, kPaddedVocabulary, false, false));
    bench("grad_input", "gpt2-124M head chunk", grad_input(kChunk, 768, kPaddedVocabulary, false));
    bench("grad_weight", "gpt2-124M head chunk", grad_weight(kChunk, 768, kPaddedVocabulary, false));
    bench.print_planning_time();
}
}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "gemm", checks, benches); }
