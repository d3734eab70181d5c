#include "trainer/device_check.h"

#include "kernels/common/check.h"

namespace {
constexpr int kFirstWithFp8 = 89;
constexpr int kHopper = 90;  // built as sm_90a, which no other GPU runs
}  // namespace

std::string device_obstacle(const DeviceToCheck& d, const Recipe& recipe) {
    // Machine code of sm_XY runs on the GPUs of the same X from Y on.
    const bool runs = d.built_for == kHopper ? d.arch == kHopper : d.arch / 10 == d.built_for / 10 && d.arch >= d.built_for;
    if (!runs)
        return message("this binary was built for sm_%d and the GPU is %s, sm_%d: build with `make ARCH=%d%s`", d.built_for, d.name.c_str(),
                       d.arch, d.arch, d.arch == kHopper ? "a" : "");
    if (!recipe.quantizes()) return "";
    if (d.arch < kFirstWithFp8)
        return message("--recipe %s: %s (sm_%d) has no FP8 tensor cores: use --recipe bf16", recipe.name.c_str(), d.name.c_str(), d.arch);
    if (d.built_for < kFirstWithFp8)
        return message("--recipe %s: this binary was built for sm_%d, which has no FP8: use --recipe bf16 or build with `make ARCH=%d`",
                       recipe.name.c_str(), d.built_for, d.arch);
    return "";
}
