#include "kernels/common/arena.h"

#include "kernels/common/cuda_check.h"

namespace {
constexpr size_t kAlignment = 512;  // at least what TMA, cuBLASLt workspaces and NCCL slices ask for
constexpr size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::shared_ptr<void> plain_memory(size_t bytes) {
    void* memory = nullptr;
    CUDA_CHECK(cudaMalloc(&memory, bytes));
    return {memory, [](void* p) { cudaFree(p); }};
}
}  // namespace

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

void Arena::allocate(const std::function<std::shared_ptr<void>(size_t)>& take) {
    require_fits();
    const size_t total = total_bytes();
    if (total == 0) return;
    if (take) base_ = take(total);
    if (!base_) base_ = plain_memory(total);
    CUDA_CHECK(cudaMemset(base_.get(), 0, total));
    char* next = static_cast<char*>(base_.get());
    for (const Request& r : requests_) {
        *r.pointer = next;
        next += aligned(r.bytes);
    }
}
