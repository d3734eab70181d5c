// Checks every attention backend that this machine can run against float64, and times them side by side.
//
// A sweep is many shapes of one kind; of each backend and array it prints one line, the worst shape's. Compared are, with
// tolerances derived below, out and lse with float64 attention, and the gradients with those that follow in float64 from the
// out and lse that the backward was given. Besides, where cuDNN runs the shape: the error of our arrays against float64
// attention alone, over cuDNN's error, of every shape and of all shapes of a sweep.
#include "kernels/attention.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>

#include "dev/parts/attention/arrays.h"
#include "dev/parts/attention/benchmark.h"
#include "dev/parts/attention/reference.h"
#include "kernels/attention/backends.h"

namespace {

using bf16 = __nv_bfloat16;

constexpr AttentionBackend kBackends[] = {AttentionBackend::hopper, AttentionBackend::mma, AttentionBackend::cudnn};

// ---------------------------------------------------------------------------------------------------------------------
// Inputs

enum class Data { normal, spiky, extreme };
constexpr const char* kDataNames[] = {"normal", "spiky", "extreme"};

std::vector<bf16> make_qkv(const AttentionShape& s, Data data) {
    std::vector<float> x = random_normal(elements(s, packed_heads(s)));
    for (int b = 0; b < s.B; ++b)
        for (int t = 0; t < s.T; ++t) {
            float* row = &x[(size_t(b) * s.T + t) * packed_heads(s) * s.head_dim];
            if (data == Data::spiky && t == s.T / 2)  // one key 30 times as long as the others
                for (int i = s.H * s.head_dim; i < (s.H + s.KV) * s.head_dim; ++i) row[i] *= 30;
            if (data == Data::extreme)  // logits of thousands: exp without its shift would overflow or vanish
                for (int i = 0; i < (s.H + s.KV) * s.head_dim; ++i) row[i] *= 60;
        }
    return to_bf16(x);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tolerances

// Two roundings to BF16 lie between the inputs and every output: of P or dS before its matmul and of the output, each
// at most 2^-9 of its element and independent from element to element; all else is float. A third one is allowed for
// what cancels in sums of few terms.
constexpr double kThreeRoundings = 3 * 0x1p-9;
// Where the true gradient cancels to nothing (the first query has dS = P (dP - D) = 0), what remains is the float error
// of sums over head_dim of products of size 1: 1e-5. The floor allows 6e-5.
constexpr Tolerance kOut{.relative = kThreeRoundings}, kGradient{.relative = kThreeRoundings, .absolute = 1e-2};
constexpr Tolerance kLse{.relative = 1e-5, .absolute = 1};  // float: head_dim products of a score, T terms of the sum
constexpr double kMostOverCudnn = 1.1;

// ---------------------------------------------------------------------------------------------------------------------
// The arrays by name, as matrices

struct Matrix {
    std::vector<float> values;
    std::vector<double> reference;  // float64 of what the backend was given
    int64_t rows, cols;
    Tolerance tolerance;
};

// `count` columns from `first` on of a row-major matrix.
template <class To, class From>
std::vector<To> columns(const std::vector<From>& x, int64_t row_elements, int64_t first, int64_t count) {
    const int64_t rows = int64_t(x.size()) / row_elements;
    std::vector<To> y(size_t(rows * count));
#pragma omp parallel for
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < count; ++c) y[size_t(r * count + c)] = To(x[size_t(r * row_elements + first + c)]);
    return y;
}

// Row t of every sequence, of a matrix with rows (B, T).
template <class T>
std::vector<T> rows_at(const std::vector<T>& x, const AttentionShape& s, int t, int64_t cols) {
    std::vector<T> y;
    for (int b = 0; b < s.B; ++b) {
        const auto from = x.begin() + (int64_t(b) * s.T + t) * cols;
        y.insert(y.end(), from, from + cols);
    }
    return y;
}

using Matrices = std::map<std::string, Matrix>;

Matrices matrices(const AttentionShape& s, const AttentionResult& r, const AttentionReference& exact,
                  const AttentionReference& given) {
    const int64_t rows = int64_t(s.B) * s.T, packed = int64_t(packed_heads(s)) * s.head_dim;
    const int64_t q = int64_t(s.H) * s.head_dim, k = int64_t(s.KV) * s.head_dim;
    const std::vector<float> dqkv = to_float(r.dqkv);
    const auto gradient = [&](int64_t first, int64_t count) {
        return Matrix{columns<float>(dqkv, packed, first, count), columns<double>(given.dqkv, packed, first, count), rows, count, kGradient};
    };
    return {{"out", {to_float(r.out), exact.out, rows, q, kOut}},
            {"lse", {r.lse, exact.lse, int64_t(s.B) * s.H, s.T, kLse}},
            {"dq", gradient(0, q)},
            {"dk", gradient(q, k)},
            {"dv", gradient(q + k, k)}};
}

// Float64 attention, of the arrays whose errors are compared with cuDNN's.
std::map<std::string, std::vector<double>> true_values(const AttentionShape& s, const AttentionReference& exact) {
    const int64_t packed = int64_t(packed_heads(s)) * s.head_dim, q = int64_t(s.H) * s.head_dim, k = int64_t(s.KV) * s.head_dim;
    return {{"out", exact.out},
            {"dq", columns<double>(exact.dqkv, packed, 0, q)},
            {"dk", columns<double>(exact.dqkv, packed, q, k)},
            {"dv", columns<double>(exact.dqkv, packed, q + k, k)}};
}

// Root mean square of the error against float64 attention, and of that of its rounding to BF16, which nobody can avoid.
struct Error2 {
    double of_values, of_rounding;
};
Error2 rms_error(const std::vector<float>& found, const std::vector<double>& exact) {
    double values = 0, rounding = 0;
#pragma omp parallel for reduction(+ : values, rounding)
    for (size_t i = 0; i < exact.size(); ++i) {
        const double v = found[i] - exact[i], r = double(__bfloat162float(__double2bfloat16(exact[i]))) - exact[i];
        values += v * v, rounding += r * r;
    }
    return {std::sqrt(values / double(exact.size())), std::sqrt(rounding / double(exact.size()))};
}

// ---------------------------------------------------------------------------------------------------------------------
// A sweep

class Sweep {
  public:
    Sweep(Report& report, std::string name) : report_(report), name_(std::move(name)) {}

