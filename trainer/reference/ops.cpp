#include "trainer/reference/ops.h"

#include <cmath>

#include "kernels/common/mark.h"
#include "trainer/reference/parallel.h"

namespace reference {
namespace {

constexpr int64_t kColumns = 32;  // columns whose sums over rows are kept at a time

REFERENCE_VECTORIZED void add_range(const float* a, const float* b, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

// body(begin, end) for blocks of at most kColumns columns of (rows, N).
template <typename Body>
void parallel_column_blocks(int64_t rows, int64_t N, const Body& body) {
    parallel_ranges((N + kColumns - 1) / kColumns, grain_for(kColumns * rows), [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) body(block * kColumns, std::min(N, (block + 1) * kColumns));
    });
}

// sums[c] += sum over rows of x[r, c] * factor(r, c), for `cols` <= kColumns columns whose rows are `stride` apart.
// With x_hat: factor = (normalized[r, c] - mean[r]) * rstd[r]; without: 1.
struct ColumnSums {
    const float* x;
    float* sums;
    int64_t stride;
    int rows, cols;
    const float* normalized = nullptr;
    const float* mean = nullptr;
    const float* rstd = nullptr;
};
REFERENCE_VECTORIZED void sum_columns(const ColumnSums& p) {
    double total[kColumns] = {};
    for (int64_t r = 0; r < p.rows; ++r) {
        const float* x = p.x + r * p.stride;
        if (p.normalized) {
            const float* normalized = p.normalized + r * p.stride;
            const float mean = p.mean[r], rstd = p.rstd[r];
            for (int c = 0; c < p.cols; ++c) total[c] += double(x[c]) * double((normalized[c] - mean) * rstd);
        } else {
            for (int c = 0; c < p.cols; ++c) total[c] += double(x[c]);
        }
    }
    for (int c = 0; c < p.cols; ++c) p.sums[c] += float(total[c]);
}

void layernorm_row_forward(const LayerNormForward& p, int64_t row) {
    const float* x = p.x + row * p.C;
    double sum = 0, squares = 0;
    for (int c = 0; c < p.C; ++c) sum += x[c];
    const float mean = float(sum / p.C);
    for (int c = 0; c < p.C; ++c) squares += double(x[c] - mean) * double(x[c] - mean);
    const float rstd = float(1.0 / std::sqrt(squares / p.C + double(p.eps)));
    for (int c = 0; c < p.C; ++c) p.out[row * p.C + c] = (x[c] - mean) * rstd * p.weight[c] + p.bias[c];
    p.mean[row] = mean;
    p.rstd[row] = rstd;
}

void layernorm_row_backward(const LayerNormBackward& p, int64_t row) {
    const float* x = p.x + row * p.C;
    const float* dout = p.dout + row * p.C;
    const float mean = p.mean[row], rstd = p.rstd[row];
    double sum_g = 0, sum_g_xhat = 0;
    for (int c = 0; c < p.C; ++c) {
        const float g = dout[c] * p.weight[c];
        sum_g += g;
        sum_g_xhat += double(g) * double((x[c] - mean) * rstd);
    }
    const float mean_g = float(sum_g / p.C), mean_g_xhat = float(sum_g_xhat / p.C);
    for (int64_t c = 0; c < p.C; ++c) {
        const float before = p.dresidual_in ? p.dresidual_in[row * p.C + c] : 0.0f;
        const float gradient = rstd * (dout[c] * p.weight[c] - mean_g - (x[c] - mean) * rstd * mean_g_xhat);
        p.dresidual_out[row * p.C + c] = before + gradient;
    }
}

// 0.5 (1 + tanh(u)) = sigmoid(2u): one exponential, and no cancellation where u is very negative.
struct Gelu {
    float gate, slope;  // sigmoid(2u), d(2u)/dh
};
Gelu gelu_parts(float h) {
    constexpr float kTwiceSqrtTwoOverPi = 1.5957691216057308f, kCubic = 0.044715f;
    const float twice_u = kTwiceSqrtTwoOverPi * (h + kCubic * h * h * h);
    return {1.0f / (1.0f + std::exp(-twice_u)), kTwiceSqrtTwoOverPi * (1.0f + 3.0f * kCubic * h * h)};
}

void classify_row(const Classifier& p, int64_t row) {
    float* logits = p.logits + row * p.V;
    const int target = p.targets[row];
    if (target < 0) {
        p.losses[row] = 0.0f;
        if (p.with_gradient) std::fill_n(logits, p.V, 0.0f);
        return;
    }
    // A NaN may lose against every maximum, but its exponential then makes the sum NaN.
    float largest = logits[0];
    for (int v = 1; v < p.V; ++v) largest = std::max(largest, logits[v]);
    double sum = 0;
    for (int v = 0; v < p.V; ++v) sum += std::exp(logits[v] - largest);
    const float lse = largest + float(std::log(sum));
    p.losses[row] = lse - logits[target];
    if (!p.with_gradient) return;
    for (int v = 0; v < p.V; ++v) logits[v] = (std::exp(logits[v] - lse) - float(v == target)) * p.gradient_scale;
}

}  // namespace

void add(const float* a, const float* b, float* out, int64_t n) {
    const Mark mark("add");
    parallel_ranges(n, grain_for(1), [&](int64_t begin, int64_t end) { add_range(a + begin, b + begin, out + begin, end - begin); });
}

void add_column_sums(const float* x, float* sums, int rows, int N) {
    const Mark mark("add_column_sums");
    parallel_column_blocks(rows, N, [&](int64_t begin, int64_t end) {
        sum_columns({.x = x + begin, .sums = sums + begin, .stride = N, .rows = rows, .cols = int(end - begin)});
    });
}

// ---------------------------------------------------------------------------------------------------------------------

void embedding_forward(const EmbeddingForward& p) {
    const Mark mark("embedding_forward");
    parallel_ranges(int64_t(p.B) * p.T, grain_for(p.C), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            add_range(p.wte + int64_t(p.tokens[i]) * p.C, p.wpe + i % p.T * p.C, p.out + i * p.C, p.C);
    });
}

