// Checks and times kernels/attention.cu against a float64 reference, row by row.
#include "kernels/attention.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "dev/harness.h"
#include "kernels/common/peak.h"

namespace {

using bf16 = __nv_bfloat16;

std::string describe(const AttentionShape& s, const std::string& note = "") {
    return message("B%d H%d/%d T%d D%d", s.B, s.H, s.KV, s.T, s.head_dim) + (note.empty() ? "" : " " + note);
}
int packed_heads(const AttentionShape& s) { return s.H + 2 * s.KV; }
size_t elements(const AttentionShape& s, int heads) { return size_t(s.B) * s.T * heads * s.head_dim; }

// ---------------------------------------------------------------------------------------------------------------------
// Reference, one row of an output at a time, so that large shapes can be sampled. The backward takes out and lse as
// given, as the kernels do: the rounding of out is the forward's error, not the backward's.

double dot(const double* a, const double* b, int n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}
void add_scaled(double* y, double a, const double* x, int n) {
    for (int i = 0; i < n; ++i) y[i] += a * x[i];
}
std::vector<double> to_double(const std::vector<bf16>& x) {
    const std::vector<float> y = to_float(x);
    return {y.begin(), y.end()};
}

struct Row {
    int b, head, t;  // head among query heads, or among key/value heads
};

class Reference {
  public:
    Reference(const AttentionShape& shape, const std::vector<bf16>& qkv, const std::vector<bf16>& dout,
              const std::vector<bf16>& out, const std::vector<float>& lse)
        : s_(shape), scale_(1 / std::sqrt(double(shape.head_dim))), qkv_(to_double(qkv)), dout_(to_double(dout)),
          out_(to_double(out)), lse_(lse) {}

    void forward(Row r, double* out, double* lse) const {
        const int n = s_.head_dim, kv = r.head / (s_.H / s_.KV);
        std::vector<double> p(size_t(r.t) + 1);
        for (int j = 0; j <= r.t; ++j) p[j] = scale_ * dot(q(r.b, r.head, r.t), k(r.b, kv, j), n);
        const double top = *std::max_element(p.begin(), p.end());
        double sum = 0;
        for (double& x : p) sum += x = std::exp(x - top);
        std::fill(out, out + n, 0.0);
        for (int j = 0; j <= r.t; ++j) add_scaled(out, p[j] / sum, v(r.b, kv, j), n);
        *lse = top + std::log(sum);
    }
    void query_gradient(Row r, double* dq) const {
        const int n = s_.head_dim, kv = r.head / (s_.H / s_.KV);
        const double delta = dot(of_out(dout_, r.b, r.head, r.t), of_out(out_, r.b, r.head, r.t), n);
        std::fill(dq, dq + n, 0.0);
        for (int j = 0; j <= r.t; ++j)
            add_scaled(dq, scale_ * d_s(probability(r.b, r.head, kv, r.t, j), r.b, r.head, kv, r.t, j, delta),
                       k(r.b, kv, j), n);
    }
    void key_value_gradient(Row r, double* dk, double* dv) const {
        const int n = s_.head_dim, group = s_.H / s_.KV;
        std::fill(dk, dk + n, 0.0);
        std::fill(dv, dv + n, 0.0);
        for (int h = r.head * group; h < (r.head + 1) * group; ++h)
            for (int i = r.t; i < s_.T; ++i) {
                const double* d_out = of_out(dout_, r.b, h, i);
                const double p = probability(r.b, h, r.head, i, r.t);
                add_scaled(dv, p, d_out, n);
                add_scaled(dk, scale_ * d_s(p, r.b, h, r.head, i, r.t, dot(d_out, of_out(out_, r.b, h, i), n)),
                           q(r.b, h, i), n);
            }
    }

