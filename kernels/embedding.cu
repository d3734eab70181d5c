// Token and position embedding.
//
// Forward: one thread makes 8 neighbouring channels of one position. Bytes: 2 written a value; the rows of wte that
// occur and wpe are read from memory about once each and from L2 after that.
//
// Backward without atomics: many positions share a token, so positions are first sorted by token (stable radix sort of
// CUB, so equal tokens stay in order of position), then summed. Frequent tokens are tens of thousands of positions and
// most tokens are a handful, so the sorted list is cut into chunks of 32 positions whatever the tokens are:
//   sum_chunks     one block a chunk walks it in order. A run of equal tokens that lies wholly inside is added to its
//                  row of dwte at once. A run that crosses a border leaves a partial sum: at most one at the chunk's
//                  beginning (the run comes from before) and one at its end (the run starts here and goes on).
//   combine_runs   the chunk in which a crossing run starts adds up the run's partial sums: four threads a column group
//                  take every fourth chunk each, in order, then their four sums are added in order.
// Each row of dwte is written by one thread a column, and every order of additions is a function of the tokens alone.
// Bytes: dout read once for dwte and once for dwpe, dwte's touched rows and dwpe read and written once.
#include "kernels/embedding.h"

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>

#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/mark.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Forward

constexpr int kForwardThreads = 256;

