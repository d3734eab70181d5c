// The reference device on several ranks (processes, over TCP) against one: every --shard mode.
//
// The mathematics does not depend on the number of ranks; the order of FP32 sums over micro-batches does. What such a
// reordering may do to the losses is measured, not guessed: the same run on one rank with every initial weight moved by at
// most one unit in the last place. A step's tolerance is 3 times the largest deviation of three such runs up to that step
// (chaotic growth differs from run to run by less), and at least 2^-20 of the loss (8 units of its own last place).
#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <random>

#include "ranks.h"
#include "trainer/engine.h"

namespace {

constexpr int kMicroBatches = 12, kSteps = 20;

struct Setting {
    std::string recipe = "tensorwise";
    Shard shard = Shard::none;
    int replicate = 1;
    Element gradient_element = Element::f32;
    int ffn_dim = 192;  // 200 is no multiple of 16: those linears run in BF16, in a unit of their own
    int steps = kSteps;
    int nudge = 0;      // seed of the last-place noise on the initial weights; 0: none
};

EngineOptions options_of(const Setting& s, int ranks) {
    return {.model = {.name = "ranks", .n_layers = 3, .dim = 48, .n_heads = 3, .ffn_dim = s.ffn_dim, .vocab_size = 61, .seq_len = 16},
            .recipe = find_recipe(s.recipe), .micro_batch = 2, .seq_len = 16, .micro_batches_per_step = kMicroBatches / ranks,
            .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .max_grad_norm = 1.0f}, .gemm_cache = ""};
}

// What rank 0 writes for the test.
struct Result {
    std::vector<float> losses, norms, gradients;  // gradients of the first step's loss, whole
    uint64_t digest_at_start = 0, digest_at_end = 0;
    int64_t scattered = 0, gathered = 0;  // bytes that rank 0 received
    double memory = 0;                    // of masters, moments, gradients, weights
};

template <typename T>
void put(std::ofstream& out, const std::vector<T>& values) {
    const uint64_t n = values.size();
    out.write(reinterpret_cast<const char*>(&n), sizeof n);
    out.write(reinterpret_cast<const char*>(values.data()), std::streamsize(n * sizeof(T)));
}
template <typename T>
std::vector<T> take(std::ifstream& in) {
    uint64_t n = 0;
    in.read(reinterpret_cast<char*>(&n), sizeof n);
    std::vector<T> values(n);
    in.read(reinterpret_cast<char*>(values.data()), std::streamsize(n * sizeof(T)));
    return values;
}

struct Batch {
    std::vector<int> inputs, targets;
};
// The global batch is a function of the step; ranks take slices. Some targets are masked, unevenly.
Batch batch_of(const EngineOptions& o, int step, int rank, int ranks) {
    const size_t tokens = size_t(kMicroBatches * o.micro_batch * o.seq_len), mine = tokens / size_t(ranks);
    std::mt19937 random{uint32_t(step + 1)};
    Batch all;
    for (size_t i = 0; i < tokens; ++i) {
        all.inputs.push_back(int(random() % 61) * int(random() % 61) / 61);
        all.targets.push_back(random() % (3 + i / 64) == 0 ? -1 : (all.inputs.back() * 7 + 3) % 61);
    }
    const auto part = [&](const std::vector<int>& x) { return std::vector<int>(x.begin() + int64_t(mine) * rank, x.begin() + int64_t(mine) * (rank + 1)); };
    return {part(all.inputs), part(all.targets)};
}

