// AdamW over all parameters in one launch, the scalars it needs, and the copies that follow new weights.
//
// An update moves 28 bytes a parameter (reads p, g, m, v; writes p, m, v), 30 with a BF16 copy, and is bound by them.
// Every block owns 4096 elements of one tensor and finds the tensor in the table by counting those that start at or
// before it, all threads at once. A thread has eight 16-byte loads in flight.
//
// Order of operations, torch.optim.AdamW's (decay first, on the old weight; then the step):
//   p' = p * (1 - lr * decay);   p'' = p' - (lr / (1 - b1^t)) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
// in float, with sqrt(v) / sqrt(1 - b2^t) as a multiplication by the reciprocal: a few ulp of the step from torch.
// 1 - b1 and 1 - b2 are exact differences of the float betas, and the bias corrections derive from the same floats.
#include "kernels/adamw.h"

#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/mark.h"

namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 2;        // vectors of each array in flight a thread
constexpr int kRounds = 2;
constexpr int kBlockElements = kThreads * 4 * kLoads * kRounds;

// ---------------------------------------------------------------------------------------------------------------------
// The step's scalars

constexpr int kPrepareThreads = 1024;

__global__ void __launch_bounds__(kPrepareThreads) optimizer_prepare_kernel(const OptimizerPrepare p) {
    // Fixed order: a thread's partials in order, then halving.
    __shared__ double sums[kPrepareThreads];
    double sum = 0.0;
    for (int i = threadIdx.x; i < p.n_partials; i += kPrepareThreads) sum += double(p.norm_partials[i]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kPrepareThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }

    __shared__ bool skip;
    if (threadIdx.x == 0) {
        StepState& state = *p.state;
        const float norm = float(sqrt(sums[0]));
        state.grad_norm = norm;
        if (!isfinite(norm) || !isfinite(state.loss_sum)) state.nonfinite = 1;
        skip = state.nonfinite != 0 || state.loss_sum > state.in.loss_limit || norm > state.in.grad_norm_limit;
        state.skip_update = skip;
        const float limit = p.config.max_grad_norm;
        state.clip_scale = limit > 0.0f ? fminf(1.0f, limit / (norm + 1e-6f)) : 1.0f;
        if (skip) {
            state.skipped_steps += 1;
        } else {
            const double t = double(state.adam_t += 1);
            state.bias_correction1 = float(1.0 - pow(double(p.config.beta1), t));
            state.bias_correction2 = float(1.0 - pow(double(p.config.beta2), t));
        }
    }
    __syncthreads();
    if (skip) return;
    for (int i = threadIdx.x; i < p.n_tensors; i += kPrepareThreads)
        if (p.tensors[i].slot != nullptr) p.tensors[i].slot->amax_bits = 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// The update

// Up to four elements: all by one access, or the `count` that are left (negative: none). Padding is not touched.
__device__ __forceinline__ F32x4 load_up_to_4(const float* from, int64_t count) {
    if (count >= 4) return load<F32x4>(from);
    F32x4 v{};
#pragma unroll
    for (int j = 0; j < 3; ++j)
        if (j < count) v[j] = from[j];
    return v;
}
__device__ __forceinline__ void store_up_to_4(float* to, const F32x4& v, int64_t count) {
    if (count >= 4) return store(to, v);
#pragma unroll
    for (int j = 0; j < 3; ++j)
        if (j < count) to[j] = v[j];
}
__device__ __forceinline__ void store_bf16_up_to_4(bf16* to, const F32x4& v, int64_t count) {
    const Vec<bf16, 4> rounded{{__float2bfloat16_rn(v[0]), __float2bfloat16_rn(v[1]), __float2bfloat16_rn(v[2]),
                                __float2bfloat16_rn(v[3])}};
    if (count >= 4) return store(to, rounded);
#pragma unroll
    for (int j = 0; j < 3; ++j)
        if (j < count) to[j] = rounded[j];
}

struct Coefficients {
    float clip_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
    float keep;            // 1 - lr * decay
    float step;            // lr / (1 - b1^t)
    float inverse_sqrt_correction2;
};

__device__ __forceinline__ void update(const Coefficients& c, float& p, float g, float& m, float& v) {
    g *= c.clip_scale;
    m = fmaf(c.beta1, m, c.one_minus_beta1 * g);
    v = fmaf(c.beta2, v, c.one_minus_beta2 * g * g);
    const float denominator = fmaf(sqrtf(v), c.inverse_sqrt_correction2, c.eps);
    p = fmaf(-c.step, m / denominator, p * c.keep);
}

// kUpdate: the AdamW step. Otherwise only what follows from the weights: BF16 copies and amaxes.
template <bool kUpdate>
__global__ void __launch_bounds__(kThreads, 3) adamw_kernel(const AdamWUpdate p) {
    if (kUpdate && p.state->skip_update != 0) return;
    int started = 0;  // tensors that start at or before this block; the last of them is the block's
    for (int base = 0; base < p.n_tensors; base += kThreads) {
        const int i = base + threadIdx.x;
        started += __syncthreads_count(i < p.n_tensors && p.tensors[i].first_block <= int(blockIdx.x));
    }
    const AdamWTensor tensor = p.tensors[started - 1];
    if (!kUpdate && tensor.bf16_copy == nullptr && tensor.slot == nullptr) return;

    Coefficients c{};
    if constexpr (kUpdate) {
        const StepState& state = *p.state;
        const float learning_rate = state.in.learning_rate;
        c = {.clip_scale = state.clip_scale,
             .beta1 = p.config.beta1,
             .one_minus_beta1 = 1.0f - p.config.beta1,
             .beta2 = p.config.beta2,
             .one_minus_beta2 = 1.0f - p.config.beta2,
             .eps = p.config.eps,
             .keep = 1.0f - learning_rate * tensor.weight_decay,
             .step = learning_rate / state.bias_correction1,
             .inverse_sqrt_correction2 = 1.0f / sqrtf(state.bias_correction2)};
    }

    uint32_t most = 0;
    const int64_t first = int64_t(int(blockIdx.x) - tensor.first_block) * kBlockElements + threadIdx.x * 4;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
        F32x4 weight[kLoads], grad[kLoads], m[kLoads], v[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int64_t i = first + (round * kLoads + k) * kThreads * 4, left = tensor.count - i;
            const int64_t at = tensor.offset + i;
            weight[k] = load_up_to_4(p.params + at, left);
            if constexpr (kUpdate) {
                grad[k] = load_up_to_4(p.grads + tensor.grad_offset + i, left);
                m[k] = load_up_to_4(p.m + at, left);
                v[k] = load_up_to_4(p.v + at, left);
            }
        }
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int64_t i = first + (round * kLoads + k) * kThreads * 4, left = tensor.count - i;
            const int64_t at = tensor.offset + i;
            if constexpr (kUpdate) {
#pragma unroll
                for (int j = 0; j < 4; ++j) update(c, weight[k][j], grad[k][j], m[k][j], v[k][j]);
                store_up_to_4(p.params + at, weight[k], left);
                store_up_to_4(p.m + at, m[k], left);
                store_up_to_4(p.v + at, v[k], left);
            }
            if (tensor.bf16_copy != nullptr) store_bf16_up_to_4(tensor.bf16_copy + i, weight[k], left);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j < left) most = max(most, amax_bits(weight[k][j]));
        }
    }
    if (tensor.slot != nullptr) block_amax_to_slot(most, tensor.slot);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