    void add(const AttentionShape& shape, Data data);
    // Records a line a test, after the last shape.
    void finish();

  private:
    struct Line {
        int shapes = 0, failed = 0;
        Comparison worst{true, -1, ""};
        std::string where;
    };
    void note(const std::string& test, const std::string& where, const Comparison& comparison);
    void compare(AttentionBackend backend, const AttentionShape& s, const std::string& where, const Matrices& found, const std::string& array);
    void compare_with_cudnn(AttentionBackend backend, const std::string& where, const std::map<std::string, Error2>& ours,
                            const std::map<std::string, Error2>& cudnn);
    void skip(const std::string& test, const std::string& why);

    struct Pool {  // of ratios: every shape counts alike, however large its errors
        int shapes = 0;
        double squares = 0;
    };

    Report& report_;
    std::string name_;
    std::map<std::string, Line> lines_;
    std::map<std::string, Pool> pools_;
    std::map<std::string, std::pair<int, std::string>> skipped_;  // shapes, why the last was
};

void Sweep::note(const std::string& test, const std::string& where, const Comparison& c) {
    Line& line = lines_[test];
    ++line.shapes;
    line.failed += !c.ok;
    const bool worse = c.ok == line.worst.ok ? !(c.relative <= line.worst.relative) : !c.ok;
    if (worse) line.worst = c, line.where = where;
}

void Sweep::skip(const std::string& test, const std::string& why) {
    auto& [count, reason] = skipped_[test];
    ++count, reason = why;
}

double ratio_of(double ours, double allowed) { return ours == 0 ? 0 : ours / allowed; }

Comparison ratio_to_cudnn(double ours, double allowed, double most) {
    const double ratio = ratio_of(ours, allowed);
    return {ratio <= most, ratio, message("%.3f (%.2e over %.2e), at most %.2f", ratio, ours, allowed, most)};
}

void Sweep::finish() {
    for (const auto& [test, line] : lines_)
        report_.expect("attention." + test, name_, line.failed == 0,
                       message("%d shapes, %d failed, worst %s: %s", line.shapes, line.failed, line.where.c_str(), line.worst.figure.c_str()));
    for (const auto& [test, pool] : pools_) {
        const double ratio = std::sqrt(pool.squares / pool.shapes);
        report_.expect("attention." + test, name_, ratio <= kMostOverCudnn,
                       message("%d shapes, root mean square %.3f, at most %.2f", pool.shapes, ratio, kMostOverCudnn));
    }
    for (const auto& [test, why] : skipped_)
        report_.skip("attention." + test, name_, message("%d shapes; %s", why.first, why.second.c_str()));
}

bool same_bits(const AttentionResult& a, const AttentionResult& b) {
    const auto same = [](const auto& x, const auto& y) { return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])) == 0; };
    return same(a.out, b.out) && same(a.lse, b.lse) && same(a.dqkv, b.dqkv);
}
uint32_t amax_of(const std::vector<bf16>& x) {
    uint32_t top = 0;
    for (const bf16 v : x) top = std::max(top, uint32_t(std::bit_cast<uint16_t>(v) & 0x7fff) << 16);
    return top;
}
bool all_finite(const std::vector<bf16>& x) {
    return std::all_of(x.begin(), x.end(), [](bf16 v) { return (std::bit_cast<uint16_t>(v) & 0x7f80) != 0x7f80; });
}

