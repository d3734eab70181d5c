// body(i, thread) for every i < count, on `threads` threads (0 <= thread < threads), in no particular order. The
// exception of the smallest i that throws is thrown again here, after the others have finished.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

template <typename Body>
void parallel_for(size_t count, int threads, const Body& body) {
    std::atomic<size_t> next = 0;
    std::mutex mutex;
    std::exception_ptr error;
    size_t error_index = count;
    const auto work = [&](int thread) {
        for (size_t i = next++; i < count; i = next++) {
            try {
                body(i, thread);
            } catch (...) {
                const std::lock_guard lock(mutex);
                if (i < error_index) error = std::current_exception();
                error_index = std::min(error_index, i);
            }
        }
    };
    {
        std::vector<std::jthread> helpers;
        for (int thread = 1; thread < threads && static_cast<size_t>(thread) < count; ++thread)
            helpers.emplace_back(work, thread);
        work(0);
    }  // joined
    if (error) std::rethrow_exception(error);
}