// A range of columns walks all rows in order, so equal tokens and equal positions need no care.
void embedding_backward(const EmbeddingBackward& p) {
    const Mark mark("embedding_backward");
    parallel_column_blocks(p.B * p.T, p.C, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < int64_t(p.B) * p.T; ++i) {
            const float* dout = p.dout + i * p.C;
            float* dwte = p.dwte + int64_t(p.tokens[i]) * p.C;
            float* dwpe = p.dwpe + i % p.T * p.C;
            for (int64_t c = begin; c < end; ++c) {
                dwte[c] += dout[c];
                dwpe[c] += dout[c];
            }
        }
    });
}

void layernorm_forward(const LayerNormForward& p) {
    const Mark mark("layernorm_forward");
    parallel_ranges(p.rows, grain_for(4 * p.C), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) layernorm_row_forward(p, row);
    });
}

void layernorm_backward(const LayerNormBackward& p) {
    const Mark mark("layernorm_backward");
    parallel_column_blocks(p.rows, p.C, [&](int64_t begin, int64_t end) {
        const int cols = int(end - begin);
        sum_columns({.x = p.dout + begin, .sums = p.dbias + begin, .stride = p.C, .rows = p.rows, .cols = cols});
        sum_columns({.x = p.dout + begin, .sums = p.dweight + begin, .stride = p.C, .rows = p.rows, .cols = cols,
                     .normalized = p.x + begin, .mean = p.mean, .rstd = p.rstd});
    });
    parallel_ranges(p.rows, grain_for(4 * p.C), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) layernorm_row_backward(p, row);
    });
}

void gelu_forward(const float* h, float* out, int64_t n) {
    const Mark mark("gelu_forward");
    parallel_ranges(n, grain_for(4), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) out[i] = h[i] * gelu_parts(h[i]).gate;
    });
}

void gelu_backward(const float* h, const float* dout, float* dh, int64_t n) {
    const Mark mark("gelu_backward");
    parallel_ranges(n, grain_for(4), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const auto [gate, slope] = gelu_parts(h[i]);
            dh[i] = dout[i] * (gate + h[i] * gate * (1.0f - gate) * slope);
        }
    });
}

void classifier(const Classifier& p) {
    const Mark mark("classifier");
    parallel_ranges(p.rows, grain_for(4 * p.V), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) classify_row(p, row);
    });
}

}  // namespace reference
