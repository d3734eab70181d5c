// Many matrices or pieces in one launch: each owns a run of the grid's blocks, those from its first_tile on.
#pragma once
#include <cstdint>

// The block's item is the last one that starts at or before the block. Counting those with all threads at once costs one round
// trip to memory; a binary search would cost log2(count) of them. Every thread of the block must call.
template <int kThreads, class Item>
__device__ __forceinline__ Item block_item(const Item* __restrict__ items, int count) {
    int started = 0;
    for (int base = 0; base < count; base += kThreads) {
        const int i = base + threadIdx.x;
        started += __syncthreads_count(i < count && items[i].first_tile <= int64_t(blockIdx.x));
    }
    return items[started - 1];
}
