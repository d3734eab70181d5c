#include "trainer/run/batch_check.h"

#include <gtest/gtest.h>

#include "ranks.h"

namespace {

constexpr int64_t kSeqLen = 16, kTokens = 1000, kSamples = 2;  // a rank

std::string shard(const std::string& path, int64_t other_token) {
    std::vector<uint32_t> tokens(kTokens);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = uint32_t(i * 37 % 200);
    if (other_token >= 0) tokens[size_t(other_token)] ^= 1;
    TokenFileWriter file(path, {.vocab_size = 257, .tokenizer = TokenizerId::bytes, .end_of_text = 256});
    file.append(tokens);
    file.publish();
    return path;
}

DataLoader loader(const std::string& path, int ranks) {
    return DataLoader({.shards = {path}, .seq_len = kSeqLen, .samples_per_step = kSamples * ranks, .seed = 3});
}

// The first step of an epoch in which one of these ranks' slices differs; -1: none.
int64_t first_step(const DataLoader& good, const DataLoader& bad, const std::vector<int>& ranks) {
    std::vector<int> a(size_t(kSamples * kSeqLen)), b = a, c = a, d = a;
    for (int64_t step = 0; step < good.samples_per_epoch() / good.samples_per_step(); ++step) {
        for (const int rank : ranks) {
            good.fill(step, kSamples * rank, kSamples, a.data(), b.data());
            bad.fill(step, kSamples * rank, kSamples, c.data(), d.data());
            if (a != c || b != d) return step;
        }
    }
    return -1;
}

std::string expected(int rank, int other, int64_t step) {
    return step < 0 ? "" : message("error: rank %d has other training data than rank %d where step %lld reads them: give every machine the same shards\n", rank, other,
                                   static_cast<long long>(step + 1));
}

Outcome train(int ranks, const std::function<std::string(int)>& shard_of) {
    return run_ranks({.size = ranks}, [&](World& world) {
        const DataLoader data = loader(shard_of(world.rank()), ranks);
        std::vector<int> inputs(size_t(kSamples * kSeqLen)), targets(inputs.size());
        BatchCheck check(data, world, kSamples);
        for (int64_t step = 0; step < data.samples_per_epoch() / data.samples_per_step(); ++step) {
            data.fill(step, kSamples * world.rank(), kSamples, inputs.data(), targets.data());
            check.compare(step, inputs, targets);
        }
    });
}

TEST(BatchCheck, TheSameDataAreTheSame) {
    const TempFolder folder;
    const std::string good = shard(folder / "good.bin", -1);
    for (const int ranks : {1, 2, 3, 4}) {
        const Outcome outcome = train(ranks, [&](int) { return good; });
        EXPECT_TRUE(outcome.all(0)) << outcome.errors;
    }
}

// By that rank, which reads its own slice and another one.
TEST(BatchCheck, OneTokenOfOneRankIsFoundBeforeTheStepThatReadsIt) {
    const TempFolder folder;
    const std::string good = shard(folder / "good.bin", -1);
    for (const int64_t token : {0, 16, 500, 991}) {
        const std::string bad = shard(folder / "bad.bin", token);
        for (const int ranks : {2, 3, 4}) {
            const int victim = ranks - 1, other = (victim + ranks / 2) % ranks;
            const int64_t step = first_step(loader(good, ranks), loader(bad, ranks), {victim, other});
            const Outcome outcome = train(ranks, [&](int rank) { return rank == victim ? bad : good; });
            EXPECT_EQ(outcome.all(0), step < 0) << outcome.errors;
            if (ranks == 3 && step >= 0) EXPECT_NE(outcome.errors.find(message("where step %lld reads them", static_cast<long long>(step + 1))), std::string::npos) << outcome.errors;
            else EXPECT_EQ(outcome.errors, expected(victim, other, step));
        }
    }
}

// As the ranks of two machines do.
TEST(BatchCheck, HalvesThatAgreeAmongThemselvesAreFoundInTheFirstStepThatDiffers) {
    const TempFolder folder;
    const std::string good = shard(folder / "good.bin", -1);
    for (const int64_t token : {0, 16, 500, 991}) {
        const std::string bad = shard(folder / "bad.bin", token);
        const int64_t step = first_step(loader(good, 4), loader(bad, 4), {0, 1, 2, 3});
        const Outcome outcome = train(4, [&](int rank) { return rank >= 2 ? bad : good; });
        EXPECT_TRUE(outcome.errors == expected(2, 0, step) || outcome.errors == expected(3, 1, step)) << outcome.errors;
    }
}

}  // namespace
