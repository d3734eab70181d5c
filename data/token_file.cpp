#include "data/token_file.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "data/reason.h"
#include "kernels/common/check.h"

namespace {

constexpr int64_t kCountLimit = int64_t{1} << 31;  // the first count word holds the count modulo this

using Header = std::array<int32_t, 256>;
enum HeaderWord { kMagic, kVersion, kCountLow, kCountHigh, kVocabSize, kTokenizer, kEndOfText };

struct Variant {
    int32_t magic, version, bytes_per_token;
};
constexpr Variant kVariants[] = {{20240520, 1, 2}, {20240801, 7, 4}};

const Variant& variant_of(const Header& header, const std::string& path) {
    for (const Variant& variant : kVariants) {
        if (header[kMagic] != variant.magic) continue;
        REQUIRE(header[kVersion] == variant.version, "%s: token file of version %d, must be %d for magic %d", path.c_str(),
                header[kVersion], variant.version, variant.magic);
        return variant;
    }
    throw Error(message("%s: not a token file: magic %d, must be %d (16-bit tokens) or %d (32-bit tokens)", path.c_str(),
                        header[kMagic], kVariants[0].magic, kVariants[1].magic));
}

int64_t token_count(const Header& header, const std::string& path) {
    REQUIRE(header[kCountLow] >= 0 && header[kCountHigh] >= 0,
            "%s: header words 2 and 3 (token count) are %d and %d, neither may be negative", path.c_str(),
            header[kCountLow], header[kCountHigh]);
    const int64_t count = header[kCountHigh] * kCountLimit + header[kCountLow];
    REQUIRE(count > 0, "%s: holds 0 tokens, must be at least 1", path.c_str());
    return count;
}

TokenFileInfo info_of(const Header& header, const std::string& path) {
    const TokenFileInfo info{header[kVocabSize], TokenizerId{header[kTokenizer]}, header[kEndOfText]};
    REQUIRE(info.vocab_size >= 0, "%s: vocabulary size %d in header word 4, must be at least 0", path.c_str(),
            info.vocab_size);
    REQUIRE(header[kTokenizer] >= 0 && header[kTokenizer] <= static_cast<int32_t>(TokenizerId::bytes),
            "%s: tokenizer %d in header word 5, must be 0 (unknown), 1 (gpt2) or 2 (bytes)", path.c_str(),
            header[kTokenizer]);
    REQUIRE(info.end_of_text >= 0 && (info.end_of_text == 0 || info.end_of_text < info.vocab_size),
            "%s: end-of-text token %d in header word 6, must be below the vocabulary size %d", path.c_str(),
            info.end_of_text, info.vocab_size);
    return info;
}

// Widens to int32 and returns the largest token, unsigned: 32-bit tokens of 2^31 and more must not pass as negative.
template <typename Token>
uint32_t widen(const char* from, int64_t count, int32_t* out) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        Token token;
        std::memcpy(&token, from + i * sizeof(Token), sizeof(Token));
        out[i] = static_cast<int32_t>(token);
        largest = std::max<uint32_t>(largest, token);
    }
    return largest;
}

}  // namespace

std::string vocabulary_advice(const TokenFileInfo& info, int64_t needed) {
    const bool known = info.tokenizer != TokenizerId::unknown;
    return message("it was made with %s%s; give --vocab-size %lld or more, or data of the model's tokenizer (data/prepare --tokenizer)",
                   known ? "tokenizer " : "a tokenizer that it does not name", known ? tokenizer_name(info.tokenizer) : "", static_cast<long long>(needed));
}

const char* tokenizer_name(TokenizerId id) {
    switch (id) {
        case TokenizerId::gpt2: return "gpt2";
        case TokenizerId::bytes: return "bytes";
        case TokenizerId::unknown: break;
    }
    return "unknown";
}

TokenFile::TokenFile(std::string path) : path_(std::move(path)), file_(path_) {
    const std::string_view bytes = file_.bytes();
    Header header;
    REQUIRE(bytes.size() >= sizeof(header), "%s: %zu bytes, a token file has at least its header of %zu", path_.c_str(),
            bytes.size(), sizeof(header));
    std::memcpy(header.data(), bytes.data(), sizeof(header));
    bytes_per_token_ = variant_of(header, path_).bytes_per_token;
    size_ = token_count(header, path_);
    info_ = info_of(header, path_);
    // At most 2^62 tokens: the division keeps the product of a damaged count from overflowing.
    const size_t payload = bytes.size() - sizeof(header);
    REQUIRE(payload % bytes_per_token_ == 0 && static_cast<int64_t>(payload / bytes_per_token_) == size_,
            "%s: %zu bytes of tokens, but the header says %lld tokens of %d bytes: the file is %s", path_.c_str(), payload,
            static_cast<long long>(size_), bytes_per_token_,
            static_cast<int64_t>(payload / bytes_per_token_) < size_ ? "truncated" : "too long");
}

