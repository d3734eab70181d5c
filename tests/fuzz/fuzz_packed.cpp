// gzip and zstd files. Reading in small and in large pieces must give the same bytes, or fail in both.
#include <algorithm>
#include <optional>

#include "data/byte_source.h"
#include "kernels/common/check.h"
#include "tests/fuzz/memory_file.h"

namespace {

constexpr size_t kEnough = size_t{1} << 14;  // a small input may unpack to gigabytes

// The first kEnough bytes, or nothing where the file is damaged before.
std::optional<std::string> unpack(const std::string& path, size_t chunk_bytes) {
    std::string text, chunk(chunk_bytes, '\0');
    try {
        const auto source = open_text_source(path);
        for (size_t now = chunk.size(); now == chunk.size() && text.size() < kEnough;) {
            now = source->read(chunk.data(), chunk.size());
            text.append(chunk, 0, now);
        }
    } catch (const Error&) {
        return {};
    }
    return text.substr(0, kEnough);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile memory;
    memory.assign(data, size);
    const auto whole = unpack(memory.path(), kEnough);
    const auto pieces = unpack(memory.path(), 509);
    // What is damaged behind the first kEnough bytes is seen only where the reading goes that far.
    if (whole && pieces) FUZZ_CHECK(*whole == *pieces);
    FUZZ_CHECK(whole || !pieces || pieces->size() == kEnough);
    FUZZ_CHECK(pieces || !whole || whole->size() == kEnough);
    return 0;
}
