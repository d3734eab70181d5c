// The GPU's memory in every mode of sharding, planned without a GPU: --dry-run's table, and what --micro-batch auto goes by.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>

#include "trainer/engine.h"

namespace {

constexpr double kFloat = 4;
const ModelSpec kModel{.name = "plan", .n_layers = 5, .dim = 160, .n_heads = 5, .ffn_dim = 656, .vocab_size = 1000, .seq_len = 64};

EngineOptions options_of(const std::string& recipe, int ranks, const ParallelOptions& parallel) {
    return {.model = kModel, .recipe = find_recipe(recipe), .micro_batch = 2, .seq_len = 64, .micro_batches_per_step = 2,
            .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .max_grad_norm = 1.0f}, .gemm_cache = "",
            .parallel = planned_parallel(ranks, parallel)};
}

struct Plan {
    std::map<std::string, double> rows;
    double total = 0;
};
Plan plan_of(const EngineOptions& options) {
    Plan plan;
    for (const MemoryRow& row : plan_gpu_engine(options).memory) {
        EXPECT_FALSE(plan.rows.count(row.what)) << row.what << " twice";
        plan.rows[row.what] = row.bytes;
        plan.total += row.bytes;
    }
    return plan;
}

// Arrays begin on 512 bytes: a row may be larger than its arrays by so much each.
void expect_row(const Plan& plan, const std::string& row, double bytes, int arrays, const std::string& what) {
    ASSERT_TRUE(plan.rows.count(row)) << what << ": no row " << row;
    EXPECT_GE(plan.rows.at(row), bytes) << what << ": " << row;
    EXPECT_LE(plan.rows.at(row), bytes + 512.0 * arrays) << what << ": " << row;
}

constexpr Shard kModes[] = {Shard::none, Shard::optimizer, Shard::gradients, Shard::full};

TEST(GpuPlan, EveryModeHoldsItsSlices) {
    for (const char* recipe : {"bf16", "tensorwise"})
        for (const int ranks : {2, 3, 8})
            for (const Shard mode : kModes) {
                const EngineOptions o = options_of(recipe, ranks, {.shard = mode});
                const bool fp8 = o.recipe.quantizes(), sharded = mode != Shard::none, partial = mode == Shard::gradients || mode == Shard::full;
                const int group = sharded ? ranks : 1;
                const ParameterList list = make_parameters(kModel, group);
                const Held held = held_by(list, 0, group);
                const Plan plan = plan_of(o);
                const std::string what = message("%s, %d ranks, mode %d", recipe, ranks, int(mode));
                expect_row(plan, "master weights (FP32)", kFloat * double(held.elements), 1, what);
                expect_row(plan, "Adam moments (FP32)", 2 * kFloat * double(held.elements), 2, what);
                expect_row(plan, "gradients (FP32)", kFloat * double(partial ? held.elements : list.flat_elements), 1, what);

                const double embedding = double(list.units[size_t(list.embedding_unit)].elements), block = double(list.units[size_t(list.block_units[0][0])].elements);
                if (partial) expect_row(plan, "gradients of a micro-batch (FP32)", kFloat * (2 * block + embedding), 3, what);
                else EXPECT_FALSE(plan.rows.count("gradients of a micro-batch (FP32)")) << what;
                if (mode == Shard::full) expect_row(plan, "gathered weights", (fp8 ? 3 : 4) * block + 2 * embedding, 4, what);
                else EXPECT_FALSE(plan.rows.count("gathered weights")) << what;
                const double own = mode == Shard::full ? 1.0 / ranks : 1;
                double small = double(list[list.wpe].padded_count());
                for (const BlockParameters& b : list.blocks)
                    for (const int bias : {b.qkv_bias, b.proj_bias, b.fc1_bias, b.fc2_bias}) small += double(list[bias].padded_count());
                const int copies = 2 + 5 * kModel.n_layers;
                expect_row(plan, "BF16 weight copies", 2 * small + 2 * ((mode == Shard::full ? 0 : embedding) + (fp8 ? 0 : own * kModel.n_layers * block)), copies, what);
                if (fp8) expect_row(plan, "FP8 weights and their transposes", kModel.n_layers * block * own * (mode == Shard::full ? 1 : 2), 2 * kModel.n_layers, what);
                EXPECT_GE(plan.rows.at("NCCL's buffers (assumed)"), 1 << 29) << what;
            }
}

