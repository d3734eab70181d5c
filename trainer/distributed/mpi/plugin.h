// MPI, behind a table of C functions in a shared library of its own: it is compiled where MPI is found, and loaded only
// when mpirun started the program, so the program itself starts on a machine without MPI and with any MPI's layout of
// handles. Functions return nullptr or the name of what failed.
#pragma once
#include <cstdint>

struct MpiFunctions {
    const char* (*start)(int* rank, int* size);
    const char* (*split)(int color, int key, void** group);  // of all ranks
    const char* (*all_gather)(void* group, void* data, int64_t bytes);  // in place, as Communicator::all_gather
    const char* (*all_to_all)(void* group, void* data, int64_t bytes);  // in place: slice r goes to rank r
    const char* (*finish)();
};
constexpr const char* kMpiPluginFile = "mpi_plugin.so";
constexpr const char* kMpiPluginSymbol = "train_gpt_mpi_functions";
extern "C" const MpiFunctions* train_gpt_mpi_functions();