int adamw_plan(AdamWTensor* tensors, int count) {
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) {
        AdamWTensor& t = tensors[i];
        REQUIRE(t.offset >= 0 && t.offset % 64 == 0, "adamw: tensor %d: offset=%lld must be a multiple of 64", i,
                static_cast<long long>(t.offset));
        REQUIRE(t.grad_offset >= 0 && t.grad_offset % 4 == 0, "adamw: tensor %d: grad_offset=%lld must be a multiple of 4", i,
                static_cast<long long>(t.grad_offset));
        REQUIRE(t.count > 0, "adamw: tensor %d: count=%lld must be positive", i, static_cast<long long>(t.count));
        REQUIRE(reinterpret_cast<uintptr_t>(t.bf16_copy) % 8 == 0,
                "adamw: tensor %d: bf16_copy=%p must be 8-byte aligned", i, static_cast<void*>(t.bf16_copy));
        t.first_block = static_cast<int>(blocks);
        blocks += ceil_div(t.count, kBlockElements);
        REQUIRE(blocks < (int64_t(1) << 31), "adamw: tensor %d: too many elements", i);
    }
    return static_cast<int>(blocks);
}

void optimizer_prepare(const OptimizerPrepare& p, cudaStream_t stream) {
    const Mark mark("optimizer_prepare");
    REQUIRE(p.state != nullptr && p.n_partials >= 0 && p.n_tensors >= 0,
            "optimizer_prepare: needs a state; n_partials=%d, n_tensors=%d must not be negative", p.n_partials,
            p.n_tensors);
    optimizer_prepare_kernel<<<1, kPrepareThreads, 0, stream>>>(p);
    CUDA_CHECK_LAUNCH();
}

void adamw_update(const AdamWUpdate& p, cudaStream_t stream) {
    // Four arrays read and three written; the last block of a tensor counts as full, the BF16 copies do not.
    const Mark mark("adamw_update", {.bytes = 28.0 * p.blocks * kBlockElements});
    REQUIRE(aligned(p.params) && aligned(p.grads) && aligned(p.m) && aligned(p.v),
            "adamw_update: params=%p, grads=%p, m=%p, v=%p must be 16-byte aligned", static_cast<const void*>(p.params),
            static_cast<const void*>(p.grads), static_cast<const void*>(p.m), static_cast<const void*>(p.v));
    REQUIRE(p.state != nullptr && p.blocks >= p.n_tensors && p.n_tensors >= 0,
            "adamw_update: needs a state and the plan's blocks (n_tensors=%d, blocks=%d)", p.n_tensors, p.blocks);
    if (p.blocks == 0) return;
    adamw_kernel<true><<<static_cast<unsigned>(p.blocks), kThreads, 0, stream>>>(p);
    CUDA_CHECK_LAUNCH();
}

void adamw_refresh_copies(const AdamWUpdate& p, cudaStream_t stream) {
    REQUIRE(aligned(p.params), "adamw_refresh_copies: params=%p must be 16-byte aligned",
            static_cast<const void*>(p.params));
    REQUIRE(p.blocks >= p.n_tensors && p.n_tensors >= 0,
            "adamw_refresh_copies: needs the plan's blocks (n_tensors=%d, blocks=%d)", p.n_tensors, p.blocks);
    if (p.blocks == 0) return;
    adamw_kernel<false><<<static_cast<unsigned>(p.blocks), kThreads, 0, stream>>>(p);
    CUDA_CHECK_LAUNCH();
}
