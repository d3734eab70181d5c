// What data/prepare reads besides plain text: gzip, zstd, .jsonl; and what data/inspect counts.
#include <zlib.h>
#include <zstd.h>

#include <cmath>
#include <fstream>
#include <map>

#include "data/byte_source.h"
#include "data/hash.h"
#include "data/json_text.h"
#include "data/prepare_shards.h"
#include "data/shard_statistics.h"
#include "tests/host/test_data_support.h"

namespace {

std::string gzip(const std::string& text) {
    z_stream stream{};
    EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    std::string packed(deflateBound(&stream, text.size()), '\0');
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
    stream.avail_in = static_cast<uInt>(text.size());
    stream.next_out = reinterpret_cast<Bytef*>(packed.data());
    stream.avail_out = static_cast<uInt>(packed.size());
    EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
    packed.resize(stream.total_out);
    deflateEnd(&stream);
    return packed;
}

std::string zstd(const std::string& text) {
    std::string packed(ZSTD_compressBound(text.size()), '\0');
    packed.resize(ZSTD_compress(packed.data(), packed.size(), text.data(), text.size(), 3));
    return packed;
}

std::string unpack(const std::string& path, size_t chunk_bytes = 1000) {
    const auto source = open_text_source(path);
    std::string text, chunk(chunk_bytes, '\0');
    while (const size_t now = source->read(chunk.data(), chunk.size())) text += chunk.substr(0, now);
    EXPECT_EQ(source->bytes_consumed(), static_cast<int64_t>(std::filesystem::file_size(path)));
    return text;
}

std::string long_text() {
    std::string text;
    for (uint64_t i = 0; text.size() < 3'000'000; ++i) text += message("%zu: %llx\n", text.size(), static_cast<unsigned long long>(mix64(i)));
    return text;
}

using Pack = std::string (*)(const std::string&);

std::string all_tokens(const std::string& folder) { return text_of_shard(folder + "/train_000000.bin"); }

PrepareOptions options_for(const std::string& input, const std::string& out) {
    PrepareOptions options = prepare_options(input, out, "txt,jsonl");
    options.overwrite = true;
    return options;
}

std::string text_of_line(const std::string& line, const std::string& field = "text") {
    std::string text;
    const std::string problem = json_text(line, field, text);
    return problem.empty() ? text : "problem: " + problem;
}

}  // namespace

TEST(ByteSource, UnpacksWhatThePackersWrite) {
    const TempFolder folder;
    const std::string text = long_text(), path = folder / "packed";
    for (const Pack pack : {gzip, zstd}) {
        write_file(path, pack(text));
        EXPECT_TRUE(is_compressed(path));
        EXPECT_TRUE(unpack(path) == text);
        EXPECT_TRUE(unpack(path, 1 << 20) == text);
        write_file(path, pack(text) + pack("") + pack("more"));
        EXPECT_TRUE(unpack(path) == text + "more") << "members one after the other";
        write_file(path, pack(""));
        EXPECT_EQ(unpack(path), "");
    }
    write_file(path, gzip("padded") + std::string(1024, '\0'));
    EXPECT_EQ(unpack(path), "padded");
    write_file(path, text);
    EXPECT_FALSE(is_compressed(path));
    EXPECT_TRUE(unpack(path) == text);
}

TEST(ByteSource, RefusesEveryCutAndDamage) {
    const TempFolder folder;
    const std::string text = long_text().substr(0, 20000), path = folder / "packed";
    for (const Pack pack : {gzip, zstd}) {
        const std::string packed = pack(text);
        for (size_t size = 4; size < packed.size(); size += 1 + size / 16) {
            write_file(path, packed.substr(0, size));
            EXPECT_ERROR(unpack(path), "packed: ", "cut short");
        }
        write_file(path, packed + "garbage");
        EXPECT_ERROR(unpack(path), "packed: ");
    }
    std::string damaged = gzip(text);
    damaged[damaged.size() - 6] ^= 1;  // the checksum
    write_file(path, damaged);
    EXPECT_ERROR(unpack(path), "damaged gzip file", "incorrect data check");
    write_file(path, gzip("padded") + std::string(8, '\0') + "x");
    EXPECT_ERROR(unpack(path), "bytes behind the end");
    write_file(folder / "text.gz", "plain text");
    EXPECT_ERROR(open_text_source(folder / "text.gz"), "is neither a gzip nor a zstd file");
    EXPECT_ERROR(open_text_source(folder / "none"), "cannot open");
    EXPECT_ERROR(open_text_source(folder.path()), "is not a regular file");
}