__global__ void __launch_bounds__(kForwardThreads) forward_kernel(const EmbeddingForward p, uint32_t vectors,
                                                                  uint32_t vectors_per_row) {
    const uint32_t index = blockIdx.x * kForwardThreads + threadIdx.x;
    if (index >= vectors) return;
    const uint32_t position = index / vectors_per_row, c = index % vectors_per_row * 8;
    const Bf16x8 token = load<Bf16x8>(p.wte + int64_t(p.tokens[position]) * p.C + c);
    const Bf16x8 place = load<Bf16x8>(p.wpe + int64_t(position % uint32_t(p.T)) * p.C + c);
    Bf16x8 out;
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = __float2bfloat16_rn(__bfloat162float(token[j]) + __bfloat162float(place[j]));
    store(p.out + int64_t(position) * p.C + c, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: positions

constexpr int kPositionThreads = 128;

// dwpe[t,:] += sum over b in order: one thread owns 8 channels of one t.
__global__ void __launch_bounds__(kPositionThreads)
    positions_kernel(const bf16* __restrict__ dout, float* __restrict__ dwpe, int B, int64_t row_size) {
    const int64_t i = (int64_t(blockIdx.x) * kPositionThreads + threadIdx.x) * 8;
    if (i >= row_size) return;
    float sum[8] = {};
#pragma unroll 8
    for (int b = 0; b < B; ++b) {
        const Bf16x8 v = load<Bf16x8>(dout + b * row_size + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += __bfloat162float(v[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
        F32x4 total = load<F32x4>(dwpe + i + j);
#pragma unroll
        for (int k = 0; k < 4; ++k) total[k] += sum[j + k];
        store(dwpe + i + j, total);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: tokens

constexpr int kChunk = 32;        // sorted positions a block walks
constexpr int kBatch = 8;         // of them loaded together
constexpr int kMostThreads = 256; // a thread owns 4 channels
static_assert(kChunk % kBatch == 0 && kChunk == kWarpSize);  // one warp looks at a chunk's tokens

__global__ void number_positions_kernel(int* positions, int n) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) positions[i] = int(i);
}

struct TokenSums {
    const uint32_t* tokens;    // sorted
    const int* positions;      // in the same order
    const bf16* dout;          // (n, C), rows in the original order
    float* dwte;
    float* partials;           // (chunks, 2, C): of the run that comes from before, of the run that goes on
    int n, C;
};
constexpr int kFromBefore = 0, kGoesOn = 1;

__device__ __forceinline__ float* partial_row(const TokenSums& p, int64_t chunk, int which) {
    return p.partials + (chunk * 2 + which) * p.C;
}
__device__ __forceinline__ void add(F32x4& sum, const F32x4& v) {
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += v[k];
}

__global__ void __launch_bounds__(kMostThreads) sum_chunks_kernel(const TokenSums p) {
    // Where a run ends, and where its sum goes then.
    enum : uint8_t { kInside, kToRow, kToFromBefore, kToGoesOn };
    __shared__ uint32_t tokens[kChunk];
    __shared__ int positions[kChunk];
    __shared__ uint8_t ends[kChunk];
    const int64_t chunk = blockIdx.x, begin = chunk * kChunk;
    const int length = int(min(int64_t(kChunk), p.n - begin));
    if (threadIdx.x < kChunk) {
        const int i = threadIdx.x;
        const bool valid = i < length;
        const uint32_t token = valid ? p.tokens[begin + i] : 0;
        // Token 0xffffffff does not occur (tokens are below 2^31), so it differs from every neighbour.
        const uint32_t none = ~0u;
        const uint32_t before = begin > 0 ? p.tokens[begin - 1] : none;
        const uint32_t next = valid && begin + i + 1 < p.n ? p.tokens[begin + i + 1] : none;
        // The chunk's first run comes from before if the last token of the chunk before is its token.
        const uint32_t first = __shfl_sync(~0u, token, 0);
        const bool from_before = token == first && before == first;
        tokens[i] = token;
        positions[i] = valid ? p.positions[begin + i] : 0;
        const bool last = i == length - 1;
        if (!valid || (next == token && !last))
            ends[i] = kInside;
        else if (from_before)
            ends[i] = kToFromBefore;
        else
            ends[i] = next == token ? kToGoesOn : kToRow;
    }
    __syncthreads();

    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (c >= p.C) return;
    F32x4 sum{};
#pragma unroll 1
    for (int base = 0; base < length; base += kBatch) {
        // The rows that will be added to are loaded together with the gradients, not when a run ends.
        Vec<bf16, 4> v[kBatch];
        F32x4 row[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int i = base + k;
            if (i < length) v[k] = load<Vec<bf16, 4>>(p.dout + int64_t(positions[i]) * p.C + c);
            if (ends[i] == kToRow) row[k] = load<F32x4>(p.dwte + int64_t(tokens[i]) * p.C + c);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int i = base + k;
            if (i >= length) break;
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[j] += __bfloat162float(v[k][j]);
            const uint8_t end = ends[i];
            if (end == kInside) continue;
            if (end == kToRow) {
                add(row[k], sum);
                store(p.dwte + int64_t(tokens[i]) * p.C + c, row[k]);
            } else {
                store(partial_row(p, chunk, end == kToGoesOn ? kGoesOn : kFromBefore) + c, sum);
            }
            sum = F32x4{};
        }
    }
}

constexpr int kCombineColumns = 64;  // threads side by side, 4 channels each
constexpr int kCombineLanes = 4;     // threads that share a run's chunks
constexpr int kCombineThreads = kCombineColumns * kCombineLanes;

__global__ void __launch_bounds__(kCombineThreads) combine_runs_kernel(const TokenSums p) {
    const int64_t chunk = blockIdx.x, begin = chunk * kChunk, end = begin + kChunk;
    if (end >= p.n) return;  // the last chunk: nothing goes on
    const uint32_t token = p.tokens[end - 1];
    if (p.tokens[end] != token) return;
    // The run goes on. It starts in this chunk unless it fills the chunk and the one before ends with it.
    if (begin > 0 && p.tokens[begin] == token && p.tokens[begin - 1] == token) return;

    // The chunks after this one whose first token is the run's are the run's, and they are consecutive.
    const int64_t chunks = ceil_div(p.n, kChunk), thread = threadIdx.y * kCombineColumns + threadIdx.x;
    int64_t last = chunk;
    for (int found = kCombineThreads; found == kCombineThreads; last += found) {
        const int64_t k = last + 1 + thread;
        found = __syncthreads_count(k < chunks && p.tokens[k * kChunk] == token);
    }

    __shared__ F32x4 lanes[kCombineLanes][kCombineColumns];
    const int c = (blockIdx.y * kCombineColumns + threadIdx.x) * 4;
    F32x4 sum{};
    if (c < p.C)
#pragma unroll 8
        for (int64_t k = chunk + 1 + threadIdx.y; k <= last; k += kCombineLanes)
            add(sum, load<F32x4>(partial_row(p, k, kFromBefore) + c));
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= p.C) return;
    F32x4 total = load<F32x4>(partial_row(p, chunk, kGoesOn) + c);
#pragma unroll
    for (int lane = 0; lane < kCombineLanes; ++lane) add(total, lanes[lane][threadIdx.x]);
    float* row = p.dwte + int64_t(token) * p.C + c;
    add(total, load<F32x4>(row));
    store(row, total);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Bits that tell V tokens apart; the sort looks at these only.
int token_bits(int V) {
    int bits = 1;
    while ((int64_t(1) << bits) < V) ++bits;
    return bits;
}

struct Workspace {
    size_t sort, tokens, unsorted, positions, partials, bytes;  // offsets; size of CUB's part
    size_t sort_bytes;
};
Workspace workspace_of(int64_t n, int C, int V) {
    Workspace w{};
    const uint32_t* keys = nullptr;
    const int* values = nullptr;
    int device;
    if (cudaGetDevice(&device) == cudaSuccess) {
        CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, w.sort_bytes, keys, const_cast<uint32_t*>(keys), values,
                                                   const_cast<int*>(values), static_cast<int>(n), 0, token_bits(V)));
    } else {  // a plan on a machine without a GPU: a second copy of keys and values, and histograms
        cudaGetLastError();
        w.sort_bytes = static_cast<size_t>(n) * (sizeof(uint32_t) + sizeof(int)) + (size_t(1) << 20);
    }
    const auto place = [&](size_t bytes) {
        const size_t at = w.bytes;
        w.bytes += static_cast<size_t>(ceil_div(static_cast<int64_t>(bytes), 256) * 256);
        return at;
    };
    w.sort = place(w.sort_bytes);
    w.tokens = place(static_cast<size_t>(n) * sizeof(uint32_t));
    w.unsorted = place(static_cast<size_t>(n) * sizeof(int));
    w.positions = place(static_cast<size_t>(n) * sizeof(int));
    w.partials = place(static_cast<size_t>(ceil_div(n, kChunk)) * 2 * static_cast<size_t>(C) * sizeof(float));
    return w;
}

void require_shape(const char* what, int B, int T, int C) {
    REQUIRE(B > 0 && T > 0 && C > 0 && C % 8 == 0, "%s: B=%d, T=%d must be positive, C=%d a multiple of 8", what, B, T,
            C);
    REQUIRE(int64_t(B) * T < (int64_t(1) << 31), "%s: B*T=%lld must be below 2^31", what,
            static_cast<long long>(int64_t(B) * T));
}

}  // namespace

void embedding_forward(const EmbeddingForward& p, cudaStream_t stream) {
    const Mark mark("embedding_forward", {.bytes = 4.0 * p.B * p.T * p.C + 2.0 * p.T * p.C});
    require_shape("embedding_forward", p.B, p.T, p.C);
    REQUIRE(aligned(p.wte) && aligned(p.wpe) && aligned(p.out),
            "embedding_forward: wte=%p, wpe=%p, out=%p must be 16-byte aligned", static_cast<const void*>(p.wte),
            static_cast<const void*>(p.wpe), static_cast<const void*>(p.out));
    const int64_t vectors = int64_t(p.B) * p.T * (p.C / 8);
    REQUIRE(vectors < (int64_t(1) << 31), "embedding_forward: B=%d, T=%d, C=%d is too large", p.B, p.T, p.C);
    forward_kernel<<<static_cast<unsigned>(ceil_div(vectors, kForwardThreads)), kForwardThreads, 0, stream>>>(
        p, static_cast<uint32_t>(vectors), static_cast<uint32_t>(p.C / 8));
    CUDA_CHECK_LAUNCH();
}

size_t embedding_backward_workspace_bytes(int B, int T, int C, int V) {
    require_shape("embedding_backward", B, T, C);
    return workspace_of(int64_t(B) * T, C, V).bytes;
}

void embedding_backward(const EmbeddingBackward& p, cudaStream_t stream) {
    // dwte: only the rows of tokens that occur, unknown here and not counted.
    const Mark mark("embedding_backward", {.bytes = 2.0 * p.B * p.T * p.C + 8.0 * p.T * p.C});
    require_shape("embedding_backward", p.B, p.T, p.C);
    REQUIRE(aligned(p.dout) && aligned(p.dwte) && aligned(p.dwpe),
            "embedding_backward: dout=%p, dwte=%p, dwpe=%p must be 16-byte aligned", static_cast<const void*>(p.dout),
            static_cast<const void*>(p.dwte), static_cast<const void*>(p.dwpe));
    REQUIRE(p.V > 0 && p.workspace != nullptr && reinterpret_cast<uintptr_t>(p.workspace) % 256 == 0,
            "embedding_backward: V=%d must be positive, workspace=%p 256-byte aligned", p.V, p.workspace);
    const int n = p.B * p.T;

    const int64_t row_size = int64_t(p.T) * p.C;
    positions_kernel<<<static_cast<unsigned>(ceil_div(row_size / 8, kPositionThreads)), kPositionThreads, 0, stream>>>(
        p.dout, p.dwpe, p.B, row_size);
    CUDA_CHECK_LAUNCH();

    Workspace w = workspace_of(n, p.C, p.V);
    char* base = static_cast<char*>(p.workspace);
    auto* sorted_tokens = reinterpret_cast<uint32_t*>(base + w.tokens);
    int* unsorted = reinterpret_cast<int*>(base + w.unsorted);
    int* sorted_positions = reinterpret_cast<int*>(base + w.positions);
    number_positions_kernel<<<static_cast<unsigned>(ceil_div(n, 256)), 256, 0, stream>>>(unsorted, n);
    CUDA_CHECK_LAUNCH();
    const auto* tokens = reinterpret_cast<const uint32_t*>(p.tokens);
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(base + w.sort, w.sort_bytes, tokens, sorted_tokens, unsorted,
                                               sorted_positions, n, 0, token_bits(p.V), stream));

    const TokenSums sums{
        .tokens = sorted_tokens,
        .positions = sorted_positions,
        .dout = p.dout,
        .dwte = p.dwte,
        .partials = reinterpret_cast<float*>(base + w.partials),
        .n = n,
        .C = p.C,
    };
    const auto chunks = static_cast<unsigned>(ceil_div(n, kChunk));
    // Threads of 4 channels: as few blocks a chunk as fit, all of the same whole number of warps.
    const int64_t groups = p.C / 4, blocks_per_chunk = ceil_div(groups, kMostThreads);
    const int64_t threads = ceil_div(ceil_div(groups, blocks_per_chunk), kWarpSize) * kWarpSize;
    const dim3 chunk_grid(chunks, static_cast<unsigned>(blocks_per_chunk));
    sum_chunks_kernel<<<chunk_grid, static_cast<unsigned>(threads), 0, stream>>>(sums);
    CUDA_CHECK_LAUNCH();
    const auto column_blocks = static_cast<unsigned>(ceil_div(groups, kCombineColumns));
    combine_runs_kernel<<<dim3(chunks, column_blocks), dim3(kCombineColumns, kCombineLanes), 0, stream>>>(sums);
    CUDA_CHECK_LAUNCH();
}
