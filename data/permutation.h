// A keyed random permutation of [0, n) that needs no array: its value at any index is computed on its own, which is what
// makes a batch a pure function of its step. A Feistel network permutes [0, 4^b) >= n; values outside [0, n) are sent
// through again until they fall inside (cycle walking), less than 4 times on average for n > 16.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

#include "data/hash.h"
#include "kernels/common/check.h"

class Permutation {
  public:
    Permutation(int64_t n, uint64_t key) : n_(static_cast<uint64_t>(n)) {
        REQUIRE(n >= 1, "permutation: n=%lld must be at least 1", static_cast<long long>(n));
        half_bits_ = std::max(kMinHalfBits, (static_cast<int>(std::bit_width(n_ - 1)) + 1) / 2);
        for (uint64_t& round_key : round_keys_) round_key = key = mix64(key);
    }

    int64_t operator()(int64_t index) const {
        auto value = static_cast<uint64_t>(index);
        do value = feistel(value);
        while (value >= n_);
        return static_cast<int64_t>(value);
    }

  private:
    // Halves of 1 bit mix too little to shuffle a handful of samples; 3 bits cost at most 64 walks, at n = 1.
    static constexpr int kMinHalfBits = 3;
    static constexpr int kRounds = 6;

    uint64_t feistel(uint64_t value) const {
        const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
        uint64_t left = value >> half_bits_, right = value & mask;
        for (const uint64_t round_key : round_keys_) {
            const uint64_t mixed = left ^ (mix64(right ^ round_key) & mask);
            left = right;
            right = mixed;
        }
        return left << half_bits_ | right;
    }

    uint64_t n_;
    int half_bits_;
    std::array<uint64_t, kRounds> round_keys_;
};