// What holds bit for bit: amax, untouched guards, nothing left unwritten and no NaN made.
Comparison exact_properties(const AttentionResult& r, bool with_amax) {
    const uint32_t out = with_amax ? amax_of(r.out) : 0, dqkv = with_amax ? amax_of(r.dqkv) : 0;
    const bool amax = r.out_amax == out && r.dqkv_amax == dqkv, finite = all_finite(r.out) && all_finite(r.dqkv);
    return {amax && finite && r.guards_intact, 0, message("amax %s, %s, guards %s", amax ? "exact" : "WRONG", finite ? "all finite" : "NOT FINITE", r.guards_intact ? "intact" : "HIT")};
}

void Sweep::compare(AttentionBackend backend, const AttentionShape& s, const std::string& where, const Matrices& found, const std::string& array) {
    const Matrix& m = found.at(array);
    const std::string test = array + " [" + name_of(backend) + "]";
    note(test, where, compare_tiles(m.values, m.reference, m.rows, m.cols, m.tolerance));
    if (array == "lse") return;
    // The first and the last row of a sequence again, by themselves: elsewhere their size is not that of their neighbours
    for (const int t : {0, s.T - 1})
        note(test, where + (t == 0 ? " first rows" : " last rows"),
             compare_tiles(rows_at(m.values, s, t, m.cols), rows_at(m.reference, s, t, m.cols), s.B, m.cols, m.tolerance));
}

void Sweep::compare_with_cudnn(AttentionBackend backend, const std::string& where, const std::map<std::string, Error2>& ours,
                               const std::map<std::string, Error2>& cudnn) {
    for (const auto& [array, error] : ours) {
        if (!cudnn.count(array)) continue;
        // Not below what rounding the result costs, nor, where the gradient is zero, below the floor of the tolerance
        const double floor = std::max(error.of_rounding, array == "out" ? 0 : kGradient.absolute * 0x1p-9);
        const double allowed = std::max(cudnn.at(array).of_values, floor);
        const std::string test = array + " error over cudnn's [" + name_of(backend) + "]";
        const double ratio = ratio_of(error.of_values, allowed);
        Pool& pool = pools_[test + ", all shapes"];
        ++pool.shapes, pool.squares += ratio * ratio;
        note(test, where, ratio_to_cudnn(error.of_values, allowed, kMostOverCudnn));
    }
}

// cuDNN takes tens of milliseconds to plan a shape, and the better part of a second to compile for a new head dimension:
// every one would be most of this program's time. Under --small the sanitizer watches, and watches our kernels.
bool run_cudnn(const Report& report, const AttentionShape& s) {
    return !report.small_only && s.head_dim % 64 == 0 && (s.T <= 16 || s.T % 16 <= 1 || s.T > 300);
}

