#include "data/tokenizer.h"

#include "data/gpt2_tokenizer.h"
#include "kernels/common/check.h"

void ByteTokenizer::encode(std::string_view text, std::vector<uint32_t>& ids) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
    ids.insert(ids.end(), bytes, bytes + text.size());
}

std::string ByteTokenizer::decode(std::span<const uint32_t> ids) const {
    std::string text;
    for (const uint32_t id : ids) {
        REQUIRE(id < vocab_size(), "tokenizer bytes: token %u, must be below the vocabulary size %u", id, vocab_size());
        if (id == kEndOfText)
            text += kEndOfTextName;
        else
            text += static_cast<char>(id);
    }
    return text;
}

std::unique_ptr<Tokenizer> make_tokenizer(const std::string& name, const std::string& gpt2_ranks) {
    if (name == tokenizer_name(TokenizerId::bytes)) return std::make_unique<ByteTokenizer>();
    REQUIRE(name == tokenizer_name(TokenizerId::gpt2), "tokenizer \"%s\": must be bytes or gpt2", name.c_str());
    REQUIRE(!gpt2_ranks.empty(),
            "tokenizer gpt2: needs --gpt2-ranks FILE, the byte-pair ranks that OpenAI publishes as "
            "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken");
    return std::make_unique<Gpt2Tokenizer>(gpt2_ranks);
}
