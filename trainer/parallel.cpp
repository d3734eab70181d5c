#include "trainer/parallel.h"

#include "kernels/common/check.h"
#include "trainer/distributed/world.h"

Shard find_shard(const std::string& name) {
    constexpr const char* kNames[] = {"none", "optimizer", "gradients", "full"};
    for (int i = 0; i < 4; ++i)
        if (name == kNames[i]) return Shard(i);
    throw Error(message("--shard %s: must be none, optimizer, gradients or full", name.c_str()));
}

Parallel make_parallel(World& world, const ParallelOptions& options) {
    const int size = world.size(), groups = options.shard == Shard::none ? size : options.replicate;
    REQUIRE(options.shard != Shard::none || options.replicate == 1, "--replicate %d: with --shard none every rank is a replica; choose another --shard", options.replicate);
    REQUIRE(options.replicate >= 1 && size % options.replicate == 0, "--replicate %d: must divide the number of ranks, %d", options.replicate, size);
    const int group_size = size / groups;
    Parallel parallel{.shard = options.shard, .gradient_element = options.gradient_element};
    parallel.world = std::shared_ptr<Communicator>(&world.host(), [](Communicator*) {});  // the world's own
    parallel.group = world.split(world.rank() / group_size);
    parallel.replicas = world.split(world.rank() % group_size);
    return parallel;
}

void require_gpu_mode(const Parallel& parallel) {
    REQUIRE(parallel.shard == Shard::none, "--shard: on several GPUs only none is implemented (each holds the whole model); --device cpu has all modes");
    REQUIRE(parallel.gradient_element == Element::f32, "--reduce-dtype bf16: on GPUs gradients travel in f32; --device cpu has both");
}
