// Scale of one tensorwise-quantized tensor, in device memory. Convention: q = cast(x * scale), x ~ q * inv_scale.
#pragma once
#include <cstdint>

struct alignas(16) QuantSlot {
    float inv_scale;     // at offset 0 and 16-byte aligned: cuBLASLt reads it through A/B_SCALE_POINTER, and versions
                         // before 13.1.1 want scalar scale pointers on 16 bytes
    float scale;         // fp8_max / max(amax, kAmaxEpsilon), divided in double, stored as float
    uint32_t amax_bits;  // bits of max(|x|): as unsigned integers, non-negative floats keep their order, inf sorts
                         // above every finite value and NaN above inf, so an integer max never hides either
    uint32_t unused;
};
static_assert(sizeof(QuantSlot) == 16);
