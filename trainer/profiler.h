// Measures where the time of some steps goes. Make it before the engine: a GPU's graphs are traced only if the profiler
// was there when they were captured. One at a time; the thread that makes it runs the steps.
#pragma once
#include <memory>

#include "trainer/profile.h"

class Profiler {
  public:
    virtual ~Profiler() = default;
    virtual void begin() = 0;                  // forgets what was recorded so far; no mark is open, no step in flight
    virtual Profile end(int64_t steps) = 0;    // of the steps since begin(); none in flight
};

// CUPTI's records of kernels, copies and fills. CUPTI is loaded now, so nothing else of the program needs it.
std::unique_ptr<Profiler> make_gpu_profiler(const Peak& peak);
// The host's clock, at the marks: for the reference device. Time inside a mark of a mark counts for the inner one alone.
std::unique_ptr<Profiler> make_host_profiler();
