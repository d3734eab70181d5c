// gzip and zstd files. Reading in small and in large pieces must give the same bytes, or fail in both.
#include <zstd.h>

#include <algorithm>
#include <optional>
#include <string_view>

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

// What zstd frames say that they hold. A frame that holds less and ends with an empty block is damaged to the library where its output
// has room for what the frame says, and is not where it has none.
uint64_t claimed_bytes(std::string_view file) {
    uint64_t sum = 0;
    for (size_t at = file.find("\x28\xb5\x2f\xfd"); at != file.npos; at = file.find("\x28\xb5\x2f\xfd", at + 1)) {
        const unsigned long long claimed = ZSTD_getFrameContentSize(file.data() + at, file.size() - at);
        if (claimed != ZSTD_CONTENTSIZE_UNKNOWN && claimed != ZSTD_CONTENTSIZE_ERROR) sum += std::min<uint64_t>(claimed, uint64_t(1) << 40);
    }
    return sum;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile memory;
    memory.assign(data, size);
    const auto whole = unpack(memory.path(), kEnough);
    const auto pieces = unpack(memory.path(), 509);
    // What is damaged behind the first kEnough bytes is seen only where the reading goes that far.
    if (whole && pieces) FUZZ_CHECK(*whole == *pieces);
    if (const auto& one = whole ? whole : pieces; one && claimed_bytes({reinterpret_cast<const char*>(data), size}) > one->size()) return 0;
    FUZZ_CHECK(whole || !pieces || pieces->size() == kEnough);
    FUZZ_CHECK(pieces || !whole || whole->size() == kEnough);
    return 0;
}
