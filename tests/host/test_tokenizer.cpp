// Tokenizers. The ids of tests/golden/tokenizer_gpt2.txt come from tiktoken; comparing needs GPT-2's ranks, which are not
// part of the repository: `make data-gpt2-ranks` brings them, or GPT2_RANKS names a file.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "data/corpus.h"
#include "data/gpt2_tokenizer.h"
#include "data/hash.h"
#include "data/tokenizer.h"
#include "data/utf8.h"
#include "tests/host/temp_folder.h"

namespace {

using Ids = std::vector<uint32_t>;

struct GoldenCase {
    std::string text;
    Ids ids;
};

std::string from_hex(const std::string& hex) {
    std::string bytes;
    for (size_t i = 0; hex != "-" && i + 1 < hex.size(); i += 2)
        bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    return bytes;
}

Ids parse_ids(const std::string& list) {
    Ids ids;
    std::istringstream stream(list == "-" ? "" : list);
    for (std::string id; std::getline(stream, id, ',');) ids.push_back(static_cast<uint32_t>(std::stoul(id)));
    return ids;
}

std::filesystem::path repository() { return std::filesystem::path(__FILE__).parent_path().parent_path().parent_path(); }

std::vector<GoldenCase> read_golden() {
    std::ifstream file(repository() / "tests/golden/tokenizer_gpt2.txt");
    std::vector<GoldenCase> cases;
    for (std::string line, hex, ids; std::getline(file, line);) {
        if (line.starts_with('#')) continue;
        std::istringstream(line) >> hex >> ids;
        cases.push_back({from_hex(hex), parse_ids(ids)});
    }
    return cases;
}

Ids encode(Tokenizer& tokenizer, std::string_view text) {
    Ids ids;
    tokenizer.encode(text, ids);
    return ids;
}

std::string error_of_ranks(const std::string& ranks) {
    const TempFolder folder;
    write_file(folder / "ranks", ranks);
    return error_of([&] { RankTable table(folder / "ranks"); });
}

std::string find_ranks() {
    if (const char* given = std::getenv("GPT2_RANKS")) return given;
    return (repository() / kGpt2Ranks).string();
}

#define SKIP_WITHOUT_RANKS()                 \
    const std::string ranks_path = find_ranks(); \
    if (!std::filesystem::exists(ranks_path)) GTEST_SKIP() << ranks_path << " is not here: make data-gpt2-ranks"

}  // namespace

TEST(ByteTokenizer, KeepsEveryByte) {
    std::string all;
    for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
    ByteTokenizer tokenizer;
    const Ids ids = encode(tokenizer, all);
    ASSERT_EQ(ids.size(), 256u);
    for (uint32_t i = 0; i < 256; ++i) EXPECT_EQ(ids[i], i);
    EXPECT_EQ(tokenizer.decode(ids), all);
}

TEST(ByteTokenizer, EndOfTextIsTheLastIdAndNeverComesFromText) {
    ByteTokenizer tokenizer;
    EXPECT_EQ(tokenizer.vocab_size(), 257u);
    EXPECT_EQ(tokenizer.end_of_text(), 256u);
    EXPECT_EQ(tokenizer.decode(Ids{'a', 256, 'b'}), "a<|endoftext|>b");
    EXPECT_EQ(encode(tokenizer, "<|endoftext|>").size(), 13u);
    EXPECT_THROW(tokenizer.decode(Ids{257}), Error);
}

TEST(ByteTokenizer, EncodeAppends) {
    ByteTokenizer tokenizer;
    Ids ids{256};
    tokenizer.encode("ab", ids);
    EXPECT_EQ(ids, (Ids{256, 'a', 'b'}));
}

TEST(MakeTokenizer, NamesWhatIsAllowed) {
    EXPECT_STREQ(make_tokenizer("bytes", "")->name(), "bytes");
    EXPECT_THROW(make_tokenizer("gpt3", ""), Error);
    EXPECT_THROW(make_tokenizer("gpt2", "/no/such/file"), Error);
}

TEST(Utf8, ReplacesMaximalSubparts) {
    std::string repaired;
    const auto repair = [&](std::string_view text) { return std::string(valid_utf8(text, repaired)); };
    const std::string r = "\xef\xbf\xbd";
    const std::string valid = "plain, \xc3\xa9, \xe4\xb8\xad, \xf0\x9f\x98\x80";
    EXPECT_EQ(valid_utf8(valid, repaired).data(), valid.data()) << "valid text is not copied";
    EXPECT_EQ(repair("a\x80z"), "a" + r + "z");
    EXPECT_EQ(repair("\xc0\x80"), r + r);                      // overlong
    EXPECT_EQ(repair("\xe0\xa0z"), r + "z");                   // cut short: one for the two bytes
    EXPECT_EQ(repair("\xed\xa0\x80"), r + r + r);              // an encoded surrogate
    EXPECT_EQ(repair("\xf0\x90\x80"), r);                      // cut short at the end
    EXPECT_EQ(repair("\xf4\x90\x80\x80"), r + r + r + r);      // above U+10FFFF
    EXPECT_EQ(repair("eight by" + valid + "\xff"), "eight by" + valid + r);
}