void TokenFile::read(int64_t first, int64_t count, int32_t vocab_size, int32_t* out) const {
    REQUIRE(first >= 0 && count >= 0 && first <= size_ - count, "%s: tokens %lld to %lld asked for, it holds %lld",
            path_.c_str(), static_cast<long long>(first), static_cast<long long>(first + count),
            static_cast<long long>(size_));
    const char* from = file_.bytes().data() + sizeof(Header) + first * bytes_per_token_;
    const uint32_t largest = bytes_per_token_ == 2 ? widen<uint16_t>(from, count, out) : widen<uint32_t>(from, count, out);
    if (vocab_size <= 0 || largest < static_cast<uint32_t>(vocab_size)) return;
    const auto bad = std::find_if(out, out + count, [&](int32_t token) {
        return static_cast<uint32_t>(token) >= static_cast<uint32_t>(vocab_size);
    });
    const std::string advice = vocab_size == info_.vocab_size ? "" : ": " + vocabulary_advice(info_, int64_t(largest) + 1);
    throw Error(message("%s: token %u at position %lld, must be below the vocabulary size %d%s", path_.c_str(),
                        static_cast<uint32_t>(*bad), static_cast<long long>(first + (bad - out)), vocab_size, advice.c_str()));
}

TokenFileWriter::TokenFileWriter(std::string path, const TokenFileInfo& info) : path_(std::move(path)), info_(info) {
    REQUIRE(info.vocab_size > 0, "%s: vocabulary size %d, must be at least 1", path_.c_str(), info.vocab_size);
    bytes_per_token_ = info.vocab_size <= 65536 ? 2 : 4;
    file_.reset(std::fopen(temporary().c_str(), "wb"));
    REQUIRE(file_, "%s: cannot create: %s", temporary().c_str(), reason(errno).c_str());
    write_header();
}

TokenFileWriter::~TokenFileWriter() {
    if (!published_) unlink(temporary().c_str());
}

void TokenFileWriter::write_all(const void* data, size_t bytes) {
    REQUIRE(std::fwrite(data, 1, bytes, file_.get()) == bytes, "%s: cannot write: %s", temporary().c_str(), reason(errno).c_str());
}

void TokenFileWriter::write_header() {
    const Variant& variant = kVariants[bytes_per_token_ == 2 ? 0 : 1];
    Header header{};
    header[kMagic] = variant.magic;
    header[kVersion] = variant.version;
    header[kCountLow] = static_cast<int32_t>(size_ % kCountLimit);
    header[kCountHigh] = static_cast<int32_t>(size_ / kCountLimit);
    header[kVocabSize] = info_.vocab_size;
    header[kTokenizer] = static_cast<int32_t>(info_.tokenizer);
    header[kEndOfText] = info_.end_of_text;
    write_all(header.data(), sizeof(header));
}

void TokenFileWriter::append(std::span<const uint32_t> tokens) {
    if (tokens.empty()) return;
    REQUIRE(file_, "%s: tokens appended after close", path_.c_str());
    const uint32_t largest = *std::max_element(tokens.begin(), tokens.end());
    REQUIRE(largest < static_cast<uint32_t>(info_.vocab_size), "%s: token %u, must be below the vocabulary size %d",
            path_.c_str(), largest, info_.vocab_size);
    if (bytes_per_token_ == 2) {
        std::array<uint16_t, 8192> narrow;
        for (auto rest = tokens; !rest.empty();) {
            const auto now = rest.first(std::min(rest.size(), narrow.size()));
            std::copy(now.begin(), now.end(), narrow.begin());
            write_all(narrow.data(), now.size() * sizeof(uint16_t));
            rest = rest.subspan(now.size());
        }
    } else {
        write_all(tokens.data(), tokens.size_bytes());
    }
    size_ += static_cast<int64_t>(tokens.size());
}

void TokenFileWriter::close() {
    if (!file_) return;
    REQUIRE(size_ > 0, "%s: no tokens to write, a token file holds at least 1", path_.c_str());
    REQUIRE(std::fseek(file_.get(), 0, SEEK_SET) == 0, "%s: cannot seek: %s", temporary().c_str(), reason(errno).c_str());
    write_header();
    // fclose reports what the buffer could not deliver (a full disk): it must be asked before the rename.
    REQUIRE(std::fclose(file_.release()) == 0, "%s: cannot write: %s", temporary().c_str(), reason(errno).c_str());
}

void TokenFileWriter::publish() {
    close();
    REQUIRE(std::rename(temporary().c_str(), path_.c_str()) == 0, "%s: cannot rename to %s: %s", temporary().c_str(),
            path_.c_str(), reason(errno).c_str());
    published_ = true;
}
