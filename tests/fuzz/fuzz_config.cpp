// Option files: the TOML text of --config. A good one must survive being written and read again.
#include "kernels/common/check.h"
#include "tests/fuzz/memory_file.h"
#include "trainer/config.h"

namespace {

// As parse_config() reads it, but for the command line, whose parser would take most of the time.
Config parse(const std::string& text) {
    Config config;
    config.warmup_steps = 0, config.out = "runs/fuzz";
    read_toml(text, "--config fuzz.toml", config);
    validate(config);
    return config;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size > 4096) return 0;
    try {
        const std::string toml = to_toml(parse({reinterpret_cast<const char*>(data), size}));
        FUZZ_CHECK(to_toml(parse(toml)) == toml);
    } catch (const Error&) {
    }
    return 0;
}
