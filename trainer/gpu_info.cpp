#include "trainer/gpu_info.h"

#include <cublasLt.h>

#include "kernels/common/check.h"
#include "kernels/common/cuda_check.h"

#ifndef TRAIN_GPT_COMMIT
#define TRAIN_GPT_COMMIT "unknown"
#endif

namespace {
std::string cuda_version(int v) { return message("%d.%d", v / 1000, v % 1000 / 10); }  // 13000 is 13.0
}  // namespace

std::string git_commit() { return TRAIN_GPT_COMMIT; }

std::vector<std::pair<std::string, std::string>> library_versions() {
    int runtime = 0, driver = 0;  // the driver's stays 0 where there is none
    CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    const size_t lt = cublasLtGetVersion();
    return {{"compiler", "g++ " __VERSION__},
            {"cuda_runtime", cuda_version(runtime)},
            {"cuda_driver", driver > 0 ? cuda_version(driver) : "none"},
            {"cublaslt", message("%zu.%zu.%zu", lt / 10000, lt / 100 % 100, lt % 100)}};
}

std::string gpu_obstacle() {
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaSuccess) {
        cudaGetLastError();  // the answer is the return value; leave no error behind
        return status == cudaErrorInsufficientDriver ? "no NVIDIA driver, or one that is too old" : cudaGetErrorString(status);
    }
    return devices > 0 ? "" : "no CUDA device";
}

GpuInfo gpu_info(int device) {
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    return {.name = properties.name,
            .sm_count = properties.multiProcessorCount,
            .compute_major = properties.major,
            .compute_minor = properties.minor,
            .memory_bytes = double(properties.totalGlobalMem)};
}
