// The kernels of trainer/gpu_parameters in plain C++, by their headers' contracts, enqueued on the streams of streams.h. Tables are
// read when the work runs, as on a GPU. Their arithmetic need not be the GPU's; it is the same for one rank and many.
#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/accumulate.h"
#include "kernels/adamw.h"
#include "kernels/common/check.h"
#include "kernels/global_norm.h"
#include "kernels/quantize.h"
#include "tests/fake_gpu/streams.h"
#include "trainer/reference/quantizer.h"

using fake_gpu::enqueue;

namespace {

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

float value_of(__nv_bfloat16 x) {
    return bf16_value(std::bit_cast<uint16_t>(x));
}
__nv_bfloat16 rounded(float x) {
    return std::bit_cast<__nv_bfloat16>(bf16_bits(x));
}

bool skips(const uint32_t* skip) { return skip != nullptr && *skip != 0; }

void set_scale(QuantSlot& slot, Dtype format, uint32_t* nonfinite) {
    const float amax = std::bit_cast<float>(slot.amax_bits);
    if (!std::isfinite(amax) && nonfinite != nullptr) *nonfinite = 1;
    slot.scale = scale_from_amax(amax, format);
    slot.inv_scale = 1.0f / slot.scale;
}

void follow_masters(const AdamWUpdate& p, const AdamWTensor& t) {
    for (int64_t i = 0; i < t.count; ++i) {
        const float x = p.params[t.offset + i];
        if (t.bf16_copy != nullptr) t.bf16_copy[i] = rounded(x);
        if (t.slot != nullptr) t.slot->amax_bits = std::max(t.slot->amax_bits, std::bit_cast<uint32_t>(std::fabs(x)));
    }
}

}  // namespace

void accumulate(const Accumulate& p, cudaStream_t stream) {
    REQUIRE(aligned(p.sum) && aligned(p.add), "accumulate: pointers must be 16-byte aligned");
    enqueue(stream, [=] {
        for (int part = 0; part < p.parts; ++part)
            for (int64_t i = 0; i < p.n; ++i) {
                const int64_t at = part * p.stride + i;
                const float x = p.dtype == Dtype::f32 ? static_cast<const float*>(p.add)[at] : value_of(static_cast<const __nv_bfloat16*>(p.add)[at]);
                p.sum[i] = p.add_to_sum || part > 0 ? p.sum[i] + x : x;
            }
    });
}

void round_to_bf16(const float* x, __nv_bfloat16* y, int64_t n, cudaStream_t stream) {
    REQUIRE(aligned(x) && aligned(y), "round_to_bf16: pointers must be 16-byte aligned");
    enqueue(stream, [=] { std::transform(x, x + n, y, rounded); });
}

int global_norm_partials() { return 16; }

void sum_of_squares(const float* x, int64_t n, float* partials, cudaStream_t stream) {
    REQUIRE(n % 4 == 0 && aligned(x), "sum_of_squares: n=%lld", static_cast<long long>(n));
    enqueue(stream, [=] {
        for (int part = 0; part < global_norm_partials(); ++part) {
            double sum = 0;
            for (int64_t i = part; i < n; i += global_norm_partials()) sum += double(x[i]) * double(x[i]);
            partials[part] = float(sum);
        }
    });
}

void fold_partials(const float* partials, int n, float* folded, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int part = 0; part < kFoldedPartials; ++part) {
            double sum = 0;
            for (int i = part; i < n; i += kFoldedPartials) sum += double(partials[i]);
            folded[part] = float(sum);
        }
    });
}

int adamw_plan(AdamWTensor* tensors, int count) {
    for (int i = 0; i < count; ++i) {
        const AdamWTensor& t = tensors[i];
        REQUIRE(t.offset >= 0 && t.offset % 64 == 0 && t.grad_offset >= 0 && t.grad_offset % 4 == 0 && t.count > 0 && reinterpret_cast<uintptr_t>(t.bf16_copy) % 8 == 0,
                "adamw: tensor %d: offset=%lld, grad_offset=%lld, count=%lld", i, static_cast<long long>(t.offset), static_cast<long long>(t.grad_offset), static_cast<long long>(t.count));
    }
    return count;
}