TEST(JsonText, TakesTheMemberOfTheOutermostObject) {
    EXPECT_EQ(text_of_line(R"({"id": 1, "text": "a\nb\u00e9\ud83d\ude00", "meta": {"text": "no"}})"), "a\nb\u00e9\U0001F600");
    EXPECT_EQ(text_of_line(R"({"meta": [{"text": "no"}], "text": "yes", "x": [1.5e3, null, true]})"), "yes");
    EXPECT_EQ(text_of_line(R"({"text": "first", "text": "last"})"), "last");
    EXPECT_EQ(text_of_line(R"({"content": "c"})", "content"), "c");
    EXPECT_EQ(text_of_line("{\"text\": \"\xff\"}"), "\xef\xbf\xbd");
    EXPECT_EQ(text_of_line(R"({"text": ""})"), "");
    EXPECT_NE(text_of_line("{\"text\": " + std::string(1'000'000, '[')).find("not JSON"), std::string::npos) << "depth costs no stack";
}

TEST(JsonText, NamesTheProblemAndWhatHelps) {
    const std::pair<const char*, const char*> bad[] = {
        {R"({"text": 5})", "a member \"text\" that is not a string"}, {R"({"text": {"text": "x"}})", "not a string"},
        {R"({"text": ["x"]})", "not a string"},                       {R"({"text": null})", "not a string"},
        {R"({"txt": "x"})", "no member \"text\""},                   {R"(["text", "x"])", "one JSON object a line is expected, not an array"},
        {R"("text")", "not a JSON object"},                          {R"({"text": "x")", "not JSON at its byte"},
        {R"({"text": "\ud80"})", "not JSON"},                        {R"({"text": "x"} y)", "not JSON"},
        {"  [", "one JSON object a line is expected, not an array"},
    };
    for (const auto& [line, problem] : bad) {
        const std::string said = text_of_line(line);
        EXPECT_NE(said.find(problem), std::string::npos) << said;
        EXPECT_EQ(said.find("member \"") != std::string::npos, said.find("--text-field") != std::string::npos) << said;
        EXPECT_EQ(said.find("array") == std::string::npos, said.find("--skip-bad-lines") != std::string::npos) << said;
    }
}

TEST(JsonText, ReplacesEachLoneSurrogate) {
    const std::string r = "\xef\xbf\xbd", smile = "\U0001F600";
    const std::pair<std::string, std::string> cases[] = {
        {R"(a\ud83d b)", "a" + r + " b"},             {R"(\uDE00)", r},
        {R"(\ud83d)", r},                             {R"(\ud83d\ud83d\ude00)", r + smile},
        {R"(\ude00\ud83d)", r + r},                   {R"(\ud83d\u0041\ude00)", r + "A" + r},
        {R"(\ud83d\n)", r + "\n"},                    {R"(\\ud83d)", "\\ud83d"},
        {R"(\\\ud83d)", "\\" + r},                   {R"(\uD83D\uDE00\udbff\udfff)", smile + "\U0010FFFF"},
        {R"(\ud7ff\ue000)", "\xed\x9f\xbf\xee\x80\x80"},
    };
    for (const auto& [escaped, text] : cases) EXPECT_EQ(text_of_line("{\"text\": \"" + escaped + "\"}"), text) << escaped;
    EXPECT_EQ(text_of_line(R"({"id\ud83d": "\udc00", "text": "x"})"), "x") << "in what is not taken";
    EXPECT_EQ(text_of_line("{\"text\": \"\xff\\ud83d\"}"), r + r) << "beside bytes that are not UTF-8";
    EXPECT_EQ(text_of_line(R"({"\ud83d": "x"})", r), "x");
}

TEST(Prepare, ReadsJsonLinesAndCompressedFilesLikePlainOnes) {
    const TempFolder folder;
    const std::string text = long_text();
    std::string lines;
    for (int i = 0; i < 30000; ++i) lines += message("{\"n\": %d, \"text\": \"document %d\\nof many\"}\n%s", i, i, i % 7 ? "" : "\n");
    lines += "{\"text\": \"" + std::string(5'000'000, 'x') + "\"}\n{\"text\": \"no line end\"}";
    std::map<std::string, std::string> results;
    for (const auto& [suffix, pack] : std::map<std::string, Pack>{{"", [](const std::string& t) { return t; }}, {".gz", gzip}, {".zst", zstd}}) {
        const std::string in = folder / ("in" + suffix);
        write_text(in + "/a.txt" + suffix, pack(text));
        write_text(in + "/b.jsonl" + suffix, pack(lines));
        write_text(in + "/c.txt" + suffix, pack("the last one"));
        PrepareOptions options = options_for(in, folder / "out");
        options.threads = suffix.empty() ? 1 : 3;
        const PrepareSummary summary = prepare_shards(options, ByteTokenizer());
        EXPECT_EQ(summary.train.documents, 30004);
        results[suffix] = all_tokens(folder / "out");
    }
    std::string expected = "|" + text;
    for (int i = 0; i < 30000; ++i) expected += message("|document %d\nof many", i);
    expected += "|" + std::string(5'000'000, 'x') + "|no line end|the last one";
    for (const auto& [suffix, result] : results) EXPECT_TRUE(result == expected) << suffix;
}

