// Schedules of two streams (trainer/sharding_schedule.h), proved by happens-before: whatever order a device finds between the two
// streams, no buffer is overwritten while it is used and every use finds what it should. Each wait is shown to be needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "trainer/sharding_schedule.h"

namespace {

// Contents of a buffer are those of a layer, or:
enum Contents { kWhatever = -10, kBegun, kSent, kReduced };

// What an operation reads and writes, by name, what it must find there and what it leaves.
struct Access {
    std::string what;
    bool writes;
    int expects = kWhatever;
    int leaves = kWhatever;  // the same as before
};

std::string number(const char* what, int i) { return what + std::to_string(i); }

std::vector<Access> accesses_of(const ShardingShape& s, const Operation& o) {
    const int l = o.layer;
    const std::string weights = s.gathers ? number("weights buffer ", l == kEmbedding ? -1 : s.buffer_of(l)) : number("weights ", l);
    const std::string embedding = number(s.gathers ? "weights buffer " : "weights ", -1);
    const std::string transposed = s.gathers ? "transposed" : number("transposed ", l);
    const std::string gradients = s.partial ? number("gradients buffer ", l == kEmbedding ? -1 : s.buffer_of(l)) : number("gradients ", l);
    const std::string embedding_gradients = number(s.partial ? "gradients buffer " : "gradients ", -1);
    const std::string arrived = number("arrived buffer ", l == kEmbedding ? -1 : s.buffer_of(l));
    // Gradients are used where they have been summed: all, of those blocks, or of the others.
    enum Sums { kAll, kBlocks, kOthers };
    const auto sums = [&s](Sums which, std::vector<Access> all) {
        for (int layer = -1; layer < s.layers; ++layer)
            if (which == kAll || (which == kBlocks) == (layer > 0)) all.push_back({number("sum ", layer), false, s.sharded || s.replicates ? layer : kWhatever});
        return all;
    };
    switch (o.task) {
        case Task::embed: return {{embedding, false, kEmbedding}, {"activations", true}};
        case Task::forward: return {{weights, false, l}, {"activations", true}};
        case Task::head: return {{embedding, false, kEmbedding}, {"activations", true}, {"loss", true}, {embedding_gradients, true, s.partial ? kReduced : kWhatever, kBegun}, {"rest", true}};
        case Task::backward: {
            std::vector<Access> all{{weights, false, l}, {"activations", true}, {gradients, true, s.partial ? kReduced : kWhatever, l}, {"rest", true}};
            if (s.transposes) all.push_back({transposed, false, l});
            return all;
        }
        case Task::embed_backward: return {{"activations", true}, {embedding_gradients, true, kBegun, kEmbedding}, {"rest", true}};
        case Task::transpose: return {{weights, false, l}, {transposed, true, kWhatever, l}};
        case Task::measure_blocks: return sums(kBlocks, {{"norm of blocks", true}});
        case Task::measure_norm: return sums(s.sharded ? kOthers : kAll, {{"norm of blocks", false}, {"norm", true}, {"rest", false}});
        case Task::prepare: return {{"norm", false}, {"loss", false}, {"how to update", true}, {"amaxes", true}};
        case Task::update_embedding: return {{"how to update", false}, {"sum -1", false, kEmbedding}, {"slice of the embedding", true}};
        case Task::update: return sums(kAll, {{"how to update", false}, {"rest", false}, {"amaxes", true}, {"slices", true}});
        case Task::cast: return {{"amaxes", false}, {"slices", true}};
        case Task::gather: return {{l == kEmbedding ? "slice of the embedding" : "slices", false}, {weights, true, kWhatever, l}};
        case Task::reduce:
            if (!s.sums) return {{gradients, true, l, kReduced}, {number("sum ", l), true, kWhatever, l}};
            return {{gradients, true, l, kSent}, {arrived, true, kWhatever, l}};
        // Of what arrived, or where the collective left it.
        case Task::sum: return {{gradients, true, kSent, kReduced}, {arrived, false, l}, {number("sum ", l), true, kWhatever, l}};
        case Task::replicate:
            if (!s.sharded) return {{gradients, true, l, kReduced}, {number("sum ", l), true, kWhatever, l}};
            return {{number("sum ", l), true, l}, {arrived, true}};
        case Task::reduce_rest: return {{"rest", true}, {"loss", true}};
        case Task::reduce_norm: return {{"norm", true}};
        case Task::reduce_amaxes: return {{"amaxes", true}};
    }
    return {};
}

// before[i][j]: i has ended when j starts, whatever the device does.
std::vector<std::vector<bool>> happens_before(const Schedule& schedule) {
    const size_t n = schedule.size();
    std::vector<std::vector<bool>> before(n, std::vector<bool>(n));
    const auto follows = [&](size_t i, size_t j) {
        before[i][j] = true;
        for (size_t k = 0; k < i; ++k)
            if (before[k][i]) before[k][j] = true;
    };
    for (size_t j = 0; j < n; ++j) {
        for (size_t i = 0; i < j; ++i)
            if (communicates(schedule[i].task) == communicates(schedule[j].task)) follows(i, j);
        if (schedule[j].after != kNothing) follows(size_t(schedule[j].after), j);
    }
    return before;
}

using Buffers = std::map<std::string, int>;

// Between two steps: sharded weights may be anything but for this rank's slices and the embedding.
Buffers at_rest(const ShardingShape& shape) {
    Buffers holds;
    if (!shape.sharded)
        for (int l = -1; l < shape.layers; ++l) holds[number("weights ", l)] = holds[number("transposed ", l)] = l;
    holds[number(shape.gathers ? "weights buffer " : "weights ", -1)] = kEmbedding;
    for (int b = -1; b < shape.buffers(); ++b) holds[number("gradients buffer ", b)] = kReduced;
    return holds;
}

// Before the optimizer: what backward completes last is not reduced, but by ranks that hold all: of them the embedding's is not.
Buffers after_micro_batches(const ShardingShape& shape) {
    Buffers holds = at_rest(shape);
    for (int l = kEmbedding; l < shape.layers; ++l) {
        const bool is_left = l == kEmbedding || (l == 0 && shape.sharded);
        if (!is_left) holds[number("sum ", l)] = l;
        else holds[shape.partial ? number("gradients buffer ", l == kEmbedding ? -1 : shape.buffer_of(l)) : number("gradients ", l)] = l;
    }
    return holds;
}

// "" when all is well, with the buffers as they were left in `holds` and are left there again.
std::string problem_of(const ShardingShape& shape, const Schedule& schedule, Buffers& holds) {
    const auto before = happens_before(schedule);
    std::vector<std::vector<Access>> accesses;
    for (const Operation& o : schedule) accesses.push_back(accesses_of(shape, o));
    for (size_t j = 0; j < schedule.size(); ++j)
        for (const Access& mine : accesses[j]) {
            for (size_t i = 0; i < j; ++i)
                for (const Access& other : accesses[i])
                    if (mine.what == other.what && (mine.writes || other.writes) && !before[i][j])
                        return message("operations %zu and %zu meet in %s", i, j, mine.what.c_str());
            if (mine.expects != kWhatever && (!holds.count(mine.what) || holds[mine.what] != mine.expects))
                return message("operation %zu finds other contents in %s than of %d", j, mine.what.c_str(), mine.expects);
            if (mine.writes && mine.leaves != kWhatever) holds[mine.what] = mine.leaves;
        }
    return "";
}

struct Named {
    std::string name;
    ShardingShape shape;
    Schedule schedule;
    Buffers holds;  // when it begins

