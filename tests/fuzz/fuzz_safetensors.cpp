// Safetensors files: the reader, and a whole model's parameters from one.
#include <algorithm>
#include <vector>

#include "kernels/common/check.h"
#include "tests/fuzz/memory_file.h"
#include "tests/fuzz/micro_model.h"
#include "trainer/checkpoint.h"
#include "trainer/safetensors.h"

namespace {

void read_all(const std::string& path) {
    const SafetensorsReader reader(path);
    uint64_t total = 0, sum = 0;
    for (const TensorEntry& tensor : reader.tensors()) {
        FUZZ_CHECK(reader.find(tensor.name) != nullptr);
        for (const std::byte byte : reader.bytes(tensor)) sum += static_cast<uint64_t>(byte);
        total += tensor.end - tensor.begin;
        if (tensor.dtype != "F32" && tensor.dtype != "BF16") continue;
        std::vector<float> values(static_cast<size_t>(tensor.count()));
        reader.read(tensor, values.data());
    }
    FUZZ_CHECK(sum <= 255 * total);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile memory;
    static const ParameterList list = make_parameters(micro_model());
    memory.assign(data, size);
    try {
        read_all(memory.path());
    } catch (const Error&) {
    }
    try {
        FUZZ_CHECK(load_params_only(memory.path(), list).size() == static_cast<size_t>(list.flat_elements));
    } catch (const Error&) {
    }
    return 0;
}
