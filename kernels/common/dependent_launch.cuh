// Programmatic dependent launch (sm_90 and later): a short kernel that finishes what a long one began is launched while
// the last blocks of the long one still run, so its launch latency is hidden. On older GPUs: ordinary launches.
//
//   long kernel:   allow_dependent_launch() anywhere (the first line is best)
//   short kernel:  wait_for_previous_kernel() before it touches anything that the long kernel reads or writes
#pragma once
#include "kernels/common/cuda_check.h"

__device__ __forceinline__ void allow_dependent_launch() {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}
// Returns when the kernel before has ended and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = TRAIN_GPT_ARCH >= 90 ? 1 : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}
