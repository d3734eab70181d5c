// Byte-pair encoding of one piece of text: the table of ranks, and the merging.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// The tokens of a byte-pair vocabulary, read from tiktoken's text form: one "base64(bytes) rank" a line. A token's id is
// its rank; ranks are dense from 0 and include all 256 single bytes, so any text can be encoded.
class RankTable {
  public:
    static constexpr uint32_t kNone = UINT32_MAX;

    explicit RankTable(const std::string& path);

    uint32_t find(std::string_view bytes) const;  // rank, or kNone
    std::string_view bytes_of(uint32_t rank) const {
        return std::string_view(text_).substr(start_[rank], start_[rank + 1] - start_[rank]);
    }
    uint32_t size() const { return static_cast<uint32_t>(start_.size() - 1); }

  private:
    struct Slot {
        uint32_t tag;  // upper half of the hash: almost every lookup of a missing string ends here
        uint32_t rank;
    };
    void index_tokens(const std::string& path);

    std::string text_;             // all tokens' bytes, in order of rank
    std::vector<uint32_t> start_;  // (size() + 1)
    std::vector<Slot> slots_;      // open addressing, linear probing, at most half full
    size_t longest_ = 0;
};

// Merges the adjacent pair of lowest rank, the leftmost of equals, until no pair is a token. Holds scratch space.
class BytePairMerger {
  public:
    // Appends the ids of `piece`, which is not empty.
    void merge(const RankTable& ranks, std::string_view piece, std::vector<uint32_t>& ids);

  private:
    struct Part {
        uint32_t begin;      // in the piece; the part ends where the next one begins
        uint32_t pair_rank;  // of this part joined with the next, or kNone
    };
    struct Link {
        uint32_t previous, next;
        uint32_t pair_rank;
    };
    void merge_short(const RankTable& ranks, std::string_view piece, std::vector<uint32_t>& ids);
    void merge_long(const RankTable& ranks, std::string_view piece, std::vector<uint32_t>& ids);

    std::vector<Part> parts_;
    std::vector<Link> links_;      // by first byte of the part
    std::vector<uint64_t> queue_;  // min-heap of rank << 32 | first byte of the pair
};