void train(World& world, const Setting& s, const std::string& path) {
    omp_set_num_threads(1);
    EngineOptions o = options_of(s, world.size());
    o.parallel = make_parallel(world, {.shard = s.shard, .replicate = s.replicate, .gradient_element = s.gradient_element});
    const Communicator& group = *o.parallel.group;
    const ParameterList list = make_parameters(o.model, group.size());
    const auto engine = make_reference_engine(o);
    TrainState state = initial_state(list, o.model, 7, held_by(list, group.rank(), group.size()));
    std::mt19937 random{uint32_t(s.nudge)};
    for (float& x : state.params)
        if (s.nudge) x = std::nextafter(x, x + float(int(random() % 3) - 1));
    engine->load(state);

    Result r;
    r.digest_at_start = engine->weights_digest();
    for (int step = 0; step < s.steps; ++step) {
        const StepInputs in{.step = step, .learning_rate = 3e-3f, .inverse_valid_tokens = 1.0f / 300};
        const Batch batch = batch_of(o, step, world.rank(), world.size());
        if (step == 0) r.gradients = engine->gradients(in, batch.inputs, batch.targets);
        engine->enqueue_step(in, batch.inputs, batch.targets);
        const StepResult result = engine->collect();
        REQUIRE(!result.skip_update, "step %d was skipped", step);
        r.losses.push_back(result.loss_sum);
        r.norms.push_back(result.grad_norm);
    }
    r.scattered = group.traffic().scattered, r.gathered = group.traffic().gathered;
    r.digest_at_end = engine->weights_digest();
    for (const MemoryRow& row : engine->memory_table())
        for (const char* what : {"parameters", "gradients", "AdamW moments", "weights as multiplied"})
            if (row.what == what) r.memory += row.bytes;
    std::vector<float> by_name;  // gradients without gaps: those depend on the number of ranks
    for (const Parameter& p : list.all) by_name.insert(by_name.end(), r.gradients.begin() + p.offset, r.gradients.begin() + p.offset + p.padded_count());
    if (world.rank() != 0) return;
    std::ofstream out(path, std::ios::binary);
    put(out, r.losses), put(out, r.norms), put(out, by_name);
    put(out, std::vector<uint64_t>{r.digest_at_start, r.digest_at_end, uint64_t(r.scattered), uint64_t(r.gathered), uint64_t(r.memory)});
}

// The parent uses no OpenMP, so that its children can.
Result run(int ranks, const Setting& setting) {
    const TempFolder folder;
    const Outcome outcome = run_ranks({.size = ranks, .timeout_s = 60}, [&](World& world) { train(world, setting, folder / "result"); });
    EXPECT_TRUE(outcome.all(0)) << outcome.errors;
    if (!outcome.all(0)) return {};
    std::ifstream in(folder / "result", std::ios::binary);
    Result r;
    r.losses = take<float>(in), r.norms = take<float>(in), r.gradients = take<float>(in);
    const std::vector<uint64_t> words = take<uint64_t>(in);
    r.digest_at_start = words.at(0), r.digest_at_end = words.at(1);
    r.scattered = int64_t(words.at(2)), r.gathered = int64_t(words.at(3)), r.memory = double(words.at(4));
    return r;
}

double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < b.size(); ++i) difference += std::pow(double(a.at(i)) - b[i], 2), norm += double(b[i]) * b[i];
    return std::sqrt(difference / norm);
}

std::vector<double> tolerances(const Setting& setting, const Result& one) {
    std::vector<double> largest(one.losses.size(), 0.0);
    for (const int nudge : {1, 2, 3}) {
        Setting nudged = setting;
        nudged.nudge = nudge;
        const Result other = run(1, nudged);
        double so_far = 0;
        for (size_t i = 0; i < largest.size(); ++i) {
            so_far = std::max(so_far, std::fabs(double(other.losses.at(i)) - one.losses[i]));
            largest[i] = std::max(largest[i], so_far);
        }
    }
    for (size_t i = 0; i < largest.size(); ++i) largest[i] = std::max(3 * largest[i], one.losses[i] * 0x1p-20);
    return largest;
}

class EveryMode : public testing::TestWithParam<std::string> {};

TEST_P(EveryMode, LossesOfTwentyStepsEqualOneRanks) {
    const Setting base{.recipe = GetParam()};
    const Result one = run(1, base);
    const std::vector<double> tolerance = tolerances(base, one);
    ASSERT_LT(tolerance.back(), 0.03 * (one.losses.front() - one.losses.back())) << "too loose to see anything";
    double worst = 0;
    for (const int ranks : {1, 2, 3, 4})
        for (const Shard shard : {Shard::none, Shard::optimizer, Shard::gradients, Shard::full}) {
            Setting setting = base;
            setting.shard = shard;
            const Result r = run(ranks, setting);
            const std::string where = message("%s, %d ranks, shard %d", GetParam().c_str(), ranks, int(shard));
            EXPECT_EQ(r.digest_at_start, one.digest_at_start) << where << ": amaxes, scales or weights of equal masters differ";
            ASSERT_EQ(r.losses.size(), one.losses.size()) << where;
            if (ranks == 1) {
                EXPECT_EQ(r.losses, one.losses) << where << ": one rank has nothing to reorder";
            }
            for (size_t i = 0; i < one.losses.size(); ++i) {
                const double difference = std::fabs(double(r.losses[i]) - one.losses[i]);
                worst = std::max(worst, difference / tolerance[i]);
                EXPECT_LE(difference, tolerance[i]) << where << ", step " << i;
            }
            // Sums of at most 12 micro-batches in another order, in FP32.
            EXPECT_LE(relative_difference(r.gradients, one.gradients), 12 * 0x1p-24) << where;
            EXPECT_LE(std::fabs(r.norms[0] - one.norms[0]), 12 * 0x1p-23 * one.norms[0]) << where;
        }
    std::printf("%s: worst deviation is %.2f of its tolerance; the last step's tolerance is %.2g of a loss of %.3f\n", GetParam().c_str(), worst,
                tolerance.back(), double(one.losses.back()));
}
INSTANTIATE_TEST_SUITE_P(Ranks, EveryMode, testing::Values("bf16", "tensorwise"), [](const auto& info) { return info.param; });

