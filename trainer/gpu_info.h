// What a run was made with: source, libraries, device. Host code; works without a GPU.
#pragma once
#include <string>
#include <utility>
#include <vector>

std::string git_commit();  // given by the build (TRAIN_GPT_COMMIT), "unknown" otherwise

// "compiler", "cuda_runtime", "cuda_driver", "cublaslt" and their versions, in this order; a missing driver is "none".
std::vector<std::pair<std::string, std::string>> library_versions();

// Why no CUDA device can be used, "" if one can.
std::string gpu_obstacle();

struct GpuInfo {
    std::string name;
    int sm_count, compute_major, compute_minor;
    double memory_bytes;
};
GpuInfo gpu_info(int device);
