// Token shards: header and payload.
#include <algorithm>
#include <vector>

#include "data/token_file.h"
#include "kernels/common/check.h"
#include "tests/fuzz/memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile memory;
    try {
        const TokenFile file(memory.assign(data, size));
        std::vector<int32_t> tokens(static_cast<size_t>(std::min<int64_t>(file.size(), 64)));
        const auto count = static_cast<int64_t>(tokens.size());
        file.read(0, count, 0, tokens.data());
        file.read(file.size() - count, count, file.info().vocab_size, tokens.data());
        for (const int32_t token : tokens)
            FUZZ_CHECK(file.info().vocab_size == 0 || (token >= 0 && token < file.info().vocab_size));
    } catch (const Error&) {  // the answer to damage; anything else is a finding
    }
    return 0;
}
