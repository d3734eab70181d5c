#include "trainer/checksum.h"

#include <algorithm>
#include <charconv>
#include <cstring>

#include "kernels/common/check.h"

namespace {

// SplitMix64's output for the state `n`, made odd: times an odd number is one to one modulo 2^64.
constexpr uint64_t odd_number(uint64_t n) {
    uint64_t z = (n + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) | 1;
}

// An element's weight is its place's in a block times the block's: one multiplication an element.
constexpr size_t kBlock = 1024;
struct Weights {
    uint64_t of[kBlock];
    constexpr Weights() : of{} {
        for (size_t i = 0; i < kBlock; ++i) of[i] = odd_number(i);
    }
};
constexpr Weights kWeights;
uint64_t weight_of_block(uint64_t block) { return odd_number(~block); }

uint64_t sum_of(const void* elements, uint64_t first, size_t count) {
    const char* from = static_cast<const char*>(elements);
    uint64_t sum = 0;
    while (count > 0) {
        const size_t begin = first % kBlock, n = std::min(count, kBlock - begin);
        uint64_t of_block = 0;
        for (size_t i = 0; i < n; ++i) {
            uint32_t bits;
            std::memcpy(&bits, from + i * sizeof bits, sizeof bits);
            of_block += bits * kWeights.of[begin + i];
        }
        sum += of_block * weight_of_block(first / kBlock);
        from += n * sizeof(uint32_t), first += n, count -= n;
    }
    return sum;
}

}  // namespace

uint64_t checksum(std::span<const float> elements, int64_t first) { return sum_of(elements.data(), uint64_t(first), elements.size()); }

uint64_t checksum_of_bytes(std::string_view bytes) {
    const size_t whole = bytes.size() / sizeof(uint32_t);
    uint32_t last = 0;
    if (bytes.size() % sizeof last != 0) std::memcpy(&last, bytes.data() + whole * sizeof last, bytes.size() % sizeof last);
    return sum_of(bytes.data(), 0, whole) + sum_of(&last, whole, 1) + bytes.size() * odd_number(kBlock);
}

std::string format_checksum(uint64_t sum) { return message("%016llx", static_cast<unsigned long long>(sum)); }

bool parse_checksum(std::string_view text, uint64_t& sum) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), sum, 16);
    return text.size() == 16 && error == std::errc() && end == text.data() + text.size();
}
