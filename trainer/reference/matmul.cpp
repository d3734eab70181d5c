// Register-tiled matrix product (Goto and van de Geijn, 2008, without the cache blocking of A: rows of A are read in
// place, B is packed into panels of 16 columns).
#include "trainer/reference/matmul.h"

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/common/mark.h"
#include "trainer/reference/parallel.h"

namespace reference {
namespace {

constexpr int kTileRows = 6, kTileCols = 16;  // 6 x 16 accumulators: 6 AVX-512 or 12 of the 16 AVX2 registers
constexpr int kGroup = 256;                   // products summed before their sum is added to the total
constexpr int kTaskRows = 16 * kTileRows;     // rows that one task multiplies with one panel of B

using Columns = float __attribute__((vector_size(kTileCols * sizeof(float))));

// rows[i] points at A(i, 0), A(i, k) is rows[i][k * step]; panel is (K, kTileCols).
REFERENCE_VECTORIZED void multiply_tile(const float* const* rows, int64_t step, const float* panel, int K, float* tile) {
    Columns total[kTileRows] = {};
    for (int start = 0; start < K; start += kGroup) {
        Columns sum[kTileRows] = {};
        const int stop = std::min(K, start + kGroup);
        for (int k = start; k < stop; ++k) {
            Columns b;
            std::memcpy(&b, panel + int64_t(k) * kTileCols, sizeof b);
#pragma GCC unroll 6
            for (int i = 0; i < kTileRows; ++i) sum[i] += rows[i][k * step] * b;
        }
#pragma GCC unroll 6
        for (int i = 0; i < kTileRows; ++i) total[i] += sum[i];
    }
    std::memcpy(tile, total, sizeof total);
}

// Columns [col, col + kTileCols) of B as (K, kTileCols); columns past the end are zero.
void pack_panel(const Matmul& p, int col, float* panel) {
    const int cols = std::min(kTileCols, p.N - col);
    if (cols < kTileCols) std::memset(panel, 0, sizeof(float) * size_t(p.K) * kTileCols);
    if (p.b_transposed) {
        for (int j = 0; j < cols; ++j)
            for (int k = 0; k < p.K; ++k) panel[int64_t(k) * kTileCols + j] = p.b[int64_t(col + j) * p.K + k];
    } else {
        for (int k = 0; k < p.K; ++k)
            std::memcpy(panel + int64_t(k) * kTileCols, p.b + int64_t(k) * p.N + col, sizeof(float) * size_t(cols));
    }
}

void store_tile(const Matmul& p, int row, int col, const float* tile) {
    const int rows = std::min(kTileRows, p.M - row), cols = std::min(kTileCols, p.N - col);
    for (int i = 0; i < rows; ++i) {
        float* d = p.d + int64_t(row + i) * p.N + col;
        for (int j = 0; j < cols; ++j) {
            float value = p.alpha * tile[i * kTileCols + j];
            if (p.bias) value += p.bias[col + j];
            d[j] = p.accumulate ? d[j] + value : value;
        }
    }
}

void multiply_panel(const Matmul& p, int first_row, int last_row, int col, const float* panel) {
    const int64_t row_step = p.a_transposed ? 1 : p.K, k_step = p.a_transposed ? p.M : 1;
    for (int row = first_row; row < last_row; row += kTileRows) {
        const float* rows[kTileRows];  // past the end, the last row again: its results are dropped
        for (int i = 0; i < kTileRows; ++i) rows[i] = p.a + std::min(row + i, p.M - 1) * row_step;
        float tile[kTileRows * kTileCols];
        multiply_tile(rows, k_step, panel, p.K, tile);
        store_tile(p, row, col, tile);
    }
}

}  // namespace

void matmul(const Matmul& p) {
    const Mark mark("matmul");
    const int panels = (p.N + kTileCols - 1) / kTileCols, blocks = (p.M + kTaskRows - 1) / kTaskRows;
    const int64_t panel_size = int64_t(p.K) * kTileCols;
    static thread_local std::vector<float> packed_storage;  // kept from call to call: growing it costs page faults
    if (packed_storage.size() < size_t(panels * panel_size)) packed_storage.resize(size_t(panels * panel_size));
    float* packed = packed_storage.data();
    parallel_ranges(panels, grain_for(panel_size), [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) pack_panel(p, int(panel) * kTileCols, packed + panel * panel_size);
    });
    // Vectors make a multiplication about a sixteenth of an element operation.
    parallel_ranges(int64_t(panels) * blocks, grain_for(std::min(p.M, kTaskRows) * int64_t(p.K)), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int block = int(task / panels), panel = int(task % panels);
            multiply_panel(p, block * kTaskRows, std::min(p.M, (block + 1) * kTaskRows), panel * kTileCols,
                           packed + panel * panel_size);
        }
    });
}

}  // namespace reference
