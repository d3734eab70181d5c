// Owners of CUDA and cuBLASLt handles and of device memory.
#pragma once
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <memory>
#include <type_traits>

#include "kernels/common/cuda_check.h"

namespace gemm_detail {

struct Destroy {
    void operator()(cublasLtHandle_t h) const { cublasLtDestroy(h); }
    void operator()(cublasLtMatmulDesc_t d) const { cublasLtMatmulDescDestroy(d); }
    void operator()(cublasLtMatrixLayout_t l) const { cublasLtMatrixLayoutDestroy(l); }
    void operator()(cublasLtMatmulPreference_t p) const { cublasLtMatmulPreferenceDestroy(p); }
    void operator()(cudaStream_t s) const { cudaStreamDestroy(s); }
    void operator()(cudaEvent_t e) const { cudaEventDestroy(e); }
};
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

struct FreeDevice {
    void operator()(void* p) const { cudaFree(p); }
};
using DeviceBytes = std::unique_ptr<void, FreeDevice>;

inline DeviceBytes allocate(size_t bytes) {
    void* p = nullptr;
    CUDA_CHECK(cudaMalloc(&p, bytes));
    return DeviceBytes(p);
}

}  // namespace gemm_detail
