// Option files: a TOML file for --config. A good one must survive being written and read again.
#include <vector>

#include "kernels/common/check.h"
#include "tests/fuzz/memory_file.h"
#include "trainer/config.h"

namespace {

Config parse_file(std::string path) {
    std::string program = "train_gpt_fp8", flag = "--config";
    std::vector<char*> words{program.data(), flag.data(), path.data()};
    return parse_config(static_cast<int>(words.size()), words.data());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile memory;
    if (size > 4096) return 0;
    try {
        const std::string toml = to_toml(parse_file(memory.assign(data, size)));
        FUZZ_CHECK(to_toml(parse_file(memory.assign(toml))) == toml);
    } catch (const Error&) {
    }
    return 0;
}
