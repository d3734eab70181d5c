// What tests read from a safetensors file.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "trainer/safetensors.h"

inline std::vector<float> read_all(const SafetensorsReader& reader, const std::string& name) {
    const TensorEntry* tensor = reader.find(name);
    REQUIRE(tensor, "no tensor %s", name.c_str());
    std::vector<float> values(size_t(tensor->count()), NAN);
    reader.read(*tensor, values.data());
    return values;
}
