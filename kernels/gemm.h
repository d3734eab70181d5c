// Matrix multiplication through cuBLASLt, autotuned once per shape.
//
//   D (M, N) = A (M, K) * B (N, K)^T  [+ bias (N)]  [+ D]           row-major, accumulated in FP32
//
// An operand is either `row_k` (stored as written above: K contiguous) or `col_k` (stored transposed: A as (K, M),
// B as (K, N)). FP8 operands must be row_k (Hopper's FP8 tensor cores take no other layout) and carry a device pointer
// to their dequantization scale (QuantSlot::inv_scale). So for a linear y = x W^T, x (tokens, in), W (out, in):
//
//   forward      y  (tokens, out) = x (tokens,in) row_k  * W (out,in) row_k
//   grad_input   dx (tokens, in)  = dy (tokens,out) row_k * W^T: BF16 B = W (out,in) col_k; FP8 B = Wt (in,out) row_k
//   grad_weight  dW (out, in)     = BF16: A = dy (tokens,out) col_k, B = x (tokens,in) col_k;
//                                   FP8:  A = dyt (out,tokens) row_k, B = xt (in,tokens) row_k
//
// Constraints (checked, with the values): FP8: K % 16 == 0, N % 16 == 0, one of A, B is E4M3. BF16: any dimension for
// which cuBLASLt has an algorithm, multiples of 8 for speed. Every pointer is 16-byte aligned; a scale or a bias is
// given exactly when the shape has one. D is BF16 or FP32; accumulate (beta = 1) in place; a bias is BF16, as its D.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/common/dtype.h"

enum class Layout : uint8_t { row_k, col_k };

struct GemmShape {
    int M, N, K;
    Dtype a, b, d;
    Layout layout_a = Layout::row_k, layout_b = Layout::row_k;
    bool bias = false;
    bool accumulate = false;
    bool fast_accumulation = false;  // FP8 only: partial sums stay in the tensor core's short accumulator
    std::string key() const;         // canonical text, e.g. "65536x2304x768 e4m3*e4m3>bf16 row row bias fast"
    friend bool operator==(const GemmShape&, const GemmShape&) = default;
};

struct GemmOperands {
    const void* a;
    const void* b;
    void* d;
    const float* a_scale = nullptr;        // FP8 only: &slot.inv_scale
    const float* b_scale = nullptr;
    const __nv_bfloat16* bias = nullptr;   // (N)
};

struct GemmChoice {       // what autotuning found, for the log and the checkpoint
    std::string key;
    int algorithm;        // index in the heuristic's list
    int candidates;
    float us;             // best measured time, or 0 when nothing was measured (from the cache, or no autotuning)
    float first_us;       // time of the heuristic's first choice that runs, or 0
    bool from_cache;
    bool pinned = false;  // from the record of another run
};

// Owns the cuBLASLt handle, the workspace and the plans. plan() (setup, may allocate and synchronize) must have been
// called for a shape before run(); run() only enqueues, is capturable and allocates nothing. One stream at a time.
class Gemm {
  public:
    struct Options {
        std::string cache_file;       // "" = no cache. Keyed by cuBLASLt version, device name and shape
        bool autotune = true;         // false: take the heuristic's first algorithm
        std::string pinned;           // record() of another run: its choices come before the cache and before tuning
    };
    explicit Gemm(const Options& options);
    ~Gemm();

    void plan(const GemmShape& shape);  // tuning allocates operands of this shape and frees them before it returns
    void run(const GemmShape& shape, const GemmOperands& operands, cudaStream_t stream);

    const std::vector<GemmChoice>& choices() const;
    // The choices of all plans, one line each: what a checkpoint keeps and `pinned` takes.
    std::string record() const;
    // "", or how many shapes `pinned` has no choice for, and whose it is: such shapes may give other bits.
    std::string pin_failure() const;

    // Atomically, into a folder that it makes, and with what other devices, versions and processes have put into the file since it was read. A cache
    // that cannot be written is a warning, not an error; without a cache_file this does nothing.
    void save_cache() const;
    static size_t workspace_bytes();

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};