void Sweep::add(const AttentionShape& s, Data data) {
    const std::string where = describe(s);
    AttentionArrays arrays(s, make_qkv(s, data), to_bf16(random_normal(elements(s, s.H))));
    const AttentionReference exact = attention_reference(s, arrays.qkv.get(), arrays.dout.get());
    std::map<AttentionBackend, std::map<std::string, Error2>> errors;
    std::map<std::string, std::vector<double>> truth;
    if (run_cudnn(report_, s) && data != Data::extreme) truth = true_values(s, exact);
    for (const AttentionBackend backend : kBackends) {
        if (backend == AttentionBackend::cudnn && !run_cudnn(report_, s)) continue;
        const AttentionOptions options{.backend = backend};
        const std::string no_forward = forward_obstacle(s, options), no_backward = backward_obstacle(s, options);
        const std::string tag = std::string(" [") + name_of(backend) + "]";
        if (!no_forward.empty()) skip("forward" + tag, no_forward);
        if (!no_backward.empty()) skip("backward" + tag, no_backward);
        if (!no_forward.empty() && !no_backward.empty()) continue;

        const bool with_amax = s.T % 2 == 1;
        const AttentionResult r = arrays.run(options, with_amax);
        note("bits" + tag, where, exact_properties(r, with_amax));
        const Matrices found = matrices(s, r, exact, attention_reference(s, arrays.qkv.get(), arrays.dout.get(), {arrays.out.get(), arrays.lse.get()}));
        std::vector<std::string> judged;
        if (no_forward.empty()) judged = {"out", "lse"};
        if (no_backward.empty()) judged.push_back("dv");
        // Extreme logits leave one key a row with P = 1 and so dS = dP - D = 0: the gradients of q and k are noise.
        if (no_backward.empty() && data != Data::extreme) judged.insert(judged.end(), {"dq", "dk"});
        for (const std::string& array : judged) {
            compare(backend, s, where, found, array);
            if (truth.count(array)) errors[backend][array] = rms_error(found.at(array).values, truth.at(array));
        }
    }
    if (!errors.count(AttentionBackend::cudnn)) return;
    for (const auto& [backend, ours] : errors)
        if (backend != AttentionBackend::cudnn) compare_with_cudnn(backend, where, ours, errors[AttentionBackend::cudnn]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Cases

struct Heads {
    int H, KV;
};
constexpr Heads kHeads[] = {{2, 2}, {2, 1}, {6, 2}, {3, 3}, {4, 1}};

// How many rows of queries make the ratio of two errors a property of the kernels. Most of an error is a few large dS a
// sequence (of its first rows, or of those that see the long key and others), and where the backends round different multiples
// of them, the errors are independent. Emulated for D = 128 (dS rounded before and after the scale of 128^-1/2), ln of the
// ratio deviates by 0.035 for 290 rows of T = 145, and by 0.042 with a long key: among some 90 such comparisons of a run, 1.1
// would be passed by chance every few runs. It falls with the root of the rows: with 4096 of them, 1.1 is at least 5 deviations
// away, from T = 2 to 1023, and mostly more than 6 (dev/LOG.md).
constexpr int kRowsBesideCudnn = 4096;
constexpr int kElements = 1 << 15;  // a head's, where float64 alone judges

AttentionShape shape_of(const Report& report, int T, int head_dim) {
    const Heads heads = kHeads[(T + head_dim / 8) % int(std::size(kHeads))];
    AttentionShape s{.B = 1, .T = T, .H = heads.H, .KV = heads.KV, .head_dim = head_dim};
    if (report.small_only) return s;
    s.B = std::max(1, kElements / (T * head_dim));
    if (run_cudnn(report, s)) s.B = std::max(s.B, (kRowsBesideCudnn + T * s.H - 1) / (T * s.H));
    return s;
}

void sweep(Report& report, Data data, int head_dim, const std::vector<int>& lengths, const char* title) {
    Sweep sweep(report, message("D%d %s, %s", head_dim, kDataNames[int(data)], title));
    for (const int T : lengths)
        if (!report.small_only || T <= 129) sweep.add(shape_of(report, T, head_dim), data);
    sweep.finish();
}

// Of 1..300: all up to 40 and all next to a multiple of 16 in both head dimensions, the rest in one of them.
std::vector<int> dense_lengths(int head_dim) {
    std::vector<int> lengths;
    for (int T = 1; T <= 300; ++T) {
        const bool edge = T <= 40 || T % 16 <= 1 || T % 16 == 15;
        if (edge || (T % 4 < 2) == (head_dim == 64)) lengths.push_back(T);
    }
    return lengths;
}

// --deterministic: the same bits from 20 runs, with and without amax, and still right (sweeps run the default mode).
void check_deterministic(Report& report, const AttentionShape& s) {
    AttentionArrays arrays(s, make_qkv(s, Data::normal), to_bf16(random_normal(elements(s, s.H))));
    for (const AttentionBackend backend : kBackends) {
        if (backend == AttentionBackend::cudnn && report.small_only) continue;
        const AttentionOptions options{.backend = backend, .deterministic = true};
        const std::string name = message("attention.deterministic [%s]", name_of(backend));
        const std::string no_forward = forward_obstacle(s, options), no_backward = backward_obstacle(s, options);
        if (!no_forward.empty() || !no_backward.empty()) {
            report.skip(name, describe(s), no_forward.empty() ? no_backward : no_forward);
            continue;
        }
        const AttentionResult first = arrays.run(options, true);
        int different = 0;
        const int runs = report.small_only ? 2 : 20;
        for (int i = 1; i < runs; ++i) different += !same_bits(first, arrays.run(options, i % 2 == 0));
        report.expect(name, describe(s), different == 0, message("%d of %d runs differ from the first", different, runs - 1));
        const AttentionReference given = attention_reference(s, arrays.qkv.get(), arrays.dout.get(), {arrays.out.get(), arrays.lse.get()});
        report.compare(name + " dqkv", describe(s), to_float(first.dqkv), given.dqkv, int64_t(s.B) * s.T, int64_t(packed_heads(s)) * s.head_dim, kGradient);
    }
}

// The pass that finds the amax of what cuDNN wrote.
void check_amax_pass(Report& report) {
    for (const size_t n : {8, 16, 2048, 2056, 1 << 20, 3000008}) {
        if (report.small_only && n > 4096) continue;
        for (const float special : {0.0f, -INFINITY, NAN}) {
            std::vector<bf16> x = to_bf16(random_normal(n));
            if (special != 0) x[size_t(random_ints(1, 0, int(n))[0])] = __float2bfloat16(special);
            const DeviceBuffer<bf16> on_device(x);
            DeviceBuffer<QuantSlot> slot(1);
            slot.zero();
            attention_amax(on_device.get(), int64_t(n), slot.get(), nullptr);
            const uint32_t bits = slot.download()[0].amax_bits;
            report.expect("attention.amax pass", message("n=%zu with %g", n, special), bits == amax_of(x) && slot.guards_intact(),
                          message("%08x, should be %08x", bits, amax_of(x)));
        }
    }
}

// Where the Hopper kernels can run they must: a shape that they refuse would be a skipped line of the sweeps, no failed one.
void check_dispatch(Report& report) {
    int device, major, minor;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (TRAIN_GPT_ARCH != 90 || major != 9 || minor != 0) {
        report.skip("attention.dispatch", "", message("a binary for sm_%d on sm_%d%d: the Hopper kernels are for sm_90a", TRAIN_GPT_ARCH, major, minor));
        return;
    }
    for (const int head_dim : {64, 128})
        for (const int T : {1, 2, 17, 129, 1023, 1024, 4097, 16384})
            for (const Heads heads : kHeads) {
                const AttentionShape s{.B = 2, .T = T, .H = heads.H, .KV = heads.KV, .head_dim = head_dim};
                for (const bool deterministic : {false, true}) {
                    const AttentionChoice c = attention_choice(s, {.deterministic = deterministic});
                    report.expect("attention.dispatch", describe(s) + (deterministic ? " deterministic" : ""), c.forward == "hopper" && c.backward == "hopper",
                                  message("forward %s, backward %s %s", c.forward.c_str(), c.backward.c_str(), c.reason.c_str()));
                }
            }
}

void checks(Report& report) {
    check_dispatch(report);
    check_amax_pass(report);
    for (const int head_dim : {64, 128}) {
        std::vector<int> small{1, 2, 17, 64, 65, 128, 129};
        std::vector<int> spiky;
        for (const int T : dense_lengths(head_dim))
            if (T <= 16 || T % 16 <= 1 || T % 16 == 15) spiky.push_back(T);
        sweep(report, Data::normal, head_dim, report.small_only ? small : dense_lengths(head_dim), "T 1..300");
        sweep(report, Data::spiky, head_dim, report.small_only ? std::vector{65, 129} : spiky, "T 1..300");
        if (report.small_only) continue;
        for (const Data data : {Data::normal, Data::spiky}) sweep(report, data, head_dim, {1023, 1025, 4096}, "T 1023, 1025, 4096");
    }
    for (const int head_dim : {8, 16, 40, 80, 96, 192, 256})
        sweep(report, Data::normal, head_dim, report.small_only ? std::vector{1, 47, 129} : std::vector{1, 47, 64, 129, 300}, "other head dimensions");
    for (const int head_dim : {40, 64, 128, 256}) sweep(report, Data::extreme, head_dim, {1, 129, 257}, "logits of thousands");
    check_deterministic(report, {.B = 2, .T = 129, .H = 6, .KV = 2, .head_dim = 64});
    check_deterministic(report, {.B = 2, .T = 65, .H = 4, .KV = 1, .head_dim = 128});
    check_deterministic(report, {.B = 1, .T = 47, .H = 3, .KV = 3, .head_dim = 40});
    if (report.small_only) return;
    check_deterministic(report, {.B = 4, .T = 1025, .H = 12, .KV = 12, .head_dim = 64});
    check_deterministic(report, {.B = 2, .T = 2048, .H = 8, .KV = 2, .head_dim = 128});
}

}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "attention", checks, benchmark_attention); }
