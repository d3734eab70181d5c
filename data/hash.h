// Integer and byte-string hashes. Both are part of the data format in effect: the order of the samples and the split
// into training and validation documents follow from them, so changing one changes every run's data.
#pragma once
#include <cstdint>
#include <cstring>
#include <string_view>

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection in which every input bit flips about half the output.
inline uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Little-endian load of `count` <= 8 bytes; a constant count becomes one instruction.
inline uint64_t load_bytes(const char* at, size_t count) {
    uint64_t value = 0;
    std::memcpy(&value, at, count);
    return value;
}

// Upper and lower half of the 128-bit product, folded: one multiplication mixes 16 bytes (the idea of wyhash).
inline uint64_t fold_multiply(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Hash of a byte string; not cryptographic. Loads of a short string overlap, so no length needs a byte loop.
inline uint64_t hash_bytes(std::string_view bytes) {
    constexpr uint64_t kA = 0x9e3779b97f4a7c15u, kB = 0xd6e8feb86659fd93u;
    const char* at = bytes.data();
    size_t left = bytes.size();
    uint64_t state = kA ^ left;
    for (; left > 16; at += 16, left -= 16)
        state = fold_multiply(load_bytes(at, 8) ^ state, load_bytes(at + 8, 8) ^ kB);
    uint64_t low = 0, high = 0;
    if (left >= 8) {
        low = load_bytes(at, 8);
        high = load_bytes(at + left - 8, 8);
    } else if (left >= 4) {
        low = load_bytes(at, 4);
        high = load_bytes(at + left - 4, 4);
    } else if (left > 0) {
        low = load_bytes(at, 1) | load_bytes(at + left / 2, 1) << 8 | load_bytes(at + left - 1, 1) << 16;
    }
    return fold_multiply(fold_multiply(low ^ state, high ^ kB) ^ state, kA);
}
