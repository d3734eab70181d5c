// Which process of a job is this? From the environment that torchrun, Open MPI, PMI launchers (MPICH, Intel MPI) and
// Slurm's srun set, or RANK and WORLD_SIZE. Without any of them: one process.
#pragma once
#include <functional>
#include <string>

struct Launch {
    int rank = 0, size = 1;
    int local_rank = -1;    // among the ranks of this machine; -1: the launcher does not say
    int local_size = -1;    // ranks of this machine
    std::string launcher;   // "" without one
    std::string address;    // of rank 0, "" when nothing says
    int port = 0;           // MASTER_PORT, under torchrun the one after it: torchrun's own store listens at that; 0: when nothing says
    std::string job;        // the launcher's name of the job, so that two jobs on one machine never mix; may be ""
};

using Environment = std::function<const char*(const char*)>;  // getenv
Launch find_launch(const Environment& environment);
