#include "trainer/run/batch_check.h"

#include <algorithm>

#include "data/hash.h"

namespace {

struct Found {
    uint64_t own, others;
};

uint64_t hash(const std::vector<int>& tokens) { return hash_bytes({reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(int)}); }
uint64_t hash(const std::vector<int>& inputs, const std::vector<int>& targets) { return mix64(hash(inputs)) ^ hash(targets); }

}  // namespace

BatchCheck::BatchCheck(const DataLoader& train, World& world, int64_t samples) : train_(train), world_(world), samples_(samples) {
    if (world.alone()) return;
    inputs_.resize(size_t(samples * train.seq_len()));
    targets_.resize(inputs_.size());
}

void BatchCheck::compare(int64_t step, const std::vector<int>& inputs, const std::vector<int>& targets) {
    if (world_.alone()) return;
    const int size = world_.size(), rank = world_.rank();
    const auto checked_by = [&](int r) { return (r + size / 2) % size; };
    train_.fill(step, samples_ * checked_by(rank), samples_, inputs_.data(), targets_.data());
    std::vector<Found> found(static_cast<size_t>(size));
    found[size_t(rank)] = {.own = hash(inputs, targets), .others = hash(inputs_, targets_)};
    world_.host().all_gather(found.data(), sizeof(Found));
    for (int r = 0; r < size; ++r) {
        const int other = checked_by(r);
        if (found[size_t(r)].others != found[size_t(other)].own)
            throw JobError(message("rank %d has other training data than rank %d where step %lld reads them: give every machine the same shards", std::max(r, other),
                                   std::min(r, other), static_cast<long long>(step + 1)));
    }
}
