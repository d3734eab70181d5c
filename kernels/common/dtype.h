// Number formats: the only place where their limits and bit patterns are written down.
// Host only; device code takes the constants from here as template or constexpr values.
#pragma once
#include <cstddef>
#include <cstdint>

enum class Dtype : uint8_t { f32, bf16, e4m3, e5m2 };

constexpr size_t bytes_of(Dtype t) { return t == Dtype::f32 ? 4 : t == Dtype::bf16 ? 2 : 1; }
constexpr bool is_fp8(Dtype t) { return t == Dtype::e4m3 || t == Dtype::e5m2; }
constexpr const char* name_of(Dtype t) {
    return t == Dtype::f32 ? "f32" : t == Dtype::bf16 ? "bf16" : t == Dtype::e4m3 ? "e4m3" : "e5m2";
}

// Largest finite value of an FP8 format (OCP 8-bit specification; E4M3 is the "fn" variant without infinities).
constexpr float kE4M3Max = 448.0f;
constexpr float kE5M2Max = 57344.0f;
constexpr float fp8_max(Dtype t) { return t == Dtype::e4m3 ? kE4M3Max : kE5M2Max; }

// The code both FP8 formats store for NaN (the sign of a NaN is dropped, as cvt.rn.satfinite does).
constexpr uint8_t kFp8Nan = 0x7f;

// amax is clamped from below to this before the division, so an all-zero tensor has a finite scale (torchao's EPS).
constexpr double kAmaxEpsilon = 1e-12;
