// Whether this binary, which holds machine code for one architecture, can run a recipe on a GPU.
#pragma once
#include <string>

#include "trainer/recipe.h"

struct DeviceToCheck {
    int built_for;     // TRAIN_GPT_ARCH, as in make ARCH=...: 90 stands for sm_90a
    int arch;          // the GPU's: 10 * major + minor
    std::string name;  // the GPU's
};

// "", or what is in the way and what to do about it.
std::string device_obstacle(const DeviceToCheck& device, const Recipe& recipe);
