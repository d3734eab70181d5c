#include "trainer/device_check.h"

#include <gtest/gtest.h>

namespace {

std::string obstacle(int built_for, int arch, const char* recipe) {
    return device_obstacle({.built_for = built_for, .arch = arch, .name = "Card"}, find_recipe(recipe));
}

TEST(DeviceCheck, RunsWhereItsMachineCodeRuns) {
    const struct {
        int built_for, arch;
        const char* recipe;
    } fit[] = {{90, 90, "bf16"}, {90, 90, "tensorwise"}, {80, 80, "bf16"}, {80, 86, "bf16"}, {80, 89, "bf16"}, {89, 89, "tensorwise"}, {120, 120, "tensorwise"}, {120, 121, "bf16"}};
    for (const auto& c : fit) EXPECT_EQ(obstacle(c.built_for, c.arch, c.recipe), "") << c.built_for << " on " << c.arch;
}

TEST(DeviceCheck, WrongCardSaysWhatTheBinaryWasBuiltForAndWhatToDo) {
    EXPECT_EQ(obstacle(90, 80, "bf16"), "this binary was built for sm_90 and the GPU is Card, sm_80: build with `make ARCH=80`");
    EXPECT_EQ(obstacle(80, 90, "bf16"), "this binary was built for sm_80 and the GPU is Card, sm_90: build with `make ARCH=90a`");
    EXPECT_EQ(obstacle(90, 100, "bf16"), "this binary was built for sm_90 and the GPU is Card, sm_100: build with `make ARCH=100`");
    EXPECT_EQ(obstacle(86, 80, "bf16"), "this binary was built for sm_86 and the GPU is Card, sm_80: build with `make ARCH=80`");
}

TEST(DeviceCheck, Fp8NeedsACardAndABinaryWithIt) {
    EXPECT_NE(obstacle(80, 86, "tensorwise").find("has no FP8 tensor cores: use --recipe bf16"), std::string::npos);
    EXPECT_NE(obstacle(80, 89, "tensorwise").find("built for sm_80, which has no FP8"), std::string::npos);
}

}  // namespace
