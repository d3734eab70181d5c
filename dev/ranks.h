// What dev programs of several ranks share: their ranks meet once a process, take a GPU each, and fail and leave together.
#pragma once
#include <cstdlib>

#include "dev/harness.h"
#include "kernels/common/cuda_check.h"
#include "trainer/distributed/world.h"

inline World& world() {
    static World all(find_launch([](const char* name) -> const char* { return std::getenv(name); }), 120);
    return all;
}

inline void take_a_gpu() {
    int devices = 0;
    CUDA_CHECK(cudaGetDeviceCount(&devices));
    CUDA_CHECK(cudaSetDevice(devices == 1 ? 0 : world().local_rank()));
}

// An error of one rank alone would leave the others waiting in a collective.
template <void (*kPart)(Report&)>
void together(Report& report) {
    const World& all = world();
    try {
        kPart(report);
    } catch (const std::exception& error) {
        if (all.alone()) throw;
        world().fail(error);
    }
}

// Ranks leave together: whoever left before would count as dead, and end the job before its last lines.
template <void (*kChecks)(Report&), void (*kBenches)(Report&)>
int run_dev_program_of_ranks(int argc, char** argv, const char* name) {
    constexpr int kNoGpu = 77;  // status of a dev program
    const int status = run_dev_program(argc, argv, name, together<kChecks>, together<kBenches>);
    if (status != kNoGpu) world().finish();
    return status;
}
