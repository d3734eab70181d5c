#include "trainer/parallel.h"

#include "kernels/common/check.h"
#include "trainer/distributed/nccl_communicator.h"
#include "trainer/distributed/world.h"

Shard find_shard(const std::string& name) {
    constexpr const char* kNames[] = {"none", "optimizer", "gradients", "full"};
    for (int i = 0; i < 4; ++i)
        if (name == kNames[i]) return Shard(i);
    throw Error(message("--shard %s: must be none, optimizer, gradients or full", name.c_str()));
}

namespace {

// Multiprocessors that NCCL may take from the compute beside it, by --shard. Where weights or gradients travel during the whole of a
// micro-batch, a few are enough to hide them; with one reduction a step it may have what it would choose. Copy engines need none.
constexpr NcclOptions kNccl[] = {{.most_ctas = 32}, {.most_ctas = 32, .copy_engines = true}, {.most_ctas = 16, .copy_engines = true}, {.most_ctas = 16, .copy_engines = true}};

struct Grouping {
    int groups, group_size;
};

Grouping grouping_of(int ranks, const ParallelOptions& o) {
    REQUIRE(o.shard != Shard::none || o.replicate == 1, "--replicate %d: with --shard none every rank is a replica; choose another --shard", o.replicate);
    REQUIRE(o.replicate >= 1 && ranks % o.replicate == 0, "--replicate %d: must divide the number of ranks, %d", o.replicate, ranks);
    const int groups = o.shard == Shard::none ? ranks : o.replicate;
    return {groups, ranks / groups};
}

}  // namespace

Parallel make_parallel(World& world, const ParallelOptions& options) {
    const int group_size = grouping_of(world.size(), options).group_size;
    Parallel parallel{.shard = options.shard, .gradient_element = options.gradient_element, .watch = world.watch()};
    parallel.world = std::shared_ptr<Communicator>(&world.host(), [](Communicator*) {});  // the world's own
    parallel.group = world.split(world.rank() / group_size);
    parallel.replicas = world.split(world.rank() % group_size);
    return parallel;
}

// A communicator holds memory of the GPU: one serves as many purposes as it can.
Parallel make_gpu_parallel(World& world, const ParallelOptions& options) {
    const auto [groups, group_size] = grouping_of(world.size(), options);
    const NcclOptions& nccl = kNccl[int(options.shard)];
    Parallel parallel{.shard = options.shard, .gradient_element = options.gradient_element, .watch = world.watch()};
    const auto split = [&](int color) {
        std::shared_ptr<Communicator> made;
        world.report_first([&] { made = nccl_split(world, color, nccl); });  // those made before would wait for other ranks when they go
        return made;
    };
    parallel.world = split(0);
    if (groups == 1) parallel.group = parallel.world;
    else if (group_size == 1) parallel.replicas = parallel.world;
    else {
        parallel.group = split(world.rank() / group_size);
        parallel.replicas = split(world.rank() % group_size);
    }
    return parallel;
}

Parallel planned_parallel(int ranks, const ParallelOptions& options) {
    const auto [groups, group_size] = grouping_of(ranks, options);
    const auto of = [](int size) { return std::make_shared<PlannedCommunicator>(0, size, true); };  // which takes more memory
    return {.shard = options.shard, .gradient_element = options.gradient_element, .world = of(ranks), .group = of(group_size), .replicas = of(groups)};
}