TEST(Prepare, HoldsOutTheEndOfACompressedDocument) {
    const TempFolder folder;
    const std::string text = long_text();
    for (const std::string& path : {folder / "in.txt", folder / "in.txt.gz"}) {
        write_file(path, path.ends_with("gz") ? gzip(text) : text);
        PrepareOptions options = options_for(path, folder / "out");
        options.val_fraction = 0.25;
        const PrepareSummary summary = prepare_shards(options, ByteTokenizer());
        EXPECT_EQ(summary.train.bytes + summary.val.bytes, static_cast<int64_t>(text.size()));
        EXPECT_NEAR(static_cast<double>(summary.val.bytes) / static_cast<double>(text.size()), 0.25, 1e-4);
        EXPECT_EQ(all_tokens(folder / "out"), "|" + text.substr(0, static_cast<size_t>(summary.train.bytes)));
    }
}

TEST(Prepare, NamesTheBadLineOrLeavesItOut) {
    const TempFolder folder;
    write_text(folder / "in.jsonl", "{\"text\": \"a\"}\n\n{\"txt\": \"b\"}\n{\"text\": \"c\"}\n{\"text\"\n");
    PrepareOptions options = options_for(folder / "in.jsonl", folder / "out");
    EXPECT_ERROR(prepare_shards(options, ByteTokenizer()), "in.jsonl:3: has no member \"text\"", "--text-field", "--skip-bad-lines");
    write_text(folder / "array.jsonl", "[\n{\"text\": \"a\"}\n]\n");
    EXPECT_ERROR(prepare_shards(options_for(folder / "array.jsonl", folder / "out"), ByteTokenizer()), "array.jsonl:1: one JSON object a line is expected, not an array");
    options.skip_bad_lines = true;
    EXPECT_EQ(prepare_shards(options, ByteTokenizer()).bad_lines, 2);
    EXPECT_EQ(all_tokens(folder / "out"), "|a|c");
    options.text_field = "txt";
    prepare_shards(options, ByteTokenizer());
    EXPECT_EQ(all_tokens(folder / "out"), "|b");
}

TEST(ShardStatistics, CountsTokensDocumentsAndText) {
    const TempFolder folder;
    TokenFileWriter writer(folder / "s.bin", {257, TokenizerId::bytes, 256});
    writer.append(std::vector<uint32_t>{'z', 256, 'a', 'b', 256, 'a', 256, 'a', 'a', 'c'});
    writer.publish();
    const std::vector<uint32_t> token_bytes(257, 1);
    const ShardStatistics s = shard_statistics(TokenFile(folder / "s.bin"), token_bytes);
    EXPECT_EQ(s.tokens, 10);
    EXPECT_EQ(s.distinct_tokens, 5);
    EXPECT_EQ(s.largest_token, 256u);
    EXPECT_EQ(s.documents, 3);
    EXPECT_EQ(s.shortest_document, 2);
    EXPECT_EQ(s.median_document, 3);
    EXPECT_EQ(s.longest_document, 4);
    EXPECT_EQ(s.text_bytes, 7);
    EXPECT_NEAR(s.entropy_nats, -(0.4 * std::log(0.4) + 0.3 * std::log(0.3) + 0.3 * std::log(0.1)), 1e-12);
    ASSERT_EQ(s.most_frequent.size(), 5u);
    EXPECT_EQ(s.most_frequent[0].token, uint32_t('a'));
    EXPECT_EQ(s.most_frequent[1].token, 256u);
    EXPECT_EQ(s.most_frequent[2].token, uint32_t('b')) << "the smaller token first among equals";
}

TEST(ShardStatistics, TakesForeignTokensOfAnySize) {
    const TempFolder folder;
    const std::string path = folder / "s.bin";
    std::vector<int32_t> words(256);
    words[0] = 20240801, words[1] = 7, words[2] = 3;
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(words.data()), 1024);
    const uint32_t tokens[] = {4294967295u, 7, 4294967295u};
    file.write(reinterpret_cast<const char*>(tokens), sizeof(tokens));
    file.close();
    const ShardStatistics s = shard_statistics(TokenFile(path), {});
    EXPECT_EQ(s.largest_token, 4294967295u);
    EXPECT_EQ(s.distinct_tokens, 2);
    EXPECT_EQ(s.documents, 0);
    EXPECT_EQ(s.text_bytes, 0);
}
