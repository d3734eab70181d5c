#include "dev/parts/attention/reference.h"

#include "kernels/common/cuda_check.h"

namespace {

using bf16 = __nv_bfloat16;

class Doubles {  // device memory
  public:
    explicit Doubles(size_t n) : n_(n) { CUDA_CHECK(cudaMalloc(&p_, n * sizeof(double))); }
    ~Doubles() { cudaFree(p_); }
    Doubles(const Doubles&) = delete;
    Doubles& operator=(const Doubles&) = delete;
    double* get() const { return p_; }
    std::vector<double> download() const {
        std::vector<double> host(n_);
        CUDA_CHECK(cudaMemcpy(host.data(), p_, n_ * sizeof(double), cudaMemcpyDeviceToHost));
        return host;
    }

  private:
    double* p_ = nullptr;
    size_t n_;
};

// Where things are. `head` counts B * H query heads; the packed row holds q, k and v heads side by side.
struct Index {
    AttentionShape s;

    __device__ size_t packed(int b, int t, int packed_head) const {
        return ((size_t(b) * s.T + t) * (s.H + 2 * s.KV) + packed_head) * s.head_dim;
    }
    __device__ size_t q(int head, int t) const { return packed(head / s.H, t, head % s.H); }
    __device__ size_t k(int head, int t) const { return packed(head / s.H, t, s.H + kv(head)); }
    __device__ size_t v(int head, int t) const { return packed(head / s.H, t, s.H + s.KV + kv(head)); }
    __device__ size_t out(int head, int t) const { return ((size_t(head / s.H) * s.T + t) * s.H + head % s.H) * s.head_dim; }
    __device__ size_t score(int head, int i, int j) const { return (size_t(head) * s.T + i) * s.T + j; }
    __device__ int kv(int head) const { return head % s.H / (s.H / s.KV); }
};

template <class A, class B>
__device__ double dot(const A* a, const B* b, int n) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += double(a[i]) * double(b[i]);
    return sum;
}

constexpr int kSide = 16;

// S = scale * Q K^T where the key is not past the query
__global__ void score_kernel(Index at, const bf16* qkv, double scale, double* s) {
    const int j = blockIdx.x * kSide + threadIdx.x, i = blockIdx.y * kSide + threadIdx.y, head = blockIdx.z;
    if (i < at.s.T && j <= i) s[at.score(head, i, j)] = scale * dot(qkv + at.q(head, i), qkv + at.k(head, j), at.s.head_dim);
}

// One thread a row: LSE, then S becomes P
__global__ void softmax_kernel(Index at, const float* stored_lse, double* s, double* lse) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y;
    if (i >= at.s.T) return;
    double* row = s + at.score(head, i, 0);
    double log_sum = 0;
    if (stored_lse) {
        log_sum = stored_lse[size_t(head) * at.s.T + i];
    } else {
        double top = row[0], sum = 0;
        for (int j = 1; j <= i; ++j) top = fmax(top, row[j]);
        for (int j = 0; j <= i; ++j) sum += exp(row[j] - top);
        log_sum = top + log(sum);
    }
    for (int j = 0; j <= i; ++j) row[j] = exp(row[j] - log_sum);
    lse[size_t(head) * at.s.T + i] = log_sum;
}

// Block (i, head), thread = column: O = P V, or dQ = scale * dS K
__global__ void query_sum_kernel(Index at, const double* weights, const bf16* qkv, bool gradient, double scale, double* to) {
    const int i = blockIdx.x, head = blockIdx.y, column = threadIdx.x;
    double sum = 0;
    for (int j = 0; j <= i; ++j)
        sum += weights[at.score(head, i, j)] * double(qkv[(gradient ? at.k(head, j) : at.v(head, j)) + column]);
    to[(gradient ? at.q(head, i) : at.out(head, i)) + column] = scale * sum;
}

