// Tensor maps for TMA, made on the host and passed to kernels by value as `const __grid_constant__ CUtensorMap`.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstdint>
#include <initializer_list>

#include "kernels/common/cuda_check.h"
#include "kernels/common/dtype.h"

// One dimension, fastest first. The first one's elements are contiguous and its stride is not looked at; the others' are
// in elements, and multiples of 16 bytes. `box`: how many a copy moves, at most 256. What a copy reads past `size` is
// zero and what it writes there is dropped, in every dimension by itself.
struct TensorMapDimension {
    int64_t size, stride;
    int box;
};

// The driver's encoder, found through the runtime: the program links no libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
        REQUIRE(found == cudaDriverEntryPointSuccess && entry,
                "the CUDA driver has no cuTensorMapEncodeTiled (query result %d): it is older than CUDA 12", int(found));
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
    }();
    return encoder;
}

// f32 or bf16 elements at `base` (a multiple of 16). `swizzle` CU_TENSOR_MAP_SWIZZLE_128B wants box[0] elements to fill
// 128 bytes; see ptx.cuh.
inline CUtensorMap make_tensor_map(const void* base, Dtype type, CUtensorMapSwizzle swizzle,
                                   std::initializer_list<TensorMapDimension> dimensions) {
    constexpr int kMaxRank = 5;
    REQUIRE(type == Dtype::f32 || type == Dtype::bf16, "tensor map: no element type for %s", name_of(type));
    REQUIRE(dimensions.size() >= 1 && dimensions.size() <= kMaxRank, "tensor map: rank %zu must be 1..5", dimensions.size());
    cuuint64_t sizes[kMaxRank] = {}, stride_bytes[kMaxRank] = {};
    cuuint32_t box[kMaxRank] = {}, element_strides[kMaxRank] = {};
    int rank = 0;
    for (const TensorMapDimension& d : dimensions) {
        sizes[rank] = cuuint64_t(d.size);
        box[rank] = cuuint32_t(d.box);
        element_strides[rank] = 1;
        if (rank > 0) stride_bytes[rank - 1] = cuuint64_t(d.stride) * bytes_of(type);
        ++rank;
    }
    CUtensorMap map;
    const CUresult status = tensor_map_encoder()(
        &map, type == Dtype::f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(rank),
        const_cast<void*>(base), sizes, stride_bytes, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    REQUIRE(status == CUDA_SUCCESS,
            "cuTensorMapEncodeTiled failed (%d): base %p, rank %d, size %llu x %llu x %llu x %llu, box %u x %u x %u x %u",
            int(status), base, rank, (unsigned long long)sizes[0], (unsigned long long)sizes[1],
            (unsigned long long)sizes[2], (unsigned long long)sizes[3], box[0], box[1], box[2], box[3]);
    return map;
}
