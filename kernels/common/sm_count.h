// Number of multiprocessors of the current device, asked once: for grids that fill the GPU exactly. Without a device an H100's,
// so that a run's memory can be planned.
#pragma once
#include "kernels/common/cuda_check.h"

inline int sm_count() {
    static const int count = [] {
        int device = 0, sms = 132;
        if (cudaGetDevice(&device) != cudaSuccess) {
            cudaGetLastError();
            return sms;
        }
        CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
        return sms;
    }();
    return count;
}