TEST(Ranks, HybridShardingEqualsOneRank) {
    const Setting base{.steps = 6};
    const Result one = run(1, base);
    const std::vector<double> tolerance = tolerances(base, one);
    for (const Shard shard : {Shard::optimizer, Shard::gradients, Shard::full}) {
        Setting setting = base;
        setting.shard = shard;
        setting.replicate = 2;
        const Result r = run(4, setting);
        EXPECT_EQ(r.digest_at_start, one.digest_at_start);
        for (size_t i = 0; i < one.losses.size(); ++i) EXPECT_NEAR(r.losses.at(i), one.losses[i], tolerance[i]) << int(shard) << ", step " << i;
    }
}

TEST(Ranks, LinearsThatRefuseFp8TravelInBf16) {
    Setting base{.ffn_dim = 200, .steps = 4};
    const Result one = run(1, base);
    const std::vector<double> tolerance = tolerances(base, one);
    base.shard = Shard::full;
    const Result r = run(3, base);
    EXPECT_EQ(r.digest_at_start, one.digest_at_start);
    for (size_t i = 0; i < one.losses.size(); ++i) EXPECT_NEAR(r.losses.at(i), one.losses[i], tolerance[i]) << "step " << i;
}

// A rounding to BF16 (2^-9 at most) of every rank's contribution and of the sum: each gradient within 2 * 2^-9 of the
// contributions' magnitudes; random signs make the whole vector's error several times smaller.
TEST(Ranks, GradientsInBf16AreCloseAndHalfTheBytes) {
    for (const Shard shard : {Shard::none, Shard::optimizer, Shard::full}) {
        Setting base{.shard = shard, .steps = 4};
        const Result wide = run(2, base);
        base.gradient_element = Element::bf16;
        const Result narrow = run(2, base);
        EXPECT_LE(relative_difference(narrow.gradients, wide.gradients), 0x1p-8);
        EXPECT_GT(relative_difference(narrow.gradients, wide.gradients), 0x1p-14) << "nothing was rounded";
        EXPECT_EQ(narrow.scattered * 2, wide.scattered) << int(shard);
        EXPECT_EQ(wide.scattered > 0, shard != Shard::none);
        EXPECT_NEAR(narrow.losses.back(), wide.losses.back(), 0.02 * (wide.losses.front() - wide.losses.back()));
    }
}

// The bytes of a block in FP8 are half those in BF16; the embedding and the doubles of norms travel alike.
TEST(Ranks, Fp8GatherMovesHalfTheBytes) {
    const auto gathered = [](const char* recipe, Shard shard) { return run(2, {.recipe = recipe, .shard = shard, .steps = 2}).gathered; };
    const ParameterList list = make_parameters(options_of({}, 2).model, 2);
    int64_t block_slices = 0;
    for (const Unit& unit : list.units)
        if (unit.fits_fp8) block_slices += unit.elements / 2;
    const int loads = 3;  // at load and after each of two updates
    EXPECT_EQ(gathered("bf16", Shard::optimizer) - gathered("tensorwise", Shard::optimizer), loads * block_slices);
    EXPECT_GT(gathered("bf16", Shard::full) - gathered("tensorwise", Shard::full), loads * block_slices);
}

TEST(Ranks, ShardingSavesMemory) {
    const auto memory = [](Shard shard, int ranks) { return run(ranks, {.shard = shard, .steps = 1}).memory; };
    const double none = memory(Shard::none, 4), optimizer = memory(Shard::optimizer, 4), gradients = memory(Shard::gradients, 4);
    EXPECT_NEAR(none, memory(Shard::none, 1), 0.01 * none);
    EXPECT_LT(optimizer, 0.65 * none);  // 8 of 20 bytes stay: 12 of masters and moments become 3
    EXPECT_LT(gradients, optimizer);
}

}  // namespace
