#include "trainer/distributed/launch.h"

#include <charconv>
#include <cstring>

#include "kernels/common/check.h"

namespace {

struct Launcher {
    const char *name, *rank, *size, *local_rank, *local_size, *job, *address;
    bool names_its_job = false;  // always: without it, its variables are another's
};
// The first launcher whose rank and size are both set; torchrun's processes may run inside of srun, Open MPI's too.
constexpr Launcher kLaunchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", nullptr, true},
    {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE", nullptr},
    // Slurm's too: srun --mpi=pmi2.
    {"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_JOBID", "SLURM_LAUNCH_NODE_IPADDR"},
    // Set by hand or by a script; also by containers made for PyTorch, whose RANK=0 WORLD_SIZE=1 mpirun's ranks inherit.
    {"RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", nullptr, nullptr},
    // A step's own count: a batch script has SLURM_NTASKS too, and is one process.
    {"Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", nullptr, "SLURM_JOB_ID", "SLURM_LAUNCH_NODE_IPADDR"},
};

int number(const Environment& environment, const char* name, int least, int most) {
    const char* text = environment(name);
    int value = 0;
    const auto [end, error] = std::from_chars(text, text + std::strlen(text), value);
    REQUIRE(error == std::errc() && *end == '\0' && value >= least && value <= most, "environment variable %s=%s: must be a whole number from %d to %d",
            name, text, least, most);
    return value;
}

bool is_set(const Environment& environment, const char* name) {
    const char* text = name ? environment(name) : nullptr;
    return text && *text;
}

constexpr int kMostRanks = 65536;

}  // namespace

Launch find_launch(const Environment& environment) {
    Launch launch;
    for (const Launcher& l : kLaunchers) {
        if (!is_set(environment, l.rank) || !is_set(environment, l.size) || (l.names_its_job && !is_set(environment, l.job))) continue;
        launch.launcher = l.name;
        launch.size = number(environment, l.size, 1, kMostRanks);
        launch.rank = number(environment, l.rank, 0, launch.size - 1);
        if (is_set(environment, l.local_rank)) launch.local_rank = number(environment, l.local_rank, 0, launch.size - 1);
        if (is_set(environment, l.local_size)) launch.local_size = number(environment, l.local_size, 1, launch.size);
        if (is_set(environment, l.job)) launch.job = environment(l.job);
        if (is_set(environment, l.address)) launch.address = environment(l.address);
        break;
    }
    if (is_set(environment, "MASTER_ADDR")) launch.address = environment("MASTER_ADDR");
    const bool store_holds_port = launch.launcher == kLaunchers[0].name;
    if (is_set(environment, "MASTER_PORT")) launch.port = number(environment, "MASTER_PORT", 1, 65535 - store_holds_port) + store_holds_port;
    return launch;
}