TEST(RankTable, RefusesDamagedFiles) {
    EXPECT_NE(error_of_ranks("IQ== 0\nIg=\n").find(":2: not a line"), std::string::npos);
    EXPECT_NE(error_of_ranks("I*== 0\n").find(":1: not a line"), std::string::npos);
    EXPECT_NE(error_of_ranks("IQ== x\n").find(":1: not a line"), std::string::npos);
    EXPECT_NE(error_of_ranks("IQ== 4000000000\n").find("dense"), std::string::npos);
    EXPECT_NE(error_of_ranks("IQ== 0\nIg== 0\n").find("stands twice"), std::string::npos);
    EXPECT_NE(error_of_ranks("IQ== 0\nIg== 2\n").find("rank 1 is missing"), std::string::npos);
    EXPECT_NE(error_of_ranks("IQ== 0\nIQ== 1\n").find("same bytes"), std::string::npos);
    EXPECT_NE(error_of_ranks("IQ== 0\n").find("byte 0x00 has no rank"), std::string::npos);
    EXPECT_NE(error_of_ranks("").find("byte 0x00 has no rank"), std::string::npos);
}

TEST(Gpt2Tokenizer, EqualsTiktokenOnGoldenTexts) {
    SKIP_WITHOUT_RANKS();
    Gpt2Tokenizer tokenizer(ranks_path);
    const std::vector<GoldenCase> cases = read_golden();
    ASSERT_GE(cases.size(), 300u);
    // Twice: the second time pieces come from the cache.
    for (int round = 0; round < 2; ++round)
        for (const GoldenCase& golden : cases)
            EXPECT_EQ(encode(tokenizer, golden.text), golden.ids) << "text: " << golden.text.substr(0, 200);
}

TEST(Gpt2Tokenizer, DecodesToTheRepairedText) {
    SKIP_WITHOUT_RANKS();
    Gpt2Tokenizer tokenizer(ranks_path);
    std::string repaired;
    for (const GoldenCase& golden : read_golden()) EXPECT_EQ(tokenizer.decode(golden.ids), valid_utf8(golden.text, repaired));
    EXPECT_EQ(tokenizer.decode(Ids{50256}), "<|endoftext|>");
    EXPECT_THROW(tokenizer.decode(Ids{50257}), Error);
}

TEST(Gpt2Tokenizer, ClonesAreIndependentAndEqual) {
    SKIP_WITHOUT_RANKS();
    Gpt2Tokenizer tokenizer(ranks_path);
    const auto clone = tokenizer.clone();
    for (const GoldenCase& golden : read_golden()) ASSERT_EQ(encode(*clone, golden.text), golden.ids);
}

// prepare encodes long documents in parts: the ids must be those of the whole.
TEST(Gpt2Tokenizer, CutsDoNotChangeTheIds) {
    SKIP_WITHOUT_RANKS();
    Gpt2Tokenizer tokenizer(ranks_path);
    std::string text;
    for (const GoldenCase& golden : read_golden()) text += golden.text + "word\n" + golden.text + ";\n\n";
    const Ids whole = encode(tokenizer, text);
    for (const size_t step : {1, 100, 5000}) {
        Ids parts;
        size_t cuts = 0;
        for (size_t at = 0; at < text.size(); ++cuts) {
            const size_t end = next_cut(text, at + step);
            tokenizer.encode(std::string_view(text).substr(at, end - at), parts);
            at = end;
        }
        EXPECT_EQ(parts, whole) << "step " << step;
        EXPECT_GE(cuts, 10u);
    }
}

// A word of a million letters takes forever when merging is quadratic.
TEST(Gpt2Tokenizer, LongWordsAreNotQuadratic) {
    SKIP_WITHOUT_RANKS();
    Gpt2Tokenizer tokenizer(ranks_path);
    std::string word;
    for (size_t i = 0; i < 1'000'000; ++i) word += static_cast<char>('a' + mix64(i) % 26);
    EXPECT_EQ(tokenizer.decode(encode(tokenizer, word)), word);
    EXPECT_EQ(tokenizer.decode(encode(tokenizer, std::string(1'000'000, 'a'))), std::string(1'000'000, 'a'));
}
