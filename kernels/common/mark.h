// Names what the host is doing, for profilers: while a Mark lives, an NVTX range of its name is open (Nsight Systems shows
// it), and a MarkListener, if one is set, has been told. Marks nest. A kernel that is launched, or captured into a graph,
// while a mark lives belongs to it. Host only; without a profiler a mark costs some nanoseconds.
//
//   const Mark mark("layer", 3);                                        // NVTX "layer 3"
//   const Mark mark("gelu_forward", {.bytes = 4.0 * double(n)});
#pragma once
#include "kernels/common/dtype.h"

// What the operation must do at least; the time that takes at the device's peak is the ceiling it is compared with.
struct MarkCost {
    double flops = 0;
    Dtype format = Dtype::bf16;  // of the tensor cores that do the flops
    double bytes = 0;            // of device memory, each input read and each output written once
};

struct MarkInfo {
    const char* name;
    int instance;  // which layer, step ...; -1: there is only one
    MarkCost cost;
};

class MarkListener {
  public:
    virtual ~MarkListener() = default;
    virtual void enter(const MarkInfo& mark) = 0;
    virtual void leave() = 0;
};

class Mark {
  public:
    Mark(const char* name, int instance) : Mark(MarkInfo{name, instance, {}}) {}
    explicit Mark(const char* name, const MarkCost& cost = {}) : Mark(MarkInfo{name, -1, cost}) {}
    ~Mark();
    Mark(const Mark&) = delete;
    Mark& operator=(const Mark&) = delete;

    // Told of every mark of this thread from now on; nullptr ends it. Set it while no mark is open. Like NVTX's own state
    // it belongs to the process and not to a run: this is what reaches into launchers without passing through everything.
    static void listen(MarkListener* listener);

  private:
    explicit Mark(const MarkInfo& info);
};