  private:
    const double* packed(int b, int head, int t) const {
        return &qkv_[((size_t(b) * s_.T + t) * packed_heads(s_) + head) * s_.head_dim];
    }
    const double* q(int b, int h, int t) const { return packed(b, h, t); }
    const double* k(int b, int kv, int t) const { return packed(b, s_.H + kv, t); }
    const double* v(int b, int kv, int t) const { return packed(b, s_.H + s_.KV + kv, t); }
    const double* of_out(const std::vector<double>& x, int b, int h, int t) const {
        return &x[((size_t(b) * s_.T + t) * s_.H + h) * s_.head_dim];
    }
    double probability(int b, int h, int kv, int i, int j) const {
        return std::exp(scale_ * dot(q(b, h, i), k(b, kv, j), s_.head_dim) - lse_[(size_t(b) * s_.H + h) * s_.T + i]);
    }
    double d_s(double p, int b, int h, int kv, int i, int j, double delta) const {
        return p * (dot(of_out(dout_, b, h, i), v(b, kv, j), s_.head_dim) - delta);
    }

    AttentionShape s_;
    double scale_;
    std::vector<double> qkv_, dout_, out_;
    std::vector<float> lse_;
};

// All rows, or `sampled` of them with the first and last among them.
std::vector<Row> choose_rows(const AttentionShape& s, int heads, int sampled) {
    std::vector<Row> rows;
    if (sampled == 0) {
        for (int b = 0; b < s.B; ++b)
            for (int h = 0; h < heads; ++h)
                for (int t = 0; t < s.T; ++t) rows.push_back({b, h, t});
        return rows;
    }
    const std::vector<int> chosen = random_ints(size_t(sampled), 0, s.B * heads * s.T);
    for (int i : chosen) rows.push_back({i / (heads * s.T), i / s.T % heads, i % s.T});
    rows.front() = {0, 0, 0};
    rows.back() = {s.B - 1, heads - 1, s.T - 1};
    return rows;
}

// Those rows of a (B, T, heads, head_dim) matrix, whose row is head_offset + Row::head.
std::vector<float> gather(const std::vector<bf16>& x, const AttentionShape& s, int heads, int head_offset,
                          const std::vector<Row>& rows) {
    std::vector<float> y;
    for (const Row& r : rows) {
        const bf16* from = &x[((size_t(r.b) * s.T + r.t) * heads + head_offset + r.head) * s.head_dim];
        for (int i = 0; i < s.head_dim; ++i) y.push_back(__bfloat162float(from[i]));
    }
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// One run on the device

struct Result {
    std::vector<bf16> out, dqkv;
    std::vector<float> lse;
    QuantSlot out_slot, dqkv_slot;
    bool guards;
};

Result run(const AttentionShape& s, const std::vector<bf16>& qkv, const std::vector<bf16>& dout, bool with_amax) {
    DeviceBuffer<bf16> d_qkv(qkv), d_dout(dout), out(elements(s, s.H)), dqkv(qkv.size());
    DeviceBuffer<float> lse(size_t(s.B) * s.H * s.T);
    DeviceBuffer<uint8_t> workspace(attention_backward_workspace_bytes(s));
    DeviceBuffer<QuantSlot> slots(2);
    slots.zero();
    attention_forward({.shape = s, .qkv = d_qkv.get(), .out = out.get(), .lse = lse.get(),
                       .amax = with_amax ? slots.get() : nullptr}, nullptr);
    attention_backward({.shape = s, .qkv = d_qkv.get(), .out = out.get(), .dout = d_dout.get(), .lse = lse.get(),
                        .dqkv = dqkv.get(), .amax = with_amax ? slots.get() + 1 : nullptr,
                        .workspace = workspace.get()}, nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<QuantSlot> slot = slots.download();
    const bool guards = out.guards_intact() && dqkv.guards_intact() && lse.guards_intact() &&
                        workspace.guards_intact() && slots.guards_intact() && d_qkv.guards_intact() &&
                        d_dout.guards_intact();
    return {out.download(), dqkv.download(), lse.download(), slot[0], slot[1], guards};
}

uint32_t amax_of(const std::vector<bf16>& x) {
    uint32_t top = 0;
    for (bf16 v : x) top = std::max(top, uint32_t(std::bit_cast<uint16_t>(v) & 0x7fff) << 16);
    return top;
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}
bool all_finite(const std::vector<bf16>& x) {
    return std::all_of(x.begin(), x.end(), [](bf16 v) { return std::isfinite(__bfloat162float(v)); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Cases

enum class Data { normal, spiky, extreme };

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

// Two roundings to BF16 lie between the inputs and every output: of P or dS before its matmul and of the output, each
// at most 2^-9 of its element and independent from element to element; all else is float. A third one is allowed for
// what cancels in sums of few terms.
constexpr double kThreeRoundings = 3 * 0x1p-9;
// Where the true gradient cancels to nothing (the first query has dS = P (dP - D) = 0), what remains is the float error
// of sums over head_dim of products of size 1: 1e-5. The floor allows 6e-5.
constexpr Tolerance kOut{.relative = kThreeRoundings}, kGradient{.relative = kThreeRoundings, .absolute = 1e-2};
constexpr Tolerance kLse{.relative = 1e-5, .absolute = 1};  // float: head_dim products of a score, T terms of the sum

void check(Report& report, const AttentionShape& s, Data data = Data::normal, int sampled = 0) {
    const std::string shape =
        describe(s, data == Data::spiky ? "spiky" : data == Data::extreme ? "extreme" : sampled ? "sampled" : "");
    const std::vector<bf16> qkv = make_qkv(s, data), dout = to_bf16(random_normal(elements(s, s.H)));
    const Result r = run(s, qkv, dout, true), again = run(s, qkv, dout, false);

    const bool repeats = same_bits(r.out, again.out) && same_bits(r.lse, again.lse) && same_bits(r.dqkv, again.dqkv);
    const bool amax = r.out_slot.amax_bits == amax_of(r.out) && r.dqkv_slot.amax_bits == amax_of(r.dqkv) &&
                      again.out_slot.amax_bits == 0 && again.dqkv_slot.amax_bits == 0;
    const bool finite = all_finite(r.out) && all_finite(r.dqkv);
    report.expect("attention.bits", shape, repeats && amax && finite && r.guards && again.guards,
                  message("twice %s, amax %s, finite %s, guards %s", repeats ? "same" : "DIFFERENT",
                          amax ? "exact" : "WRONG", finite ? "yes" : "NO",
                          r.guards && again.guards ? "intact" : "HIT"));

    const Reference reference(s, qkv, dout, r.out, r.lse);
    const int n = s.head_dim;
    const std::vector<Row> queries = choose_rows(s, s.H, sampled), keys = choose_rows(s, s.KV, sampled);
    const int64_t n_queries = int64_t(queries.size()), n_keys = int64_t(keys.size());
    std::vector<double> out(queries.size() * n), lse(queries.size()), dq(out.size());
    std::vector<double> dk(keys.size() * n), dv(dk.size());
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n_queries; ++i) {
        reference.forward(queries[i], &out[i * n], &lse[i]);
        reference.query_gradient(queries[i], &dq[i * n]);
    }
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n_keys; ++i) reference.key_value_gradient(keys[i], &dk[i * n], &dv[i * n]);

    std::vector<float> gpu_lse;
    for (const Row& row : queries) gpu_lse.push_back(r.lse[(size_t(row.b) * s.H + row.head) * s.T + row.t]);
    report.compare("attention.out", shape, gather(r.out, s, s.H, 0, queries), out, n_queries, n, kOut);
    report.compare("attention.lse", shape, gpu_lse, lse, n_queries, 1, kLse);
    const int heads = packed_heads(s);
    report.compare("attention.dv", shape, gather(r.dqkv, s, heads, s.H + s.KV, keys), dv, n_keys, n, kGradient);
    // Extreme logits leave one key a row with P = 1 and so dS = dP - D = 0: the gradients of q and k are noise.
    if (data == Data::extreme) return;
    report.compare("attention.dq", shape, gather(r.dqkv, s, heads, 0, queries), dq, n_queries, n, kGradient);
    report.compare("attention.dk", shape, gather(r.dqkv, s, heads, s.H, keys), dk, n_keys, n, kGradient);
}

void checks(Report& report) {
    struct Heads {
        int B, H, KV;
    };
    constexpr Heads kHeads[] = {{1, 2, 2}, {2, 2, 1}, {1, 6, 2}, {2, 3, 3}};
    int turn = 0;
    auto add = [&](int T, int head_dim, Data data = Data::normal) {
        if (report.small_only && T > 129) return;
        const Heads h = kHeads[turn++ % std::size(kHeads)];
        check(report, {.B = h.B, .T = T, .H = h.H, .KV = h.KV, .head_dim = head_dim}, data);
    };
    for (int head_dim : {64, 128})
        for (int T : {1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 200, 257, 1023, 1025}) add(T, head_dim);
    for (int head_dim : {8, 16, 40, 80, 256})
        for (int T : {1, 47, 64, 129, 300}) add(T, head_dim);
    for (int head_dim : {40, 64, 128, 256})
        for (int T : {129, 257}) add(T, head_dim, Data::spiky), add(T, head_dim, Data::extreme);
    if (report.small_only) return;
    check(report, {.B = 4, .T = 1024, .H = 12, .KV = 12, .head_dim = 64}, Data::normal, 256);
    check(report, {.B = 2, .T = 4096, .H = 8, .KV = 2, .head_dim = 128}, Data::normal, 256);
}

// ---------------------------------------------------------------------------------------------------------------------
// Benchmarks. FLOPs count the causal half once; the backward as 5 matmuls to the forward's 2.

std::vector<bf16> random_bf16(size_t n) {  // a random period, repeated: fast for gigabytes
    const std::vector<bf16> period = to_bf16(random_normal(std::min(n, size_t(4194301))));
    std::vector<bf16> x(n);
    for (size_t i = 0; i < n; i += period.size())
        std::copy_n(period.begin(), std::min(period.size(), n - i), x.begin() + std::ptrdiff_t(i));
    return x;
}

void benches(Report& report) {
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    const double peak_tflops = peak_of(properties.name).bf16_tflops;
    const AttentionShape shapes[] = {
        {.B = 64, .T = 1024, .H = 12, .KV = 12, .head_dim = 64},
        {.B = 32, .T = 1024, .H = 12, .KV = 12, .head_dim = 64},
        {.B = 16, .T = 1024, .H = 25, .KV = 25, .head_dim = 64},
        {.B = 32, .T = 1024, .H = 12, .KV = 2, .head_dim = 128},
        {.B = 8, .T = 4096, .H = 32, .KV = 8, .head_dim = 128},
    };
    for (const AttentionShape& s : shapes) {
        DeviceBuffer<bf16> qkv(random_bf16(elements(s, packed_heads(s)))), dout(random_bf16(elements(s, s.H)));
        DeviceBuffer<bf16> out(dout.size()), dqkv(qkv.size());
        DeviceBuffer<float> lse(size_t(s.B) * s.H * s.T);
        DeviceBuffer<uint8_t> workspace(attention_backward_workspace_bytes(s));
        DeviceBuffer<QuantSlot> slots(2);
        slots.zero();
        const double forward_flops = 4.0 * s.B * s.H * s.T * s.T * s.head_dim / 2;
        report.bench({.name = "attention.forward", .shape = describe(s), .flops = forward_flops,
                      .peak_tflops = peak_tflops},
                     [&](int, cudaStream_t stream) {
                         attention_forward({.shape = s, .qkv = qkv.get(), .out = out.get(), .lse = lse.get(),
                                            .amax = slots.get()}, stream);
                     });
        report.bench({.name = "attention.backward", .shape = describe(s), .flops = 2.5 * forward_flops,
                      .peak_tflops = peak_tflops},
                     [&](int, cudaStream_t stream) {
                         attention_backward({.shape = s, .qkv = qkv.get(), .out = out.get(), .dout = dout.get(),
                                             .lse = lse.get(), .dqkv = dqkv.get(), .amax = slots.get() + 1,
                                             .workspace = workspace.get()}, stream);
                     });
    }
}

}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "attention", checks, benches); }
