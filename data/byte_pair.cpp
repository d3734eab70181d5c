#include "data/byte_pair.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <functional>

#include "data/hash.h"
#include "data/mapped_file.h"
#include "kernels/common/check.h"

namespace {

// Scanning for the best pair costs length^2 / 2 steps, the heap about 20 * length: they break even near here.
constexpr size_t kLongPiece = 64;

// The bytes that `code` stands for; false when it is not padded base64.
bool decode_base64(std::string_view code, std::string& bytes) {
    static constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    bytes.clear();
    if (code.empty() || code.size() % 4 != 0) return false;
    const size_t padding = code.ends_with("==") ? 2 : code.ends_with("=") ? 1 : 0;
    uint32_t bits = 0;
    for (size_t i = 0; i < code.size() - padding; ++i) {
        const size_t digit = kDigits.find(code[i]);
        if (digit == std::string_view::npos) return false;
        bits = bits << 6 | static_cast<uint32_t>(digit);
        if (i % 4 != 0) bytes += static_cast<char>(bits >> (6 - 2 * (i % 4)));
    }
    return true;
}

// One line of a ranks file; false when it is not "base64 rank".
bool parse_line(std::string_view line, std::string& bytes, uint32_t& rank) {
    const size_t space = line.find(' ');
    if (space == std::string_view::npos || !decode_base64(line.substr(0, space), bytes)) return false;
    const char *begin = line.data() + space + 1, *end = line.data() + line.size();
    const auto [stop, status] = std::from_chars(begin, end, rank);
    return status == std::errc() && stop == end;
}

}  // namespace

RankTable::RankTable(const std::string& path) {
    const MappedFile file(path);
    std::vector<std::string> tokens;
    std::string bytes;
    size_t line_number = 0;
    for (std::string_view rest = file.bytes(); !rest.empty();) {
        std::string_view line = rest.substr(0, rest.find('\n'));
        rest.remove_prefix(std::min(rest.size(), line.size() + 1));
        ++line_number;
        if (line.ends_with('\r')) line.remove_suffix(1);
        if (line.empty()) continue;
        uint32_t rank = 0;
        REQUIRE(parse_line(line, bytes, rank), "%s:%zu: not a line of byte-pair ranks (\"base64 rank\")", path.c_str(),
                line_number);
        // A dense table has no rank beyond its number of lines, so a damaged one cannot ask for much memory.
        REQUIRE(rank <= file.bytes().size(), "%s:%zu: rank %u, must be dense from 0", path.c_str(), line_number, rank);
        if (rank >= tokens.size()) tokens.resize(rank + 1);
        REQUIRE(tokens[rank].empty(), "%s:%zu: rank %u stands twice", path.c_str(), line_number, rank);
        tokens[rank] = bytes;
    }
    start_.push_back(0);
    for (const std::string& token : tokens) {
        REQUIRE(!token.empty(), "%s: rank %zu is missing", path.c_str(), start_.size() - 1);
        text_ += token;
        start_.push_back(static_cast<uint32_t>(text_.size()));
        longest_ = std::max(longest_, token.size());
    }
    index_tokens(path);
}

void RankTable::index_tokens(const std::string& path) {
    slots_.assign(std::bit_ceil(2 * size_t{size()} + 1), {0, kNone});
    for (uint32_t rank = 0; rank < size(); ++rank) {
        REQUIRE(find(bytes_of(rank)) == kNone, "%s: ranks %u and %u are the same bytes", path.c_str(),
                find(bytes_of(rank)), rank);
        const uint64_t hash = hash_bytes(bytes_of(rank));
        size_t at = hash & (slots_.size() - 1);
        while (slots_[at].rank != kNone) at = (at + 1) & (slots_.size() - 1);
        slots_[at] = {static_cast<uint32_t>(hash >> 32), rank};
    }
    for (int byte = 0; byte < 256; ++byte) {
        const char one = static_cast<char>(byte);
        REQUIRE(find({&one, 1}) != kNone, "%s: byte 0x%02x has no rank, each single byte must have one", path.c_str(), byte);
    }
}

