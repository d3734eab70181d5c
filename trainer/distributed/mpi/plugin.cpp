#include "trainer/distributed/mpi/plugin.h"

#include <mpi.h>

#include <climits>

namespace {

MPI_Comm* as_group(void* group) { return static_cast<MPI_Comm*>(group); }

const char* start(int* rank, int* size) {
    int provided = 0;
    if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) return "MPI_Init_thread";
    if (provided < MPI_THREAD_FUNNELED) return "MPI_Init_thread: no MPI_THREAD_FUNNELED";
    if (MPI_Comm_rank(MPI_COMM_WORLD, rank) != MPI_SUCCESS || MPI_Comm_size(MPI_COMM_WORLD, size) != MPI_SUCCESS) return "MPI_Comm_rank";
    return nullptr;
}

const char* split(int color, int key, void** group) {
    auto* made = new MPI_Comm;  // lives as long as the process: MPI_Finalize frees what it stands for
    *group = made;
    return MPI_Comm_split(MPI_COMM_WORLD, color, key, made) == MPI_SUCCESS ? nullptr : "MPI_Comm_split";
}

const char* all_gather(void* group, void* data, int64_t bytes) {
    if (bytes > INT_MAX) return "MPI_Allgather of 2 GiB a rank or more";
    const int n = int(bytes);
    return MPI_Allgather(MPI_IN_PLACE, 0, MPI_BYTE, data, n, MPI_BYTE, *as_group(group)) == MPI_SUCCESS ? nullptr : "MPI_Allgather";
}

const char* all_to_all(void* group, void* data, int64_t bytes) {
    if (bytes > INT_MAX) return "MPI_Alltoall of 2 GiB a rank or more";
    const int n = int(bytes);
    return MPI_Alltoall(MPI_IN_PLACE, 0, MPI_BYTE, data, n, MPI_BYTE, *as_group(group)) == MPI_SUCCESS ? nullptr : "MPI_Alltoall";
}

const char* finish() { return MPI_Finalize() == MPI_SUCCESS ? nullptr : "MPI_Finalize"; }

constexpr MpiFunctions kFunctions{start, split, all_gather, all_to_all, finish};

}  // namespace

const MpiFunctions* train_gpt_mpi_functions() { return &kFunctions; }
