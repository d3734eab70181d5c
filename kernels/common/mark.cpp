#include "kernels/common/mark.h"

#include <nvtx3/nvToolsExt.h>

#include <cstdio>

namespace {
MarkListener*& listener_of_this_thread() {
    thread_local MarkListener* listener = nullptr;
    return listener;
}
}  // namespace

void Mark::listen(MarkListener* listener) { listener_of_this_thread() = listener; }

Mark::Mark(const MarkInfo& info) {
    char text[64];
    if (info.instance >= 0) std::snprintf(text, sizeof text, "%s %d", info.name, info.instance);
    nvtxRangePushA(info.instance >= 0 ? text : info.name);
    if (MarkListener* listener = listener_of_this_thread()) listener->enter(info);
}

Mark::~Mark() {
    if (MarkListener* listener = listener_of_this_thread()) listener->leave();
    nvtxRangePop();
}
