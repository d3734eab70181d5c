// How the reference device uses a CPU: fixed ranges over threads, and inner loops compiled for several vector widths.
//
// Ranges do not depend on the number of threads and no sum is ever split over threads, so neither do results. Wider
// vectors do not change them either: -std=c++20 forbids GCC to contract a*b+c or to reorder a sum.
#pragma once
#include <algorithm>
#include <cstdint>

// On a function with the hot loop itself: OpenMP's outlined bodies are not compiled once per target.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define REFERENCE_VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define REFERENCE_VECTORIZED
#endif

namespace reference {

// body(begin, end) for consecutive ranges of `grain` (the last may be shorter) of [0, n).
template <typename Body>
void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
    const int64_t ranges = (n + grain - 1) / grain;
#pragma omp parallel for schedule(static) if (ranges > 1)
    for (int64_t i = 0; i < ranges; ++i) body(i * grain, std::min(n, (i + 1) * grain));
}

// Items of a range, given the element operations of one: enough to outweigh handing the range to a thread, which takes
// microseconds, or milliseconds when other programs hold the cores.
inline int64_t grain_for(int64_t work_of_item) { return std::max<int64_t>(1, (1 << 15) / work_of_item); }

}  // namespace reference
