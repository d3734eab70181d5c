// Tensorwise FP8 quantization: amax, cast, cast with transposed copy (and bias gradient).
//
//   scale = fp8_max / max(amax, 1e-12);  q[m,n] = saturating_rne_cast(x[m,n] * scale);  qt[n,m] = q[m,n]
//
// The rule is trainer/reference/quantizer.h's, bit for bit. The slot's amax_bits must hold the tensor's amax (or zero for
// amax_*, which raise it); the casts write scale and inv_scale into the slot, and set *nonfinite (if given) to 1 when the
// amax is inf or NaN. Slots must have amax_bits zeroed before a new tensor is measured.
//
// Rows and columns may be any positive number (partial tiles are masked); 16-byte accesses are used where N % 16 == 0
// (and M % 16 == 0 for qt), which is what FP8 GEMMs require anyway. Pointers 16-byte aligned.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/dtype.h"
#include "kernels/common/quant_slot.h"

void amax_bf16(const __nv_bfloat16* x, int64_t n, QuantSlot* slot, cudaStream_t stream);
void amax_f32(const float* x, int64_t n, QuantSlot* slot, cudaStream_t stream);

enum class Producer : uint8_t {
    identity,  // value = x
    gelu,      // value = bf16(gelu(x)): x is the pre-activation, the activation itself is never stored
};

struct QuantizeActivation {
    const __nv_bfloat16* x;       // (M, N)
    uint8_t* q;                   // (M, N), or null
    uint8_t* qt;                  // (N, M), or null
    float* dbias;                 // (N), += sum over rows of the BF16 values (not of the codes), or null; deterministic,
                                  // alone only with producer = identity
    QuantSlot* slot;              // may be null when q and qt are null (bias gradient only)
    uint32_t* nonfinite;          // or null
    void* workspace;              // quantize_workspace_bytes(M, N), needed with dbias only
    int M, N;
    Dtype format;                 // e4m3 or e5m2
    Producer producer = Producer::identity;
};
size_t quantize_workspace_bytes(int M, int N);  // grows with M and with N: the largest matrix's serves all
void quantize_activation(const QuantizeActivation& p, cudaStream_t stream);

// The weights, from the FP32 master. In one launch for any number of matrices (`tensors` is in device memory).
// Skips everything, leaving q, qt and slots as they are, when *skip != 0 (skip may be null).
struct QuantizeWeight {
    const float* master;    // (N, K)
    uint8_t* q;             // (N, K)
    uint8_t* qt;            // (K, N)
    QuantSlot* slot;        // amax_bits already measured (by AdamW or amax_f32)
    int N, K;
    int64_t first_tile;     // filled in by quantize_weights_plan
};
// Fills in first_tile of the host copy and returns the number of tiles of all `count` tensors.
int64_t quantize_weights_plan(QuantizeWeight* tensors, int count);
void quantize_weights(const QuantizeWeight* device_tensors, int count, int64_t tiles, Dtype format, const uint32_t* skip,
                      uint32_t* nonfinite, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------------------------------
// The parts of quantize_weights one by one, for masters that are cut among ranks: scales from amaxes that all ranks agree on,
// codes of the elements that a rank owns, and, of gathered codes, the transposed copies. Together they give its bits.

// scale and inv_scale of `count` slots from their amax_bits; sets *nonfinite (may be null) to 1 where one is inf or NaN.
// Does nothing when *skip != 0 (skip may be null).
void quantize_scales(QuantSlot* slots, int count, Dtype format, const uint32_t* skip, uint32_t* nonfinite, cudaStream_t stream);

// q[i] = saturating_rne_cast(master[i] * slot->scale) of any number of contiguous pieces in one launch (`pieces` is in device
// memory); amax_bits is not read. Does nothing when *skip != 0.
struct QuantizePiece {
    const float* master;    // `count` elements; 16-byte aligned for full speed (and q on 4 bytes): others go one by one
    uint8_t* q;
    const QuantSlot* slot;  // of the whole matrix; scale is final
    int64_t count;          // positive
    int64_t first_tile;     // filled in by quantize_pieces_plan
};
// Fills in first_tile of the host copy and returns the number of tiles of all pieces.
int64_t quantize_pieces_plan(QuantizePiece* pieces, int count);
void quantize_pieces(const QuantizePiece* device_pieces, int count, int64_t tiles, Dtype format, const uint32_t* skip, cudaStream_t stream);

// qt[k,n] = q[n,k], any number of matrices in one launch (`matrices` is in device memory); the format does not matter.
// N and K may be any positive number; 16-byte accesses where both are multiples of 16 and q and qt are 16-byte aligned.
// q and qt must not overlap. Does nothing when *skip != 0 (skip may be null).
struct TransposeCodes {
    const uint8_t* q;    // (N, K)
    uint8_t* qt;         // (K, N)
    int N, K;
    int64_t first_tile;  // filled in by transpose_codes_plan
};
int64_t transpose_codes_plan(TransposeCodes* matrices, int count);
void transpose_codes(const TransposeCodes* device_matrices, int count, int64_t tiles, const uint32_t* skip, cudaStream_t stream);