    std::string problem() const {
        Buffers buffers = holds;
        return problem_of(shape, schedule, buffers);
    }
};

std::vector<Named> schedules_of(const std::string& name, const ShardingShape& shape) {
    std::vector<Named> all;
    Buffers holds = at_rest(shape);
    for (const Position p : {Position::first, Position::middle, Position::last, Position::only}) {
        if (starts_gradients(p)) holds = at_rest(shape);
        all.push_back({name + message(", position %d", int(p)), shape, micro_batch_schedule(shape, p), holds});
        EXPECT_EQ(problem_of(shape, all.back().schedule, holds), "") << all.back().name;
    }
    all.push_back({name + ", forward", shape, forward_schedule(shape), at_rest(shape)});
    all.push_back({name + ", optimizer", shape, optimizer_schedule(shape), after_micro_batches(shape)});
    all.push_back({name + ", refresh", shape, refresh_schedule(shape), at_rest(shape)});
    return all;
}

// Four ranks in one group or in two, whose collectives add or leave that to a kernel; or one.
std::vector<Named> all_schedules() {
    struct Ranks {
        const char* name;
        int group, replicas;
        bool sums;
    };
    std::vector<Named> all;
    for (const int layers : {1, 2, 3, 4, 5, 12})
        for (const Shard mode : {Shard::none, Shard::optimizer, Shard::gradients, Shard::full})
            for (const Ranks& ranks : {Ranks{"alone", 1, 1, false}, {"4 ranks", 4, 1, false}, {"4 ranks, sums", 4, 1, true}, {"2 x 2 ranks", 2, 2, false}, {"2 x 2 ranks, sums", 2, 2, true}})
                for (const bool transposes : {false, true}) {
                    const auto of = [](int size) { return std::make_shared<PlannedCommunicator>(0, size); };
                    const int all_ranks = ranks.group * ranks.replicas;
                    const Parallel parallel{.shard = mode, .world = of(all_ranks), .group = of(mode == Shard::none ? 1 : ranks.group),
                                            .replicas = of(mode == Shard::none ? all_ranks : ranks.replicas)};
                    ShardingShape shape = sharding_shape(parallel, layers, transposes);
                    shape.sums |= shape.sharded && ranks.sums;
                    for (Named& s : schedules_of(message("%d layers, mode %d, %s%s", layers, int(mode), ranks.name, transposes ? ", FP8" : ""), shape)) all.push_back(std::move(s));
                }
    return all;
}

std::vector<int> layers_of(const Schedule& schedule, Task task) {
    std::vector<int> layers;
    for (const Operation& o : schedule)
        if (o.task == task) layers.push_back(o.layer);
    return layers;
}

size_t index_of(const Schedule& schedule, Task task, int layer, size_t from = 0) {
    while (from < schedule.size() && (schedule[from].task != task || schedule[from].layer != layer)) ++from;
    return from;
}

TEST(ShardingSchedule, NothingIsOverwrittenWhileItIsUsed) {
    for (const Named& s : all_schedules()) {
        EXPECT_EQ(s.problem(), "") << s.name;
        for (size_t j = 0; j < s.schedule.size(); ++j) {
            const int after = s.schedule[j].after;
            if (after == kNothing) continue;
            ASSERT_LT(after, int(j)) << s.name;
            EXPECT_NE(communicates(s.schedule[size_t(after)].task), communicates(s.schedule[j].task)) << s.name;
        }
    }
}

// So the test above can fail, and nothing waits in vain.
TEST(ShardingSchedule, EveryWaitIsNeeded) {
    for (const Named& s : all_schedules())
        for (size_t j = 0; j < s.schedule.size(); ++j) {
            if (s.schedule[j].after == kNothing) continue;
            Named without = s;
            without.schedule[j].after = kNothing;
            EXPECT_NE(without.problem(), "") << s.name << ": operation " << j << " waits for " << s.schedule[j].after << " in vain";
        }
}

TEST(ShardingSchedule, OneRankCommunicatesNothing) {
    for (const Named& s : all_schedules()) {
        if (s.name.find("alone") == std::string::npos) continue;
        for (const Operation& o : s.schedule) EXPECT_FALSE(communicates(o.task)) << s.name;
        EXPECT_TRUE(layers_of(s.schedule, Task::transpose).empty()) << s.name;  // the cast does it
    }
}

TEST(ShardingSchedule, BlocksComeInOrderAndOnce) {
    for (const Named& s : all_schedules()) {
        std::vector<int> up, down;
        for (int l = 0; l < s.shape.layers; ++l) up.push_back(l), down.insert(down.begin(), l);
        const bool micro_batch = s.name.find("position") != std::string::npos, forward = s.name.find("forward") != std::string::npos;
        EXPECT_EQ(layers_of(s.schedule, Task::forward), micro_batch || forward ? up : std::vector<int>{}) << s.name;
        EXPECT_EQ(layers_of(s.schedule, Task::backward), micro_batch ? down : std::vector<int>{}) << s.name;
    }
}

// A step of several micro-batches, evaluations in between steps: what one leaves is what the next one expects, and every gradient of
// every micro-batch has been reduced once when the optimizer comes.
struct Counts {
    std::map<int, int> reduced, summed, replicated;  // by layer
    int rest = 0;

