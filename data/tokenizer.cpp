#include "data/tokenizer.h"

#include <filesystem>

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

namespace {

namespace fs = std::filesystem;

std::string find_gpt2_ranks() {
    std::error_code none;
    if (fs::exists(kGpt2Ranks, none)) return kGpt2Ranks;
    const fs::path program = fs::read_symlink("/proc/self/exe", none).parent_path();
    fs::path folder = program;
    for (int up = 0; up < 4 && folder.has_relative_path(); ++up, folder = folder.parent_path())
        if (fs::exists(folder / kGpt2Ranks, none)) return folder / kGpt2Ranks;
    throw Error(message("GPT-2's byte-pair ranks: no %s in this folder, nor in %s or the three folders around it: bring it with `make data-gpt2-ranks` in the repository, "
                        "name a file with --gpt2-ranks, or use data of --tokenizer bytes", kGpt2Ranks, program.c_str()));
}

}  // namespace

std::unique_ptr<Tokenizer> make_tokenizer(const std::string& name, const std::string& gpt2_ranks) {
    if (name == tokenizer_name(TokenizerId::bytes)) return std::make_unique<ByteTokenizer>();
    REQUIRE(name == tokenizer_name(TokenizerId::gpt2), "tokenizer \"%s\": must be bytes or gpt2", name.c_str());
    if (gpt2_ranks.empty()) return std::make_unique<Gpt2Tokenizer>(find_gpt2_ranks());
    REQUIRE(fs::exists(gpt2_ranks),
            "--gpt2-ranks %s: no such file: bring GPT-2's byte-pair ranks with `make data-gpt2-ranks`, or use --tokenizer bytes",
            gpt2_ranks.c_str());
    return std::make_unique<Gpt2Tokenizer>(gpt2_ranks);
}
