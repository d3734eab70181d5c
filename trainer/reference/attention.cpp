// Causal attention, one (sequence, head) a task. Keys and values are transposed once a head, so that every inner loop is
// y += a * x over contiguous elements, which vectorizes without reordering a sum.
#include <cmath>
#include <vector>

#include "kernels/common/mark.h"
#include "trainer/reference/ops.h"
#include "trainer/reference/parallel.h"

namespace reference {
namespace {

// y[0..n) += a * x[0..n)
[[gnu::always_inline]] inline void accumulate(float* y, float a, const float* x, int n) {
    for (int i = 0; i < n; ++i) y[i] += a * x[i];
}

// One head's slices of the packed arrays. Rows of q, k, v are `stride` apart, rows of out `out_stride`.
struct Head {
    const float *q, *k, *v;
    int64_t stride, out_stride;
    int64_t out_offset, qkv_offset, lse_offset;
    int T, D;
    float scale;
};

Head head_of(const AttentionShape& s, const float* qkv, int64_t index) {
    const int64_t b = index / s.H, h = index % s.H, C = int64_t(s.H) * s.head_dim;
    const int64_t offset = b * s.T * 3 * C + h * s.head_dim;
    return {.q = qkv + offset, .k = qkv + offset + C, .v = qkv + offset + 2 * C,
            .stride = 3 * C, .out_stride = C,
            .out_offset = b * s.T * C + h * s.head_dim, .qkv_offset = offset, .lse_offset = index * s.T,
            .T = s.T, .D = s.head_dim, .scale = 1.0f / std::sqrt(float(s.head_dim))};
}

// (T, D) with rows `stride` apart -> (D, T)
std::vector<float> transposed(const float* x, int64_t stride, int T, int D) {
    std::vector<float> out(size_t(T) * size_t(D));
    for (int t = 0; t < T; ++t)
        for (int d = 0; d < D; ++d) out[size_t(d) * size_t(T) + size_t(t)] = x[t * stride + d];
    return out;
}

// products[j] = sum over d of row[d] * matrix[d, j], j < n; matrix is (D, T).
[[gnu::always_inline]] inline void row_times(const float* row, const float* matrix, float* products, int n, int T, int D) {
    for (int j = 0; j < n; ++j) products[j] = 0.0f;
    for (int d = 0; d < D; ++d) accumulate(products, row[d], matrix + int64_t(d) * T, n);
}

REFERENCE_VECTORIZED void head_forward(const Head& head, float* out, float* lse) {
    const int T = head.T, D = head.D;
    const std::vector<float> keys = transposed(head.k, head.stride, T, D);
    std::vector<float> p(static_cast<size_t>(T));
    for (int t = 0; t < T; ++t) {
        row_times(head.q + t * head.stride, keys.data(), p.data(), t + 1, T, D);
        float largest = head.scale * p[0];
        for (int j = 0; j <= t; ++j) p[size_t(j)] *= head.scale, largest = std::max(largest, p[size_t(j)]);
        double sum = 0;
        for (int j = 0; j <= t; ++j) p[size_t(j)] = std::exp(p[size_t(j)] - largest), sum += p[size_t(j)];
        lse[t] = largest + float(std::log(sum));
        float* o = out + t * head.out_stride;
        for (int d = 0; d < D; ++d) o[d] = 0.0f;
        for (int j = 0; j <= t; ++j) accumulate(o, p[size_t(j)], head.v + j * head.stride, D);
        const float inverse_sum = float(1.0 / sum);
        for (int d = 0; d < D; ++d) o[d] *= inverse_sum;
    }
}

struct HeadGradient {
    const float *out, *dout, *lse;
    float *dq, *dk, *dv;
};
REFERENCE_VECTORIZED void head_backward(const Head& head, const HeadGradient& g) {
    const int T = head.T, D = head.D;
    const std::vector<float> keys = transposed(head.k, head.stride, T, D), values = transposed(head.v, head.stride, T, D);
    std::vector<float> p(static_cast<size_t>(T)), ds(static_cast<size_t>(T));
    for (int t = 0; t < T; ++t)
        for (int d = 0; d < D; ++d) g.dq[t * head.stride + d] = g.dk[t * head.stride + d] = g.dv[t * head.stride + d] = 0.0f;
    for (int t = 0; t < T; ++t) {
        const float *q = head.q + t * head.stride, *o = g.out + t * head.out_stride, *dout = g.dout + t * head.out_stride;
        float* dq = g.dq + t * head.stride;
        row_times(q, keys.data(), p.data(), t + 1, T, D);
        row_times(dout, values.data(), ds.data(), t + 1, T, D);  // dP
        double row_sum = 0;
        for (int d = 0; d < D; ++d) row_sum += double(dout[d]) * double(o[d]);
        for (int j = 0; j <= t; ++j) {
            p[size_t(j)] = std::exp(head.scale * p[size_t(j)] - g.lse[t]);
            ds[size_t(j)] = head.scale * p[size_t(j)] * (ds[size_t(j)] - float(row_sum));
        }
        for (int j = 0; j <= t; ++j) {
            accumulate(dq, ds[size_t(j)], head.k + j * head.stride, D);
            accumulate(g.dk + j * head.stride, ds[size_t(j)], q, D);
            accumulate(g.dv + j * head.stride, p[size_t(j)], dout, D);
        }
    }
}

// Element operations of a head, of which most vectorize and a few are exponentials.
int64_t work_of_head(const AttentionShape& s) { return int64_t(s.T) * s.T * (4 + s.head_dim / 8); }

}  // namespace

void attention_forward(const AttentionForward& p) {
    const Mark mark("attention_forward");
    parallel_ranges(int64_t(p.shape.B) * p.shape.H, grain_for(work_of_head(p.shape)), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
            const Head head = head_of(p.shape, p.qkv, index);
            head_forward(head, p.out + head.out_offset, p.lse + head.lse_offset);
        }
    });
}

void attention_backward(const AttentionBackward& p) {
    const Mark mark("attention_backward");
    const int64_t C = int64_t(p.shape.H) * p.shape.head_dim;
    parallel_ranges(int64_t(p.shape.B) * p.shape.H, grain_for(work_of_head(p.shape)), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
            const Head head = head_of(p.shape, p.qkv, index);
            float* dq = p.dqkv + head.qkv_offset;
            head_backward(head, {.out = p.out + head.out_offset, .dout = p.dout + head.out_offset,
                                 .lse = p.lse + head.lse_offset, .dq = dq, .dk = dq + C, .dv = dq + 2 * C});
        }
    });
}

}  // namespace reference