TEST(GpuPlan, MoreShardingTakesLessMemory) {
    for (const char* recipe : {"bf16", "tensorwise"}) {
        double before = INFINITY;
        for (const Shard mode : kModes) {
            EngineOptions o = options_of(recipe, 8, {.shard = mode});
            o.model.n_layers = 24;  // so that buffers are few beside blocks
            const double total = plan_of(o).total;
            EXPECT_LT(total, before) << recipe << ", mode " << int(mode);
            before = total;
        }
    }
}

TEST(GpuPlan, ReplicasHoldLargerSlices) {
    const Plan whole = plan_of(options_of("tensorwise", 8, {.shard = Shard::full})), halves = plan_of(options_of("tensorwise", 8, {.shard = Shard::full, .replicate = 4}));
    const Held held = held_by(make_parameters(kModel, 2), 1, 2);
    expect_row(halves, "master weights (FP32)", kFloat * double(held.elements), 1, "groups of two");
    EXPECT_LT(whole.rows.at("master weights (FP32)"), halves.rows.at("master weights (FP32)"));
}

// A group of one rank has no slices: as none, whatever is asked for.
TEST(GpuPlan, GroupsOfOneAreReplicas) {
    const Plan none = plan_of(options_of("tensorwise", 4, {.shard = Shard::none}));
    for (const Shard mode : {Shard::optimizer, Shard::gradients, Shard::full})
        EXPECT_EQ(plan_of(options_of("tensorwise", 4, {.shard = mode, .replicate = 4})).rows, none.rows);
}

TEST(GpuPlan, OneRankHasNothingOfOthers) {
    const Plan one = plan_of(options_of("tensorwise", 1, {.shard = Shard::none}));
    for (const Shard mode : kModes) EXPECT_EQ(plan_of(options_of("tensorwise", 1, {.shard = mode, .gradient_element = Element::bf16})).rows, one.rows);
    for (const char* row : {"NCCL's buffers (assumed)", "gathered weights", "gradients of a micro-batch (FP32)", "gradients on their way (BF16)"})
        EXPECT_FALSE(one.rows.count(row)) << row;
}

// Two blocks' in turn and the embedding's: as every rank sends them to this one, and in BF16 also as they are sent.
TEST(GpuPlan, GradientsOnTheirWay) {
    for (const Shard mode : kModes)
        for (const Element element : {Element::f32, Element::bf16}) {
            const Plan plan = plan_of(options_of("tensorwise", 2, {.shard = mode, .gradient_element = element}));
            const ParameterList list = make_parameters(kModel, mode == Shard::none ? 1 : 2);
            ASSERT_EQ(list.block_units[0].size(), 1u);
            const int64_t elements = 2 * list.units[size_t(list.block_units[0][0])].elements + list.units[size_t(list.embedding_unit)].elements;
            const std::string row = element == Element::bf16 ? "gradients on their way (BF16)" : "gradients on their way (FP32)";
            const int buffers = (mode != Shard::none) + (element == Element::bf16);
            if (buffers > 0) expect_row(plan, row, buffers * double(bytes_of(element) * elements), 3 * buffers, message("mode %d", int(mode)));
            else EXPECT_FALSE(plan.rows.count(row));
        }
}

// Matrices that FP8 refuses are units of their own, in BF16.
TEST(GpuPlan, MixedBlocks) {
    EngineOptions o = options_of("tensorwise", 2, {.shard = Shard::full});
    o.model.ffn_dim = 200;
    const ParameterList list = make_parameters(o.model, 2);
    ASSERT_EQ(list.block_units[0].size(), 2u);
    const auto elements = [&](int unit) { return double(list.units[size_t(unit)].elements); };
    const double fp8 = elements(list.block_units[0][0]), bf16 = elements(list.block_units[0][1]), embedding = elements(list.embedding_unit);
    const Plan plan = plan_of(o);
    expect_row(plan, "gathered weights", 2 * fp8 + 4 * bf16 + fp8 + 2 * embedding, 6, "mixed");
    expect_row(plan, "gradients of a micro-batch (FP32)", kFloat * (2 * fp8 + 2 * bf16 + embedding), 5, "mixed");
}

TEST(GpuPlan, WrongGroupsAreErrors) {
    EXPECT_THROW(planned_parallel(4, {.shard = Shard::none, .replicate = 2}), Error);
    EXPECT_THROW(planned_parallel(4, {.shard = Shard::full, .replicate = 3}), Error);
    EXPECT_THROW(planned_parallel(4, {.shard = Shard::full, .replicate = 0}), Error);
    const Parallel planned = planned_parallel(4, {.shard = Shard::full});
    uint32_t x = 0;
    EXPECT_THROW(planned.world->all_reduce(&x, 1, Element::u32, Reduction::max), Error);
}

}  // namespace
