// Schedules of two streams (trainer/sharding_schedule.h), proved by happens-before: whatever order a device finds between the two
// streams, no buffer is overwritten while it is used and every use finds what it should. Each wait is shown to be needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "trainer/sharding_schedule.h"

namespace {

// What an operation reads and writes, by name, and whose contents a read expects.
struct Access {
    std::string what;
    bool writes;
    int expects = -2;  // layer whose contents it must find; -2: whatever
    int leaves = -2;   // layer whose contents a write leaves; -2: the same
};

std::string number(const char* what, int i) { return what + std::to_string(i); }

std::vector<Access> accesses_of(const ShardingShape& s, const Operation& o) {
    const int l = o.layer;
    const std::string weights = s.gathers ? number("weights buffer ", l == kEmbedding ? -1 : s.buffer_of(l)) : number("weights ", l);
    const std::string embedding = number(s.gathers ? "weights buffer " : "weights ", -1);
    const std::string transposed = s.gathers ? "transposed" : number("transposed ", l);
    const std::string gradients = s.partial ? number("gradients buffer ", l == kEmbedding ? -1 : s.buffer_of(l)) : number("gradients ", l);
    const std::string embedding_gradients = number(s.partial ? "gradients buffer " : "gradients ", -1);
    switch (o.task) {
        case Task::embed: return {{embedding, false, kEmbedding}, {"activations", true}};
        case Task::forward: return {{weights, false, l}, {"activations", true}};
        case Task::head: return {{embedding, false, kEmbedding}, {"activations", true}, {"loss", true}, {embedding_gradients, true, -2, kEmbedding}, {"rest", true}};
        case Task::backward: {
            std::vector<Access> all{{weights, false, l}, {"activations", true}, {gradients, true, -2, l}, {"rest", true}};
            if (s.transposes) all.push_back({transposed, false, l});
            return all;
        }
        case Task::embed_backward: return {{"activations", true}, {embedding_gradients, true, kEmbedding, kEmbedding}, {"rest", true}};
        case Task::transpose: return {{weights, false, l}, {transposed, true, -2, l}};
        case Task::measure_norm: return {{"norm", true}};
        case Task::update: return {{"norm", false}, {"amaxes", true}, {"slices", true}};
        case Task::cast: return {{"amaxes", false}, {"slices", true}};
        case Task::gather: return {{"slices", false}, {weights, true, -2, l}};
        case Task::reduce: return {{gradients, true, l, l}};
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

// "" when all is well.
std::string problem_of(const ShardingShape& shape, const Schedule& schedule) {
    const auto before = happens_before(schedule);
    std::map<std::string, int> holds;
    if (!shape.gathers)
        for (int l = -1; l < shape.layers; ++l) holds[number("weights ", l)] = holds[number("transposed ", l)] = l;
    std::vector<std::vector<Access>> accesses;
    for (const Operation& o : schedule) accesses.push_back(accesses_of(shape, o));
    for (size_t j = 0; j < schedule.size(); ++j)
        for (const Access& mine : accesses[j]) {
            for (size_t i = 0; i < j; ++i)
                for (const Access& other : accesses[i])
                    if (mine.what == other.what && (mine.writes || other.writes) && !before[i][j])
                        return message("operations %zu and %zu meet in %s", i, j, mine.what.c_str());
            if (mine.expects != -2 && (!holds.count(mine.what) || holds[mine.what] != mine.expects))
                return message("operation %zu finds other contents in %s than of %d", j, mine.what.c_str(), mine.expects);
            if (mine.writes && mine.leaves != -2) holds[mine.what] = mine.leaves;
        }
    return "";
}

struct Named {
    std::string name;
    ShardingShape shape;
    Schedule schedule;
};

std::vector<Named> all_schedules() {
    std::vector<Named> all;
    for (const int layers : {1, 2, 3, 4, 5, 12})
        for (const Shard mode : {Shard::none, Shard::optimizer, Shard::gradients, Shard::full})
            for (const bool alone : {false, true})
                for (const bool transposes : {false, true}) {
                    const auto ranks = [&](int size) { return std::make_shared<PlannedCommunicator>(0, alone ? 1 : size); };
                    const Parallel parallel{.shard = mode, .world = ranks(4), .group = mode == Shard::none ? std::make_shared<PlannedCommunicator>(0, 1) : ranks(2),
                                            .replicas = ranks(mode == Shard::none ? 4 : 2)};
                    const ShardingShape shape = sharding_shape(parallel, layers, transposes);
                    const std::string name = message("%d layers, mode %d, %s%s", layers, int(mode), alone ? "alone" : "4 ranks", transposes ? ", FP8" : "");
                    for (const Position p : {Position::only, Position::first, Position::middle, Position::last})
                        all.push_back({name + message(", position %d", int(p)), shape, micro_batch_schedule(shape, p)});
                    all.push_back({name + ", forward", shape, forward_schedule(shape)});
                    all.push_back({name + ", optimizer", shape, optimizer_schedule(shape)});
                    all.push_back({name + ", refresh", shape, refresh_schedule(shape)});
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
        EXPECT_EQ(problem_of(s.shape, s.schedule), "") << s.name;
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
            Schedule without = s.schedule;
            without[j].after = kNothing;
            EXPECT_NE(problem_of(s.shape, without), "") << s.name << ": operation " << j << " waits for " << s.schedule[j].after << " in vain";
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

// Every unit, when it should be: `gradients` and `full` every micro-batch, the others with the last one.
TEST(ShardingSchedule, EveryGradientIsReducedOnce) {
    for (const Named& s : all_schedules()) {
        const size_t at = s.name.find("position ");
        if (at == std::string::npos) continue;
        const Position position = Position(s.name.back() - '0');
        std::vector<int> reduced = layers_of(s.schedule, Task::reduce);
        if (!s.shape.partial && (!s.shape.reduces_units || !completes_gradients(position))) {
            EXPECT_TRUE(reduced.empty()) << s.name;
        } else {
            ASSERT_EQ(int(reduced.size()), s.shape.layers + 1) << s.name;
            EXPECT_EQ(reduced.back(), kEmbedding) << s.name;
            for (int i = 0; i < s.shape.layers; ++i) EXPECT_EQ(reduced[size_t(i)], s.shape.layers - 1 - i) << s.name;
        }
        EXPECT_EQ(layers_of(s.schedule, Task::reduce_rest).size(), s.shape.reduces_rest && completes_gradients(position) ? 1u : 0u) << s.name;
    }
}

// The next block's weights travel while this one computes: the gather is enqueued before and does not wait for it.
TEST(ShardingSchedule, NextBlockIsGatheredAhead) {
    int checked = 0;
    for (const Named& s : all_schedules()) {
        if (!s.shape.gathers || s.name.find("position") == std::string::npos) continue;
        const auto before = happens_before(s.schedule);
        const size_t head = index_of(s.schedule, Task::head, kEmbedding);
        for (int l = 0; l + 1 < s.shape.layers; ++l, ++checked) {
            const size_t gather = index_of(s.schedule, Task::gather, l + 1), compute = index_of(s.schedule, Task::forward, l);
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
        if (layers_of(s.schedule, Task::reduce).empty()) continue;
        const auto before = happens_before(s.schedule);
        for (int l = s.shape.layers - 1; l > 0; --l) {
            const size_t reduce = index_of(s.schedule, Task::reduce, l), next = index_of(s.schedule, Task::backward, l - 1);
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

// After an update the weights of all units come back once, and are transposed behind their gather.
TEST(ShardingSchedule, UpdateGathersPersistentWeights) {
    for (const Named& s : all_schedules()) {
        if (s.name.find("optimizer") == std::string::npos && s.name.find("refresh") == std::string::npos) continue;
        const bool persistent = s.shape.sharded && !s.shape.gathers;
        EXPECT_EQ(int(layers_of(s.schedule, Task::gather).size()), persistent ? s.shape.layers + 1 : 0) << s.name;
        EXPECT_EQ(int(layers_of(s.schedule, Task::transpose).size()), persistent && s.shape.transposes ? s.shape.layers : 0) << s.name;
        EXPECT_EQ(layers_of(s.schedule, Task::reduce_amaxes).size(), s.shape.sharded ? 1u : 0u) << s.name;
    }
}

}  // namespace