void optimizer_prepare(const OptimizerPrepare& p, cudaStream_t stream) {
    enqueue(stream, [=] {
        StepState& state = *p.state;
        double sum = 0;
        for (int i = 0; i < p.n_partials; ++i) sum += double(p.norm_partials[i]);
        state.grad_norm = float(std::sqrt(sum));
        if (!std::isfinite(state.grad_norm) || !std::isfinite(state.loss_sum)) state.nonfinite = 1;
        state.skip_update = state.nonfinite != 0 || state.loss_sum > state.in.loss_limit;
        if (state.skip_update) {
            ++state.skipped_steps;
            return;
        }
        ++state.adam_t;
        for (int i = 0; i < p.n_tensors; ++i)
            if (p.tensors[i].slot != nullptr) p.tensors[i].slot->amax_bits = 0;
    });
}

// No clipping, no bias correction: every element's result depends on its own history alone.
void adamw_update(const AdamWUpdate& p, cudaStream_t stream) {
    enqueue(stream, [=] {
        if (p.state->skip_update) return;
        for (int k = 0; k < p.n_tensors; ++k) {
            const AdamWTensor& t = p.tensors[k];
            for (int64_t i = 0; i < t.count; ++i) {
                const float g = p.grads[t.grad_offset + i];
                float &x = p.params[t.offset + i], &m = p.m[t.offset + i], &v = p.v[t.offset + i];
                m = 0.9f * m + 0.1f * g;
                v = 0.95f * v + 0.05f * g * g;
                x = x * (1 - 0.01f * t.weight_decay) - 0.01f * m / (std::sqrt(v) + 1e-3f);
            }
            follow_masters(p, t);
        }
    });
}

void adamw_refresh_copies(const AdamWUpdate& p, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int k = 0; k < p.n_tensors; ++k) follow_masters(p, p.tensors[k]);
    });
}

int64_t quantize_weights_plan(QuantizeWeight*, int count) { return count; }

void quantize_weights(const QuantizeWeight* weights, int count, int64_t, Dtype format, const uint32_t* skip, uint32_t* nonfinite, cudaStream_t stream) {
    enqueue(stream, [=] {
        if (skips(skip)) return;
        for (int k = 0; k < count; ++k) {
            const QuantizeWeight& w = weights[k];
            set_scale(*w.slot, format, nonfinite);
            for (int64_t row = 0; row < w.N; ++row)
                for (int64_t column = 0; column < w.K; ++column) w.qt[column * w.N + row] = w.q[row * w.K + column] = encode_fp8(w.master[row * w.K + column] * w.slot->scale, format);
        }
    });
}

void quantize_scales(QuantSlot* slots, int count, Dtype format, const uint32_t* skip, uint32_t* nonfinite, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int i = 0; i < count && !skips(skip); ++i) set_scale(slots[i], format, nonfinite);
    });
}

int64_t quantize_pieces_plan(QuantizePiece* pieces, int count) {
    for (int i = 0; i < count; ++i) REQUIRE(pieces[i].count > 0, "quantize_pieces: piece %d has no elements", i);
    return count;
}

void quantize_pieces(const QuantizePiece* pieces, int count, int64_t, Dtype format, const uint32_t* skip, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int k = 0; k < count && !skips(skip); ++k)
            for (int64_t i = 0; i < pieces[k].count; ++i) pieces[k].q[i] = encode_fp8(pieces[k].master[i] * pieces[k].slot->scale, format);
    });
}

int64_t transpose_codes_plan(TransposeCodes* matrices, int count) {
    for (int i = 0; i < count; ++i) REQUIRE(matrices[i].q != matrices[i].qt, "transpose_codes: matrix %d: qt must not be q", i);
    return count;
}

void transpose_codes(const TransposeCodes* matrices, int count, int64_t, const uint32_t* skip, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int k = 0; k < count && !skips(skip); ++k)
            for (int64_t row = 0; row < matrices[k].N; ++row)
                for (int64_t column = 0; column < matrices[k].K; ++column) matrices[k].qt[column * matrices[k].N + row] = matrices[k].q[row * matrices[k].K + column];
    });
}
