// Tokenizer files: the ranks, and merging with whatever table they make. A valid file is followed by the text to merge,
// after an empty line; since a table needs 256 bytes of tokens, they are supplied when the input begins with '+'.
#include <vector>

#include "data/byte_pair.h"
#include "kernels/common/check.h"
#include "tests/fuzz/memory_file.h"

namespace {

constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

// "AA== 0\nAQ== 1\n...": the 256 single bytes.
std::string single_bytes() {
    std::string lines;
    for (int byte = 0; byte < 256; ++byte)
        lines += std::string{kDigits[byte >> 2], kDigits[(byte & 3) << 4]} + "== " + std::to_string(byte) + "\n";
    return lines;
}

// The definition: merge the leftmost pair of lowest rank until there is none.
std::vector<uint32_t> merge_plainly(const RankTable& ranks, std::string_view text) {
    std::vector<std::string> parts;
    for (const char byte : text) parts.emplace_back(1, byte);
    while (true) {
        uint32_t best = RankTable::kNone;
        size_t at = 0;
        for (size_t i = 0; i + 1 < parts.size(); ++i) {
            const uint32_t rank = ranks.find(parts[i] + parts[i + 1]);
            if (rank < best) best = rank, at = i;
        }
        if (best == RankTable::kNone) break;
        parts[at] += parts[at + 1];
        parts.erase(parts.begin() + static_cast<ptrdiff_t>(at) + 1);
    }
    std::vector<uint32_t> ids;
    for (const std::string& part : parts) ids.push_back(ranks.find(part));
    return ids;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile memory;
    static const std::string bytes = single_bytes();
    std::string_view input(reinterpret_cast<const char*>(data), size);
    const size_t end = std::min(input.find("\n\n"), input.size());
    const std::string_view text = input.substr(std::min(end + 2, input.size()));
    std::string file(input.substr(0, end));
    if (file.starts_with('+')) file = bytes + file.substr(1);
    try {
        const RankTable ranks(memory.assign(file));
        for (uint32_t rank = 0; rank < ranks.size(); ++rank) FUZZ_CHECK(ranks.find(ranks.bytes_of(rank)) == rank);
        if (text.empty() || text.size() > 256) return 0;
        std::vector<uint32_t> ids;
        BytePairMerger().merge(ranks, text, ids);
        FUZZ_CHECK(ids == merge_plainly(ranks, text));
    } catch (const Error&) {
    }
    return 0;
}
