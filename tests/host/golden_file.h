// Golden values: a safetensors file of tests/golden, written by the make_*_golden.py beside it.
#pragma once
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "trainer/safetensors.h"

class GoldenFile {
  public:
    explicit GoldenFile(const std::string& name)
        : reader_((std::filesystem::path(__FILE__).parent_path().parent_path() / "golden" / name).string()) {}

    std::vector<float> floats(const std::string& name) const { return values<float>(name, "F32"); }
    std::vector<int32_t> ints(const std::string& name) const { return values<int32_t>(name, "I32"); }
    std::vector<uint8_t> bytes(const std::string& name) const { return values<uint8_t>(name, "U8"); }

    // What comes before `ending` in every name that has it.
    std::vector<std::string> names_before(const std::string& ending) const {
        std::vector<std::string> names;
        for (const TensorEntry& tensor : reader_.tensors())
            if (tensor.name.ends_with(ending)) names.push_back(tensor.name.substr(0, tensor.name.size() - ending.size()));
        return names;
    }

  private:
    template <typename T>
    std::vector<T> values(const std::string& name, const std::string& dtype) const {
        const TensorEntry* entry = reader_.find(name);
        REQUIRE(entry, "%s: no tensor %s", reader_.path().c_str(), name.c_str());
        REQUIRE(entry->dtype == dtype, "%s: %s is %s", reader_.path().c_str(), name.c_str(), entry->dtype.c_str());
        const auto bytes = reader_.bytes(*entry);
        std::vector<T> out(bytes.size() / sizeof(T));
        std::memcpy(out.data(), bytes.data(), bytes.size());
        return out;
    }
    SafetensorsReader reader_;
};
