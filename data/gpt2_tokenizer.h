// GPT-2's byte-pair tokenizer: the ids of tiktoken's encode_ordinary("gpt2") for every input.
//
// Text is split into pieces by GPT-2's pattern (PCRE2), and each piece is merged by rank (byte_pair.h). tiktoken takes
// Python strings; for bytes that are not valid UTF-8 the ids are those of bytes.decode("utf-8", errors="replace").
#pragma once
#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/byte_pair.h"
#include "data/tokenizer.h"

class PieceSplitter;  // the compiled pattern

class Gpt2Tokenizer final : public Tokenizer {
  public:
    static constexpr uint32_t kEndOfText = 50256;

    explicit Gpt2Tokenizer(const std::string& ranks_path);  // 50,256 lines of "base64 rank"
    Gpt2Tokenizer(const Gpt2Tokenizer& other);              // shares tables and pattern, has caches of its own
    ~Gpt2Tokenizer() override;

    void encode(std::string_view text, std::vector<uint32_t>& ids) override;
    std::string decode(std::span<const uint32_t> ids) const override;
    uint32_t vocab_size() const override { return kEndOfText + 1; }
    uint32_t end_of_text() const override { return kEndOfText; }
    TokenizerId id() const override { return TokenizerId::gpt2; }
    std::unique_ptr<Tokenizer> clone() const override { return std::make_unique<Gpt2Tokenizer>(*this); }

  private:
    // The ids of a piece seen before, in one cache line. Pieces that are whole tokens or too long are not kept.
    struct alignas(64) CachedPiece {
        uint8_t length = 0;  // 0: empty
        uint8_t count = 0;
        std::array<char, 30> bytes{};
        std::array<uint16_t, 16> ids{};
    };
    static constexpr size_t kCachedPieces = 1 << 14;  // 1 MiB

    void encode_piece(std::string_view piece, std::vector<uint32_t>& ids);
    void merge_cached(std::string_view piece, std::vector<uint32_t>& ids);

    std::shared_ptr<const RankTable> ranks_;
    std::shared_ptr<const PieceSplitter> splitter_;
    std::vector<CachedPiece> cache_;
    BytePairMerger merger_;
    std::string repaired_;
};