    void add(const Schedule& schedule) {
        for (const Operation& o : schedule) {
            reduced[o.layer] += o.task == Task::reduce;
            summed[o.layer] += o.task == Task::sum;
            replicated[o.layer] += o.task == Task::replicate;
            rest += o.task == Task::reduce_rest;
        }
    }
};

void expect_steps_follow(const ShardingShape& shape, int micro_batches, const std::string& name) {
    Buffers holds = at_rest(shape);
    for (int step = 0; step < 2; ++step) {
        Counts counts;
        const auto run = [&](const Schedule& schedule) {
            counts.add(schedule);
            return problem_of(shape, schedule, holds);
        };
        for (int i = 0; i < micro_batches; ++i) ASSERT_EQ(run(micro_batch_schedule(shape, position_of(i, micro_batches))), "") << name << ", micro-batch " << i;
        ASSERT_EQ(run(optimizer_schedule(shape)), "") << name;
        ASSERT_EQ(run(forward_schedule(shape)), "") << name;
        for (int l = kEmbedding; l < shape.layers; ++l) {
            const int times = !shape.sharded ? 0 : shape.partial ? micro_batches : 1;
            EXPECT_EQ(counts.reduced[l], times) << name << ", layer " << l;
            EXPECT_EQ(counts.summed[l], shape.sums ? times : 0) << name << ", layer " << l;
            EXPECT_EQ(counts.replicated[l], 1) << name << ", layer " << l;
            holds.erase(number("sum ", l));  // of the step
        }
        EXPECT_EQ(counts.rest, 1) << name;
    }
}

TEST(ShardingSchedule, StepsFollowEachOther) {
    for (const Shard mode : {Shard::none, Shard::optimizer, Shard::gradients, Shard::full})
        for (const int layers : {1, 2, 3, 6})
            for (const int micro_batches : {1, 2, 3, 5})
                for (const bool sums : {false, true}) {
                    ShardingShape shape = sharding_shape(planned_parallel(4, {.shard = mode, .replicate = mode == Shard::none ? 1 : 2}), layers, true);
                    EXPECT_EQ(shape.sums, shape.sharded);  // planned ranks copy
                    shape.sums = shape.sharded && (sums || shape.partial);
                    expect_steps_follow(shape, micro_batches, message("mode %d, %d layers, %d micro-batches, sums %d", int(mode), layers, micro_batches, sums));
                }
}

// Only with the last micro-batch is anything reduced that is not cut away every time.
TEST(ShardingSchedule, OthersReduceWithTheLastMicroBatch) {
    for (const Named& s : all_schedules()) {
        const bool completes = s.name.ends_with("position 0") || s.name.ends_with("position 3");
        if (s.shape.partial || completes || s.name.ends_with("optimizer")) continue;
        for (const Task task : {Task::reduce, Task::sum, Task::replicate}) EXPECT_TRUE(layers_of(s.schedule, task).empty()) << s.name;
    }
}

// The first block's and the embedding's gradients travel while the norm of the others is measured, the embedding's weights
// while the others are updated: neither waits for the other.
TEST(ShardingSchedule, OptimizerHidesWhatNoPassCan) {
    int checked = 0;
    const auto expect_beside = [](const Named& s, Task communication, Task compute) {
        const auto before = happens_before(s.schedule);
        const size_t a = index_of(s.schedule, communication, kEmbedding), b = index_of(s.schedule, compute, kEmbedding);
        ASSERT_TRUE(a < s.schedule.size() && b < s.schedule.size()) << s.name;
        EXPECT_FALSE(before[a][b] || before[b][a]) << s.name;
    };
    for (const Named& s : all_schedules()) {
        if (!s.name.ends_with("optimizer") || !s.shape.sharded) continue;
        expect_beside(s, Task::gather, Task::update);
        if (s.shape.layers > 1) expect_beside(s, Task::reduce, Task::measure_blocks), ++checked;
    }
    EXPECT_EQ(checked, 5 * 3 * 4 * 2);  // layers, modes, ranks, FP8 or not
}

// The next block's weights travel while this one computes: the gather is enqueued before and does not wait for it.
TEST(ShardingSchedule, NextBlockIsGatheredAhead) {
    int checked = 0;
    for (const Named& s : all_schedules()) {
        if (!s.shape.gathers || s.name.find("position") == std::string::npos) continue;
        const auto before = happens_before(s.schedule);
        const size_t head = index_of(s.schedule, Task::head, kEmbedding);
        const bool continues = s.name.ends_with("position 2") || s.name.ends_with("position 3");
        for (int l = 0; l + 1 < s.shape.layers; ++l, ++checked) {
            const size_t gather = index_of(s.schedule, Task::gather, l + 1), compute = index_of(s.schedule, Task::forward, l);
            if (continues && l + 1 < s.shape.buffers()) {
                EXPECT_GT(gather, head) << s.name << ": block " << l + 1 << " is still there";
                continue;
            }
            ASSERT_LT(gather, compute) << s.name;
            EXPECT_FALSE(before[compute][gather]) << s.name;
        }
        for (int l = s.shape.layers - 1; l > 0; --l, ++checked) {
            const size_t gather = index_of(s.schedule, Task::gather, l - 1, head), compute = index_of(s.schedule, Task::backward, l);
            if (l - 1 >= s.shape.layers - s.shape.buffers()) {
                EXPECT_EQ(gather, s.schedule.size()) << s.name << ": block " << l - 1 << " is still there";
                continue;
            }
            ASSERT_LT(gather, compute) << s.name;
            EXPECT_FALSE(before[compute][gather]) << s.name;
        }
    }
    EXPECT_GT(checked, 300);
}

// A reduction runs beside the next block's backward pass, and two blocks at most are between it and the one that needs its buffer.
TEST(ShardingSchedule, ReductionsRunBesideBackward) {
    for (const Named& s : all_schedules()) {
        if (layers_of(s.schedule, Task::reduce).empty() || layers_of(s.schedule, Task::backward).empty()) continue;
        const auto before = happens_before(s.schedule);
        for (int l = s.shape.layers - 1; l > 0; --l) {
            const size_t reduce = index_of(s.schedule, Task::reduce, l, index_of(s.schedule, Task::head, kEmbedding)), next = index_of(s.schedule, Task::backward, l - 1);
            EXPECT_LT(reduce, next) << s.name;
            EXPECT_FALSE(before[reduce][next]) << s.name;
        }
    }
}

// On every rank the same collectives in the same order, whatever its number in the group.
TEST(ShardingSchedule, RanksAgree) {
    for (const Shard mode : {Shard::none, Shard::optimizer, Shard::gradients, Shard::full}) {
        std::set<std::string> seen;
        for (int rank = 0; rank < 4; ++rank) {
            const Parallel parallel{.shard = mode, .world = std::make_shared<PlannedCommunicator>(rank, 4), .group = std::make_shared<PlannedCommunicator>(rank % 2, 2),
                                    .replicas = std::make_shared<PlannedCommunicator>(rank / 2, 2)};
            const ShardingShape shape = sharding_shape(parallel, 5, true);
            std::string text;
            for (const Schedule& schedule : {micro_batch_schedule(shape, Position::only), optimizer_schedule(shape)})
                for (const Operation& o : schedule)
                    if (communicates(o.task)) text += message("%d %d;", int(o.task), o.layer);
            seen.insert(text);
        }
        EXPECT_EQ(seen.size(), 1u);
    }
}

// Weights that stay come once a step, with its first micro-batch, none of them behind any compute, and are transposed once.
TEST(ShardingSchedule, FirstMicroBatchGathersPersistentWeights) {
    int checked = 0;
    for (const Named& s : all_schedules()) {
        if (!s.shape.sharded || s.shape.gathers || s.name.ends_with("optimizer") || s.name.ends_with("refresh")) continue;
        const bool first = s.name.ends_with("position 0") || s.name.ends_with("position 1"), evaluation = s.name.ends_with("forward");
        EXPECT_EQ(int(layers_of(s.schedule, Task::gather).size()), first || evaluation ? s.shape.layers : 0) << s.name;
        EXPECT_EQ(int(layers_of(s.schedule, Task::transpose).size()), first && s.shape.transposes ? s.shape.layers : 0) << s.name;
        for (const Operation& o : s.schedule)
            if (o.task == Task::gather) {
                EXPECT_EQ(o.after, kNothing) << s.name;
                ++checked;
            }
    }
    EXPECT_GT(checked, 100);
}

TEST(ShardingSchedule, AmaxesAreReducedOnceAnUpdate) {
    for (const Named& s : all_schedules()) {
        const bool update = s.name.ends_with("optimizer") || s.name.ends_with("refresh");
        EXPECT_EQ(layers_of(s.schedule, Task::reduce_amaxes).size(), update && s.shape.sharded ? 1u : 0u) << s.name;
    }
}

}  // namespace