uint32_t RankTable::find(std::string_view bytes) const {
    if (bytes.size() > longest_) return kNone;
    const uint64_t hash = hash_bytes(bytes);
    const auto tag = static_cast<uint32_t>(hash >> 32);
    for (size_t at = hash & (slots_.size() - 1);; at = (at + 1) & (slots_.size() - 1)) {
        const Slot slot = slots_[at];
        if (slot.rank == kNone || (slot.tag == tag && bytes_of(slot.rank) == bytes)) return slot.rank;
    }
}

void BytePairMerger::merge(const RankTable& ranks, std::string_view piece, std::vector<uint32_t>& ids) {
    REQUIRE(piece.size() < UINT32_MAX, "byte-pair encoding: a word of %zu bytes, must be below 4 GiB", piece.size());
    if (piece.size() < kLongPiece)
        merge_short(ranks, piece, ids);
    else
        merge_long(ranks, piece, ids);
}

void BytePairMerger::merge_short(const RankTable& ranks, std::string_view piece, std::vector<uint32_t>& ids) {
    const auto length = static_cast<uint32_t>(piece.size());
    parts_.clear();
    for (uint32_t i = 0; i < length; ++i)
        parts_.push_back({i, i + 1 < length ? ranks.find(piece.substr(i, 2)) : RankTable::kNone});
    parts_.push_back({length, RankTable::kNone});

    const auto pair_rank = [&](size_t at) {  // of parts at and at + 1
        if (at + 2 >= parts_.size()) return RankTable::kNone;
        return ranks.find(piece.substr(parts_[at].begin, parts_[at + 2].begin - parts_[at].begin));
    };
    while (true) {
        const auto best = std::min_element(parts_.begin(), parts_.end(), [](const Part& a, const Part& b) {
            return a.pair_rank < b.pair_rank;
        });
        if (best->pair_rank == RankTable::kNone) break;
        const auto at = static_cast<size_t>(best - parts_.begin());
        parts_.erase(best + 1);
        parts_[at].pair_rank = pair_rank(at);
        if (at > 0) parts_[at - 1].pair_rank = pair_rank(at - 1);
    }
    for (size_t i = 0; i + 1 < parts_.size(); ++i)
        ids.push_back(ranks.find(piece.substr(parts_[i].begin, parts_[i + 1].begin - parts_[i].begin)));
}

// The same merges in the same order in O(n log n). An entry of the queue is stale when its pair has changed since: then
// the rank stored for its first byte differs (parts that were swallowed store kNone).
void BytePairMerger::merge_long(const RankTable& ranks, std::string_view piece, std::vector<uint32_t>& ids) {
    const auto length = static_cast<uint32_t>(piece.size());
    links_.resize(length + 1);
    queue_.clear();
    const auto update_pair = [&](uint32_t at) {
        const uint32_t middle = links_[at].next;
        const uint32_t rank = middle == length ? RankTable::kNone
                                               : ranks.find(piece.substr(at, links_[middle].next - at));
        links_[at].pair_rank = rank;
        if (rank == RankTable::kNone) return;
        queue_.push_back(uint64_t{rank} << 32 | at);
        std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
    };
    for (uint32_t i = 0; i <= length; ++i) links_[i] = {i - 1, i + 1, RankTable::kNone};
    for (uint32_t i = 0; i < length; ++i) update_pair(i);

    while (!queue_.empty()) {
        std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
        const auto rank = static_cast<uint32_t>(queue_.back() >> 32), at = static_cast<uint32_t>(queue_.back());
        queue_.pop_back();
        if (links_[at].pair_rank != rank) continue;
        const uint32_t swallowed = links_[at].next, after = links_[swallowed].next;
        links_[swallowed].pair_rank = RankTable::kNone;
        links_[at].next = after;
        links_[after].previous = at;
        update_pair(at);
        if (at > 0) update_pair(links_[at].previous);
    }
    for (uint32_t at = 0; at < length; at = links_[at].next)
        ids.push_back(ranks.find(piece.substr(at, links_[at].next - at)));
}