// delta = rowsum(dO * O)
template <class Out>
__global__ void delta_kernel(Index at, const bf16* dout, const Out* out, double* delta) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y;
    if (i < at.s.T) delta[size_t(head) * at.s.T + i] = dot(dout + at.out(head, i), out + at.out(head, i), at.s.head_dim);
}

// dS = P * (dO V^T - delta)
__global__ void score_gradient_kernel(Index at, const bf16* qkv, const bf16* dout, const double* p, const double* delta,
                                      double* ds) {
    const int j = blockIdx.x * kSide + threadIdx.x, i = blockIdx.y * kSide + threadIdx.y, head = blockIdx.z;
    if (i >= at.s.T || j > i) return;
    const double dp = dot(dout + at.out(head, i), qkv + at.v(head, j), at.s.head_dim);
    ds[at.score(head, i, j)] = p[at.score(head, i, j)] * (dp - delta[size_t(head) * at.s.T + i]);
}

// Block (j, b * KV + kv), thread = column: dK = scale * dS^T Q and dV = P^T dO, over the query heads of the group
__global__ void key_sum_kernel(Index at, const bf16* qkv, const bf16* dout, const double* p, const double* ds, double scale,
                               double* dqkv) {
    const int j = blockIdx.x, b = blockIdx.y / at.s.KV, kv = blockIdx.y % at.s.KV, column = threadIdx.x;
    const int group = at.s.H / at.s.KV, first = b * at.s.H + kv * group;
    double dk = 0, dv = 0;
    for (int head = first; head < first + group; ++head)
        for (int i = j; i < at.s.T; ++i) {
            dk += ds[at.score(head, i, j)] * double(qkv[at.q(head, i) + column]);
            dv += p[at.score(head, i, j)] * double(dout[at.out(head, i) + column]);
        }
    dqkv[at.k(first, j) + column] = scale * dk;
    dqkv[at.v(first, j) + column] = dv;
}

}  // namespace

AttentionReference attention_reference(const AttentionShape& s, const bf16* qkv, const bf16* dout, StoredForward stored) {
    const Index at{s};
    const size_t rows = size_t(s.B) * s.T, heads = size_t(s.B) * s.H;
    const double scale = 1 / std::sqrt(double(s.head_dim));
    const unsigned tiles = unsigned((s.T + kSide - 1) / kSide), n = unsigned(s.T), n_heads = unsigned(heads);
    const dim3 score_grid(tiles, tiles, n_heads), score_block(kSide, kSide);
    const dim3 row_grid((n + 127) / 128, n_heads);
    Doubles p(heads * n * n), ds(heads * n * n), lse(heads * n), delta(heads * n);
    Doubles out(rows * s.H * s.head_dim), dqkv(rows * (s.H + 2 * s.KV) * s.head_dim);

    score_kernel<<<score_grid, score_block>>>(at, qkv, scale, p.get());
    softmax_kernel<<<row_grid, 128>>>(at, stored.lse, p.get(), lse.get());
    if (stored.out) {
        delta_kernel<<<row_grid, 128>>>(at, dout, stored.out, delta.get());
    } else {
        query_sum_kernel<<<dim3(n, n_heads), s.head_dim>>>(at, p.get(), qkv, false, 1.0, out.get());
        delta_kernel<<<row_grid, 128>>>(at, dout, static_cast<const double*>(out.get()), delta.get());
    }
    score_gradient_kernel<<<score_grid, score_block>>>(at, qkv, dout, p.get(), delta.get(), ds.get());
    query_sum_kernel<<<dim3(n, n_heads), s.head_dim>>>(at, ds.get(), qkv, true, scale, dqkv.get());
    key_sum_kernel<<<dim3(n, unsigned(s.B) * s.KV), s.head_dim>>>(at, qkv, dout, p.get(), ds.get(), scale, dqkv.get());
    CUDA_CHECK_LAUNCH();
    CUDA_CHECK(cudaDeviceSynchronize());
    if (stored.out) return {.dqkv = dqkv.download()};
    return {.out = out.download(), .lse = lse.download(), .dqkv = dqkv.download()};
}
