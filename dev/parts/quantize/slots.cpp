#include "dev/parts/quantize/slots.h"

#include <bit>
#include <cmath>

#include "trainer/reference/quantizer.h"

namespace {
bool same_number(float a, float b) {
    return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}
}  // namespace

QuantSlot measured_slot(float amax) {
    return {.inv_scale = kNan, .scale = kNan, .amax_bits = std::bit_cast<uint32_t>(amax), .unused = 0x12345678u};
}
bool slot_is_right(const QuantSlot& slot, float amax, Dtype format) {
    const float scale = scale_from_amax(amax, format);
    return same_number(slot.scale, scale) && same_number(slot.inv_scale, 1.0f / scale) &&
           slot.amax_bits == std::bit_cast<uint32_t>(amax) && slot.unused == 0x12345678u;
}

std::vector<float> rounding_edges(Dtype format) {
    std::vector<float> edges = {0.0f, -0.0f, 1e-45f, 1e30f, kInfinity, -kInfinity, kNan};
    for (int code = 0; code < 256; code++) {
        const float value = decode_fp8(uint8_t(code), format), next = decode_fp8(uint8_t(code + 1), format);
        if (!std::isfinite(value)) continue;
        for (const float center : {value, std::isfinite(next) ? (value + next) / 2 : value})
            for (const float x : {center, std::nextafter(center, kInfinity), std::nextafter(center, -kInfinity)})
                edges.push_back(x);
    }
    return edges;
}
