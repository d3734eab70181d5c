#include "trainer/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/common/check.h"
#include "trainer/philox.h"

namespace {

// In [0, 1), 53 bits. The counter's high half keeps clear of the initial weights' draws, which use the same seed.
double uniform(uint64_t seed, const DrawKey& key) {
    constexpr uint64_t kSampling = uint64_t(0x73616d706c65) << 16;
    const Philox random{uint32_t(seed), uint32_t(seed >> 32)};
    const uint64_t low = uint64_t(uint32_t(key.sample)) << 32 | uint32_t(key.position);
    const Philox::Block bits = random.at(low, kSampling ^ uint64_t(key.step));
    return double((uint64_t(bits.x[0]) << 32 | bits.x[1]) >> 11) * 0x1p-53;
}

// Tokens, likeliest first; only the first `count` are in order.
std::vector<int> likeliest(std::span<const float> logits, size_t count) {
    std::vector<int> tokens(logits.size());
    std::iota(tokens.begin(), tokens.end(), 0);
    const auto before = [&](int a, int b) { return logits[size_t(a)] != logits[size_t(b)] ? logits[size_t(a)] > logits[size_t(b)] : a < b; };
    std::partial_sort(tokens.begin(), tokens.begin() + std::ptrdiff_t(count), tokens.end(), before);
    tokens.resize(count);
    return tokens;
}

}  // namespace

int draw_token(std::span<const float> logits, const SamplerOptions& options, const DrawKey& key) {
    REQUIRE(!logits.empty() && options.temperature >= 0 && options.top_k >= 0, "sampling: %zu logits, temperature %g, top-k %d", logits.size(),
            double(options.temperature), options.top_k);
    for (size_t i = 0; i < logits.size(); ++i)  // comparisons with NaN would make the order arbitrary
        REQUIRE(!std::isnan(logits[i]) && logits[i] != INFINITY, "sampling: the logit of token %zu is %g: the weights are not finite", i, double(logits[i]));
    const bool greedy = options.temperature == 0;
    const size_t all = logits.size(), kept = greedy ? 1 : options.top_k == 0 ? all : std::min(all, size_t(options.top_k));
    const std::vector<int> tokens = likeliest(logits, kept);
    const double largest = logits[size_t(tokens[0])];
    REQUIRE(std::isfinite(largest), "sampling: no logit is finite");
    if (greedy) return tokens[0];

    std::vector<double> up_to(kept);  // running sums of the weights
    double sum = 0;
    for (size_t i = 0; i < kept; ++i) up_to[i] = sum += std::exp((double(logits[size_t(tokens[i])]) - largest) / double(options.temperature));
    const auto drawn = std::upper_bound(up_to.begin(), up_to.end(), uniform(options.seed, key) * sum);
    return tokens[size_t(std::min(drawn, up_to.end() - 1) - up_to.begin())];
}
