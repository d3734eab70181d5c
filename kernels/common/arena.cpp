#include "kernels/common/arena.h"

#include "kernels/common/cuda_check.h"

namespace {
constexpr size_t kAlignment = 512;  // at least what TMA, cuBLASLt workspaces and NCCL slices ask for
constexpr size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
}  // namespace

Arena::~Arena() { cudaFree(base_); }

size_t Arena::total_bytes() const {
    size_t total = 0;
    for (const Request& r : requests_) total += aligned(r.bytes);
    return total;
}

std::vector<Arena::Row> Arena::table() const {
    std::vector<Row> rows;
    for (const Request& r : requests_) {
        size_t i = 0;
        while (i < rows.size() && rows[i].what != r.row) ++i;
        if (i == rows.size()) rows.push_back({r.row, 0});
        rows[i].bytes += aligned(r.bytes);
    }
    return rows;
}

void Arena::require_fits() const {
    size_t free_bytes = 0, device_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &device_bytes));
    const size_t total = total_bytes();
    REQUIRE(total <= free_bytes, "the run needs %.2f GiB of device memory but %.2f GiB of %.2f are free: lower --micro-batch or choose a smaller model",
            double(total) / (1 << 30), double(free_bytes) / (1 << 30), double(device_bytes) / (1 << 30));
}

void Arena::allocate() {
    require_fits();
    const size_t total = total_bytes();
    if (total == 0) return;
    CUDA_CHECK(cudaMalloc(&base_, total));
    CUDA_CHECK(cudaMemset(base_, 0, total));
    char* next = static_cast<char*>(base_);
    for (const Request& r : requests_) {
        *r.pointer = next;
        next += aligned(r.bytes);
    }
}
