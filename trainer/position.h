// Where a micro-batch stands in its step. Each position has a graph of its own, because they differ:
//
//   only, first   the GEMMs of the weight gradients write (beta = 0) instead of adding, so that the gradients are neither
//                 cleared nor read; the few that only kernels add to (norms, biases, positions) are cleared by one memset
//   middle, last  everything is added to what is there
//   only, last    afterwards the gradients of the step are complete
#pragma once
#include <cstdint>

enum class Position : uint8_t { only, first, middle, last };
constexpr int kPositions = 4;

constexpr Position position_of(int micro_batch, int micro_batches) {
    if (micro_batches == 1) return Position::only;
    return micro_batch == 0 ? Position::first : micro_batch == micro_batches - 1 ? Position::last : Position::middle;
}
constexpr bool starts_gradients(Position p) { return p == Position::only || p == Position::first; }
constexpr bool completes_gradients(Position p) { return p == Position::only || p == Position::last; }
