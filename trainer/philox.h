// Random bits as a function of a key and a counter, so that no draw depends on what was drawn before: Philox4x32-10 (Salmon
// et al., SC 2011).
#pragma once
#include <cstdint>

struct Philox {
    uint32_t key0, key1;

    struct Block {
        uint32_t x[4];
    };
    Block at(uint64_t counter_low, uint64_t counter_high) const {
        uint32_t c[4] = {uint32_t(counter_low), uint32_t(counter_low >> 32), uint32_t(counter_high), uint32_t(counter_high >> 32)};
        uint32_t k0 = key0, k1 = key1;
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
            const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1, uint32_t(p0)};
            for (int i = 0; i < 4; ++i) c[i] = next[i];
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        return {{c[0], c[1], c[2], c[3]}};
    }
};
