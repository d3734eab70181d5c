// Number of multiprocessors of the current device, asked once: for grids that fill the GPU exactly.
#pragma once
#include "kernels/common/cuda_check.h"

inline int sm_count() {
    static const int count = [] {
        int device = 0, sms = 0;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
        return sms;
    }();
    return count;
}
