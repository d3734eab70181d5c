// Text <-> token ids.
//
// An object keeps caches and scratch space: use one a thread, made by clone(), which shares the read-only tables.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/token_file.h"

class Tokenizer {
  public:
    virtual ~Tokenizer() = default;
    // Appends the ids of `text` to `ids`. Special tokens are never made from text.
    virtual void encode(std::string_view text, std::vector<uint32_t>& ids) = 0;
    // The bytes of the ids, end-of-text as "<|endoftext|>". An id that is not below vocab_size() throws Error.
    virtual std::string decode(std::span<const uint32_t> ids) const = 0;
    virtual uint32_t vocab_size() const = 0;  // end-of-text included
    virtual uint32_t end_of_text() const = 0;
    virtual TokenizerId id() const = 0;
    virtual std::unique_ptr<Tokenizer> clone() const = 0;

    const char* name() const { return tokenizer_name(id()); }
    TokenFileInfo file_info() const {
        return {static_cast<int32_t>(vocab_size()), id(), static_cast<int32_t>(end_of_text())};
    }
};

inline constexpr std::string_view kEndOfTextName = "<|endoftext|>";

// One token a byte, ids 0 to 255, and 256 for end-of-text. Any bytes survive encode and decode.
class ByteTokenizer final : public Tokenizer {
  public:
    static constexpr uint32_t kEndOfText = 256;
    void encode(std::string_view text, std::vector<uint32_t>& ids) override;
    std::string decode(std::span<const uint32_t> ids) const override;
    uint32_t vocab_size() const override { return kEndOfText + 1; }
    uint32_t end_of_text() const override { return kEndOfText; }
    TokenizerId id() const override { return TokenizerId::bytes; }
    std::unique_ptr<Tokenizer> clone() const override { return std::make_unique<ByteTokenizer>(); }
};

// Where `make data-gpt2-ranks` puts GPT-2's ranks, from the repository's root.
inline constexpr const char* kGpt2Ranks = "deps/gpt2.tiktoken";

// name: "bytes" or "gpt2"; gpt2_ranks: the ranks file (gpt2_tokenizer.h), needed by "gpt2" only. Empty: kGpt2Ranks in the folder
// where the program was started, else in the program's own or one of the three around it (it is built into build/ARCH/ of the repository).
std::unique_ptr<Tokenizer> make_tokenizer(const std::string& name, const std::string& gpt2_ranks);
