// What the checks of all casts share: formats, slots, values that decide a rounding, large buffers.
#pragma once
#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "dev/harness.h"
#include "kernels/common/dtype.h"
#include "kernels/common/quant_slot.h"

constexpr Dtype kFormats[] = {Dtype::e4m3, Dtype::e5m2};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline std::string shape_text(int64_t rows, int64_t cols) { return message("%lldx%lld", (long long)rows, (long long)cols); }

// A slot as the amax pass leaves it: scale and inv_scale unset.
QuantSlot measured_slot(float amax);
// Scale and reciprocal as the host computes them; nothing else of the slot may have changed.
bool slot_is_right(const QuantSlot& slot, float amax, Dtype format);

// Values that decide a rounding when the scale is 1: codes, midpoints, and the floats on both sides of each.
std::vector<float> rounding_edges(Dtype format);

// A large random tensor: a few million random numbers over and over.
template <class T>
std::unique_ptr<DeviceBuffer<T>> filled(size_t n, const std::vector<T>& pool) {
    auto buffer = std::make_unique<DeviceBuffer<T>>(n);
    for (size_t at = 0; at < n; at += pool.size())
        CUDA_CHECK(cudaMemcpy(buffer->get() + at, pool.data(), std::min(pool.size(), n - at) * sizeof(T),
                              cudaMemcpyHostToDevice));
    return buffer;
}
