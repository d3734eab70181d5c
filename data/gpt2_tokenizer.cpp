#include "data/gpt2_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "data/hash.h"
#include "data/utf8.h"
#include "kernels/common/check.h"

namespace {

// tiktoken's form of GPT-2's pattern, with its \s spelled out as Unicode's White_Space, which is what \s is in the Rust
// library that tiktoken uses; PCRE2's own \s differs from it (U+180E). \z is Rust's $.
constexpr const char* kPattern =
#define SPACES R"(\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})"
    R"('(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^)" SPACES R"(\p{L}\p{N}]++|[)" SPACES R"(]++\z|[)" SPACES
    R"(]+(?![^)" SPACES R"(])|[)" SPACES "]";
#undef SPACES

}  // namespace

class PieceSplitter {
  public:
    PieceSplitter() {
        int error = 0;
        PCRE2_SIZE offset = 0;
        code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(kPattern), PCRE2_ZERO_TERMINATED,
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, &error, &offset, nullptr));
        REQUIRE(code_, "tokenizer gpt2: PCRE2 refuses the pattern at offset %zu (error %d)", size_t{offset}, error);
        // Without JIT (a PCRE2 built so) pcre2_match interprets: slower, the same matches.
        pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
    }

    using Match = std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)>;
    Match new_match() const {
        return {pcre2_match_data_create_from_pattern(code_.get(), nullptr), pcre2_match_data_free};
    }

    // End of the piece that begins at `at`. The pattern matches at least one character at every place.
    size_t piece_end(std::string_view text, size_t at, pcre2_match_data* match) const {
        const int status = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                       PCRE2_NO_UTF_CHECK, match, nullptr);
        REQUIRE(status > 0, "tokenizer gpt2: PCRE2 error %d at byte %zu of a text of %zu", status, at, text.size());
        return pcre2_get_ovector_pointer(match)[1];
    }

  private:
    struct FreeCode {
        void operator()(pcre2_code* code) const { pcre2_code_free(code); }
    };
    std::unique_ptr<pcre2_code, FreeCode> code_;
};

Gpt2Tokenizer::Gpt2Tokenizer(const std::string& ranks_path)
    : ranks_(std::make_shared<RankTable>(ranks_path)),
      splitter_(std::make_shared<PieceSplitter>()),
      cache_(kCachedPieces) {
    REQUIRE(ranks_->size() == kEndOfText, "%s: %u ranks, GPT-2 has %u", ranks_path.c_str(), ranks_->size(), kEndOfText);
}

Gpt2Tokenizer::Gpt2Tokenizer(const Gpt2Tokenizer& other)
    : Tokenizer(other), ranks_(other.ranks_), splitter_(other.splitter_), cache_(kCachedPieces) {}

Gpt2Tokenizer::~Gpt2Tokenizer() = default;

void Gpt2Tokenizer::encode(std::string_view text, std::vector<uint32_t>& ids) {
    text = valid_utf8(text, repaired_);
    const PieceSplitter::Match match = splitter_->new_match();
    for (size_t at = 0; at < text.size();) {
        const size_t end = splitter_->piece_end(text, at, match.get());
        encode_piece(text.substr(at, end - at), ids);
        at = end;
    }
}

void Gpt2Tokenizer::encode_piece(std::string_view piece, std::vector<uint32_t>& ids) {
    const uint32_t rank = ranks_->find(piece);
    if (rank != RankTable::kNone)
        ids.push_back(rank);
    else
        merge_cached(piece, ids);
}

void Gpt2Tokenizer::merge_cached(std::string_view piece, std::vector<uint32_t>& ids) {
    CachedPiece& cached = cache_[hash_bytes(piece) % kCachedPieces];
    if (piece == std::string_view(cached.bytes.data(), cached.length)) {
        ids.insert(ids.end(), cached.ids.begin(), cached.ids.begin() + cached.count);
        return;
    }
    const size_t before = ids.size();
    merger_.merge(*ranks_, piece, ids);
    const size_t count = ids.size() - before;
    if (piece.size() > cached.bytes.size() || count > cached.ids.size()) return;
    cached.length = static_cast<uint8_t>(piece.size());
    cached.count = static_cast<uint8_t>(count);
    std::copy(piece.begin(), piece.end(), cached.bytes.begin());
    std::copy(ids.begin() + static_cast<ptrdiff_t>(before), ids.end(), cached.ids.begin());
}

std::string Gpt2Tokenizer::decode(std::span<const uint32_t> ids) const {
    std::string text;
    for (const uint32_t id : ids) {
        REQUIRE(id < vocab_size(), "tokenizer gpt2: token %u, must be below the vocabulary size %u", id, vocab_size());
        text += id == kEndOfText ? kEndOfTextName : ranks_->bytes_of(id);
    }
    return text;
}
