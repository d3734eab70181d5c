// Token and position embedding against the exact sums, with token distributions from uniform to a single token; speed.
#include "kernels/embedding.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <set>

#include "dev/harness.h"
#include "trainer/reference/quantizer.h"

namespace {
using bf16 = __nv_bfloat16;

// How tokens are drawn. Zipf: the k-th most frequent of V tokens with probability 1 / (k ln V), as in text.
enum class Tokens { uniform, zipf, one, two, ascending };
const char* name_of(Tokens kind) {
    constexpr const char* kNames[] = {"uniform", "Zipf", "one token", "two tokens", "ascending"};
    return kNames[static_cast<int>(kind)];
}
std::vector<int> draw_tokens(Tokens kind, size_t n, int V) {
    std::vector<int> tokens = random_ints(n, 0, V);
    const std::vector<float> u = random_uniform(n, 0.0f, 1.0f);
    for (size_t i = 0; i < n; i++) {
        const int rank = std::min(V, static_cast<int>(std::pow(double(V), double(u[i])))) - 1;
        switch (kind) {
            case Tokens::uniform: break;
            case Tokens::zipf: tokens[i] = static_cast<int>((int64_t(rank) * 7919 + 11) % V); break;
            case Tokens::one: tokens[i] = V - 1; break;
            case Tokens::two: tokens[i] = u[i] < 0.7f ? 0 : V - 1; break;
            case Tokens::ascending: tokens[i] = static_cast<int>(i % size_t(V)); break;
        }
    }
    return tokens;
}

struct Shape {
    int B, T, C, V;
    size_t positions() const { return size_t(B) * T; }
    std::string text(Tokens kind) const { return message("B%d T%d C%d V%d %s", B, T, C, V, name_of(kind)); }
};

void check_forward(Report& report, const Shape& s, Tokens kind) {
    const std::vector<int> tokens = draw_tokens(kind, s.positions(), s.V);
    const std::vector<float> wte = to_float(to_bf16(random_normal(size_t(s.V) * s.C, 0.02f)));
    const std::vector<float> wpe = to_float(to_bf16(random_normal(size_t(s.T) * s.C, 0.02f)));
    std::vector<bf16> expected(s.positions() * s.C);
    for (size_t i = 0; i < s.positions(); i++)
        for (int c = 0; c < s.C; c++)
            expected[i * s.C + c] = std::bit_cast<bf16>(
                bf16_bits(wte[size_t(tokens[i]) * s.C + c] + wpe[i % size_t(s.T) * s.C + c]));
    const DeviceBuffer<int> device_tokens(tokens);
    const DeviceBuffer<bf16> device_wte(to_bf16(wte)), device_wpe(to_bf16(wpe)), out(expected.size());
    embedding_forward({.tokens = device_tokens.get(), .wte = device_wte.get(), .wpe = device_wpe.get(),
                       .out = out.get(), .B = s.B, .T = s.T, .C = s.C}, nullptr);
    report.compare_bits("forward", s.text(kind), out.download(), expected);
    report.expect("forward guards", s.text(kind), out.guards_intact(), "intact");
}

void check_backward(Report& report, const Shape& s, Tokens kind) {
    const std::vector<int> tokens = draw_tokens(kind, s.positions(), s.V);
    const std::vector<bf16> dout = to_bf16(random_normal(s.positions() * s.C));
    const std::vector<float> dwte = random_normal(size_t(s.V) * s.C), dwpe = random_normal(size_t(s.T) * s.C);
    std::vector<double> dwte64(dwte.begin(), dwte.end()), dwpe64(dwpe.begin(), dwpe.end());
    const std::vector<float> gradient = to_float(dout);
    for (size_t i = 0; i < s.positions(); i++)
        for (int c = 0; c < s.C; c++) {
            dwte64[size_t(tokens[i]) * s.C + c] += gradient[i * s.C + c];
            dwpe64[i % size_t(s.T) * s.C + c] += gradient[i * s.C + c];
        }

    const DeviceBuffer<int> device_tokens(tokens);
    const DeviceBuffer<bf16> device_dout(dout);
    DeviceBuffer<uint8_t> workspace(embedding_backward_workspace_bytes(s.B, s.T, s.C, s.V));
    std::vector<float> first_dwte, first_dwpe;
    bool again = true, guards = true;
    for (int run = 0; run < 2; run++) {
        const DeviceBuffer<float> device_dwte(dwte), device_dwpe(dwpe);
        workspace.poison();
        embedding_backward({.tokens = device_tokens.get(), .dout = device_dout.get(), .dwte = device_dwte.get(),
                            .dwpe = device_dwpe.get(), .workspace = workspace.get(), .B = s.B, .T = s.T, .C = s.C,
                            .V = s.V}, nullptr);
        const std::vector<float> out_dwte = device_dwte.download(), out_dwpe = device_dwpe.download();
        if (run == 0) first_dwte = out_dwte, first_dwpe = out_dwpe;
        again &= out_dwte == first_dwte && out_dwpe == first_dwpe;
        guards &= device_dwte.guards_intact() && device_dwpe.guards_intact() && workspace.guards_intact();
    }
    // n random numbers (n: a token's occurrences) are added 32 in a row, then four times n / 128 such sums in a row. A
    // rounding's error is about 0.4 * 2^-24 of the partial sum, and they are as random as the numbers: together
    // sqrt(16 + n / 256) * 0.4 * 2^-24 of the result, 4e-7 for n = 65536. dwpe adds B numbers in a row: less.
    report.compare("dwte", s.text(kind), first_dwte, dwte64, s.V, s.C, {.relative = 1e-6, .absolute = 1e-3});
    report.compare("dwpe", s.text(kind), first_dwpe, dwpe64, s.T, s.C, {.relative = 1e-6, .absolute = 1e-3});
    report.expect("backward again, guards", s.text(kind), again && guards,
                  message("again %d guards %d", again, guards));

    // Rows of tokens that do not occur keep their bits.
    const std::set<int> occurring(tokens.begin(), tokens.end());
    bool untouched = true;
    for (int v = 0; v < s.V; v++)
        if (!occurring.contains(v))
            untouched &= std::equal(dwte.begin() + int64_t(v) * s.C, dwte.begin() + int64_t(v + 1) * s.C,
                                    first_dwte.begin() + int64_t(v) * s.C);
    report.expect("rows of other tokens", s.text(kind), untouched, message("%zu tokens occur", occurring.size()));
}

void checks(Report& report) {
    // Odd numbers of positions around the chunk of 32; channel counts that leave threads idle or need several blocks.
    std::vector<Shape> shapes = {{1, 1, 8, 1},     {2, 3, 8, 5},       {1, 31, 16, 3},
                                 {1, 33, 24, 2},   {1, 64, 8, 4},      {3, 37, 40, 17},
                                 {4, 64, 768, 97}, {5, 51, 1600, 31},  {2, 64, 2056, 256},
                                 {7, 128, 136, 257}};
    for (const Shape& s : shapes)
        for (const Tokens kind : {Tokens::uniform, Tokens::zipf, Tokens::one, Tokens::two, Tokens::ascending}) {
            check_forward(report, s, kind);
            check_backward(report, s, kind);
        }
    if (report.small_only) {
        check_backward(report, {.B = 20, .T = 512, .C = 8, .V = 50257}, Tokens::zipf);
        check_backward(report, {.B = 20, .T = 512, .C = 8, .V = 50257}, Tokens::one);
        return;
    }
    check_forward(report, {.B = 8, .T = 1024, .C = 768, .V = 50257}, Tokens::zipf);
    for (const Tokens kind : {Tokens::uniform, Tokens::zipf, Tokens::one, Tokens::two}) {
        check_backward(report, {.B = 64, .T = 1024, .C = 64, .V = 50257}, kind);
        check_backward(report, {.B = 8, .T = 1024, .C = 768, .V = 50257}, kind);
    }
    check_backward(report, {.B = 3, .T = 1000, .C = 1600, .V = 50304}, Tokens::zipf);
}

// ---------------------------------------------------------------------------------------------------------------------
// Speed

template <class T>
std::unique_ptr<DeviceBuffer<T>> filled(size_t n, const std::vector<T>& pool) {
    auto buffer = std::make_unique<DeviceBuffer<T>>(n);
    for (size_t at = 0; at < n; at += pool.size())
        CUDA_CHECK(cudaMemcpy(buffer->get() + at, pool.data(), std::min(pool.size(), n - at) * sizeof(T),
                              cudaMemcpyHostToDevice));
    return buffer;
}

void bench_shape(Report& report, const Shape& s, Tokens kind) {
    const size_t n = s.positions() * s.C;
    constexpr int kSets = 3;
    const std::vector<bf16> pool = to_bf16(random_normal(size_t(1) << 22));
    const std::vector<int> tokens = draw_tokens(kind, s.positions(), s.V);
    const std::set<int> occurring(tokens.begin(), tokens.end());
    const double rows = double(occurring.size()) * s.C, places = double(s.T) * s.C;
    const DeviceBuffer<int> device_tokens(tokens);
    const DeviceBuffer<uint8_t> workspace(embedding_backward_workspace_bytes(s.B, s.T, s.C, s.V));
    std::vector<std::unique_ptr<DeviceBuffer<bf16>>> activations, wte, wpe;
    std::vector<std::unique_ptr<DeviceBuffer<float>>> dwte, dwpe;
    for (int set = 0; set < kSets; set++) {
        activations.push_back(filled(n, pool));
        wte.push_back(filled(size_t(s.V) * s.C, pool));
        wpe.push_back(filled(size_t(s.T) * s.C, pool));
        dwte.push_back(filled(size_t(s.V) * s.C, random_normal(size_t(1) << 20)));
        dwpe.push_back(filled(size_t(s.T) * s.C, random_normal(size_t(1) << 20)));
    }
    // Fewest bytes: the backward's gradient counted once, though it is read twice (by position and by token).
    report.bench({.name = "embedding backward", .shape = s.text(kind), .bytes = 2.0 * double(n) + 8.0 * (rows + places),
                  .sets = kSets},
                 [&](int set, cudaStream_t stream) {
                     embedding_backward({.tokens = device_tokens.get(), .dout = activations[set]->get(),
                                         .dwte = dwte[set]->get(), .dwpe = dwpe[set]->get(),
                                         .workspace = workspace.get(), .B = s.B, .T = s.T, .C = s.C, .V = s.V}, stream);
                 });
    report.bench({.name = "embedding forward", .shape = s.text(kind), .bytes = 2.0 * (double(n) + rows + places),
                  .sets = kSets},
                 [&](int set, cudaStream_t stream) {
                     embedding_forward({.tokens = device_tokens.get(), .wte = wte[set]->get(), .wpe = wpe[set]->get(),
                                        .out = activations[set]->get(), .B = s.B, .T = s.T, .C = s.C}, stream);
                 });
}

void benches(Report& report) {
    bench_shape(report, {.B = 64, .T = 1024, .C = 768, .V = 50304}, Tokens::zipf);
    bench_shape(report, {.B = 64, .T = 1024, .C = 768, .V = 50304}, Tokens::uniform);
    bench_shape(report, {.B = 64, .T = 1024, .C = 768, .V = 50304}, Tokens::one);
    bench_shape(report, {.B = 16, .T = 1024, .C = 1600, .V = 50304}, Tokens::zipf);
}
}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "embedding", checks, benches); }
