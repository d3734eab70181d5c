// From text files to shards: which files and documents are taken, how they are cut, what is written and what is refused.
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "data/corpus.h"
#include "data/hash.h"
#include "data/parallel_for.h"
#include "data/ordered_pool.h"
#include "data/prepare_shards.h"
#include "data/text_blocks.h"
#include "tests/host/test_data_support.h"

namespace {

std::vector<std::string> names_of(const std::vector<SourceFile>& files) {
    std::vector<std::string> names;
    for (const SourceFile& file : files) names.push_back(file.name);
    return names;
}

// Every file of a folder by name.
std::map<std::string, std::string> contents_of(const std::string& folder) {
    std::map<std::string, std::string> contents;
    for (const auto& entry : std::filesystem::directory_iterator(folder))
        contents[entry.path().filename().string()] = read_file(entry.path().string());
    return contents;
}

// All tokens of one split as text, "|" for end-of-text.
std::string text_of(const std::string& folder, const std::string& split) {
    std::string text;
    for (const auto& [name, bytes] : contents_of(folder))
        if (name.starts_with(split)) text += text_of_shard(folder + "/" + name);
    return text;
}

PrepareOptions options_for(const std::string& input, const std::string& out) { return prepare_options(input, out, kTextExtensions); }

PrepareSummary prepare(const PrepareOptions& options) { return prepare_shards(options, ByteTokenizer()); }

}  // namespace

TEST(FindSourceFiles, SearchesFoldersInByteOrder) {
    const TempFolder folder;
    for (const char* name : {"b.txt", "B.TXT", "a/z.cpp", "a.md", "README", "image.png", ".hidden.txt", ".git/config.txt"})
        write_text(folder / name, name);
    std::filesystem::create_directory_symlink(folder.path(), folder / "a/cycle");
    std::filesystem::create_symlink("nothing", folder / "dangling.txt");
    const auto find = [&](const std::vector<std::string>& inputs, const std::string& extensions) {
        return names_of(find_source_files(inputs, parse_extensions(extensions)));
    };
    using Names = std::vector<std::string>;
    EXPECT_EQ(find({folder.path()}, kTextExtensions), (Names{"B.TXT", "README", "a.md", "a/z.cpp", "b.txt"}));
    EXPECT_EQ(find({folder.path()}, ".CPP,none"), (Names{"README", "a/z.cpp"}));
    EXPECT_EQ(find({folder / "b.txt", folder.path(), folder / "a"}, "txt,cpp"), (Names{"b.txt", "B.TXT", "a/z.cpp"}))
        << "inputs in their order, no file twice";
    EXPECT_EQ(find({folder / "image.png"}, "txt"), (Names{"image.png"})) << "a file that is named is taken";
    EXPECT_ERROR(find({folder / "none"}, "txt"), "none: no such file or folder");
    EXPECT_ERROR(find({"/dev/null"}, "txt"), "is neither a file nor a folder");
    EXPECT_ERROR(parse_extensions("txt,,md"), "--extensions");
    for (const char* none : {"*.md", "m?", "[ch]", "tar.gz", "..md", "a/b", " md", "*"})
        EXPECT_ERROR(parse_extensions(std::string("txt,") + none), "\"" + std::string(none) + "\" is no extension", "what follows the last dot");
    EXPECT_EQ(parse_extensions("c++,.F90,x_t"), (std::set<std::string>{"c++", "f90", "x_t"}));
}

TEST(FindSourceFiles, FollowsLinksOutOfTheFolder) {
    const TempFolder folder, elsewhere;
    write_text(elsewhere / "far.txt", "far");
    write_text(folder / "near.txt", "near");
    std::filesystem::create_directory_symlink(elsewhere.path(), folder / "link");
    EXPECT_EQ(names_of(find_source_files({folder.path()}, {"txt"})), (std::vector<std::string>{"link/far.txt", "near.txt"}));
}

TEST(Corpus, CutsBeforeSpacesThatFollowVisibleCharacters) {
    EXPECT_EQ(next_cut("ab\ncd ef", 0), 2u);
    EXPECT_EQ(next_cut("ab\ncd ef", 3), 5u);
    EXPECT_EQ(next_cut("ab\ncd", 3), 5u) << "the end";
    EXPECT_EQ(next_cut("\n\n \n\t\nx\n", 0), 7u) << "not after white space";
    EXPECT_EQ(next_cut("\xe4\xb8\xad\t\xc3", 0), 3u) << "a letter that is not ASCII";
    EXPECT_EQ(next_cut("\xff\r", 0), 1u) << "what is not UTF-8 becomes U+FFFD";
    EXPECT_EQ(next_cut("", 5), 0u);
    EXPECT_EQ(next_line_cut("ab cd\n", 0), 5u);
    // Unicode's White_Space is no visible character; its neighbours are.
    for (const char* space : {"\u0085", "\u00a0", "\u1680", "\u2000", "\u2005", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"})
        EXPECT_EQ(next_cut(std::string(space) + "\n", 0), std::string_view(space).size() + 1);
    for (const char* visible : {"\u0086", "\u00a1", "\u1681", "\u1fff", "\u200b", "\u2030", "\u2060", "\u3001", "\u180e"})
        EXPECT_EQ(next_cut(std::string(visible) + "\n", 0), std::string_view(visible).size());
}

// The split is part of the data format: the hash must never change.
TEST(Corpus, SplitByNameIsStableAndInProportion) {
    int val = 0;
    for (int i = 0; i < 10000; ++i) val += split_position("folder/file" + std::to_string(i) + ".txt") < 0.05;
    EXPECT_NEAR(val, 500, 5 * 22);  // 5 standard deviations of a binomial count
    EXPECT_EQ(hash_bytes("crt/host_runtime.h"), 0xd5d01cde2f2c3fc0u);
    EXPECT_EQ(hash_bytes("cuda_fp8.h"), 0x6cfd37dc51e93fd7u);
    EXPECT_EQ(hash_bytes("abcd"), 0xe9a34ff64b43be2du);
    EXPECT_EQ(hash_bytes("a"), 0xc4850b2213703926u);
}

TEST(Corpus, PartsAreCutAtSpacesWithinBounds) {
    const std::string word(kPartBytes + 100, 'x');
    EXPECT_EQ(part_end("short"), 5u);
    EXPECT_EQ(part_end(word + " tail"), word.size());
    EXPECT_EQ(part_end(word), word.size()) << "the end of the document comes before the longest part";
    const std::string endless(kLongestPart + 10, 'x');
    EXPECT_EQ(part_end(endless), kLongestPart);
    std::string chinese;
    while (chinese.size() < kLongestPart + 10) chinese += "\xe4\xb8\xad";
    EXPECT_EQ(part_end(chinese), kLongestPart / 3 * 3) << "between characters";
    EXPECT_EQ(part_end(std::string(kLongestPart + 10, '\x80')), kLongestPart) << "no characters at all";
}

TEST(ParallelFor, VisitsAllAndReportsTheFirstError) {
    std::vector<int> visits(1000);
    parallel_for(visits.size(), 4, [&](size_t i, int thread) { visits[i] += 1 + (thread < 0 || thread >= 4); });
    EXPECT_EQ(visits, std::vector<int>(1000, 1));
    EXPECT_ERROR(parallel_for(100, 4, [](size_t i, int) { REQUIRE(i < 30, "at %zu", i); }), "at 30");
    parallel_for(0, 4, [](size_t, int) { FAIL(); });
}

TEST(OrderedPool, ReturnsItemsInOrderAndTheirErrors) {
    OrderedPool<int> pool(3, [](int& item, int thread) {
        REQUIRE(item != 70, "at 70 of thread %d", thread < 3 ? 0 : thread);
        item *= 2;
    });
    for (int i = 0; i < 100; ++i) pool.push(std::make_unique<int>(i));
    for (int i = 0; i < 70; ++i) EXPECT_EQ(*pool.pop(), 2 * i);
    EXPECT_ERROR(pool.pop(), "at 70 of thread 0");
    EXPECT_EQ(*pool.pop(), 142);  // the rest is dropped with the pool
}

TEST(Prepare, PutsEndOfTextBeforeEachDocument) {
    const TempFolder folder;
    write_text(folder / "in/b.txt", "second");
    write_text(folder / "in/a.txt", "first");
    write_text(folder / "in/c.txt", "");
    write_text(folder / "in/d.txt", std::string("bin\0ary", 7));
    write_text(folder / "in/e.txt", "first");
    write_text(folder / "in/f.txt", std::string(4096, 'x') + '\0');
    write_text(folder / "in/g.1.2", "left out by its name");
    const PrepareSummary summary = prepare(options_for(folder / "in", folder / "out"));
    EXPECT_EQ(text_of(folder / "out", "train"), "|first|second|" + std::string(4096, 'x') + '\0');
    EXPECT_EQ(summary.files, 3);
    EXPECT_EQ(summary.empty_files, 1);
    EXPECT_EQ(summary.binary_files, 1);
    EXPECT_EQ(summary.duplicate_files, 1);
    EXPECT_EQ(summary.other_files, 1);
    EXPECT_EQ(summary.train.documents, 3);
    EXPECT_EQ(summary.train.bytes, 5 + 6 + 4097);
    EXPECT_EQ(summary.train.tokens, summary.train.bytes + 3);
    EXPECT_FALSE(std::filesystem::exists(folder / "out/val_000000.bin"));
    EXPECT_TRUE(nlohmann::json::parse(read_file(folder / "out/meta.json"))["val_token_entropy_nats"].is_null());
}

// 400 files, one of them of many segments, over several shards.
TEST(Prepare, DoesNotDependOnTheNumberOfThreads) {
    const TempFolder folder;
    for (int i = 0; i < 400; ++i) {
        std::ostringstream text;
        for (int line = 0; line < (i == 7 ? 300000 : i); ++line) text << "file " << i << " line " << line << "\n";
        write_text(folder / message("in/%d/%d.txt", i % 7, i), text.str());
    }
    std::map<std::string, std::string> expected;
    for (const int threads : {1, 2, 5}) {
        PrepareOptions options = options_for(folder / "in", folder / "out");
        options.threads = threads;
        options.val_fraction = 0.1;
        options.shard_tokens = 1'000'003;
        options.overwrite = true;
        const PrepareSummary summary = prepare(options);
        const auto found = contents_of(folder / "out");
        if (expected.empty()) expected = found;
        EXPECT_EQ(found.size(), static_cast<size_t>(summary.train.shards + summary.val.shards + 1));
        EXPECT_TRUE(found == expected) << threads << " threads";
        EXPECT_GE(summary.train.shards, 6);
        EXPECT_GT(summary.val.documents, 20);
        EXPECT_EQ(summary.train.documents + summary.val.documents, 399) << "file 0 is empty";
    }
    EXPECT_EQ(TokenFile(folder / "out/train_000000.bin").size(), 1'000'003);
    EXPECT_EQ(TokenFile(folder / "out/train_000000.bin").info().end_of_text, 256);
}

// Longer than what is encoded at a time, so its parts come from several rounds.
TEST(Prepare, KeepsLongDocumentsWhole) {
    const TempFolder folder;
    std::string text;
    while (text.size() < 40'000'000) text += message("%zu: a line of a long document\n", text.size());
    write_text(folder / "in.txt", text);
    PrepareOptions options = options_for(folder / "in.txt", folder / "out");
    options.threads = 3;
    EXPECT_EQ(prepare(options).train.documents, 1);
    EXPECT_TRUE(text_of(folder / "out", "train") == "|" + text);
}

TEST(Prepare, ReportsProgressToTheEnd) {
    const TempFolder folder;
    write_text(folder / "in/a.txt", "12345");
    write_text(folder / "in/b.txt", "678");
    PrepareOptions options = options_for(folder / "in", folder / "out");
    int64_t done = 0, total = 0;
    options.progress = [&](int64_t now, int64_t all) { done = now, total = all; };
    prepare(options);
    EXPECT_EQ(done, 8);
    EXPECT_EQ(total, 8);
}

TEST(Prepare, HoldsOutTheEndOfASingleDocument) {
    const TempFolder folder;
    std::string text;
    for (int i = 0; i < 100; ++i) text += message("line %02d\n", i);
    write_text(folder / "in.txt", text);
    PrepareOptions options = options_for(folder / "in.txt", folder / "out");
    options.val_fraction = 0.25;
    prepare(options);
    const std::string train = text_of(folder / "out", "train"), val = text_of(folder / "out", "val");
    EXPECT_EQ(train.substr(1) + val.substr(1), text);
    EXPECT_NEAR(static_cast<double>(val.size()), 200, 10);
}

TEST(Prepare, SplitsAFileAtTheSeparator) {
    const TempFolder folder;
    const auto text_with = [&](const std::string& text, const std::string& separator) {
        write_text(folder / "in.txt", text);
        PrepareOptions options = options_for(folder / "in.txt", folder / "out");
        options.separator = separator;
        options.overwrite = true;
        prepare(options);
        return text_of(folder / "out", "train");
    };
    EXPECT_EQ(text_with("one\n--\ntwo\n--\nthree\n", "\n--\n"), "|one|two|three\n");
    EXPECT_EQ(text_with("<>a<>b<><>c<>", "<>"), "|a|b|c") << "empty documents are none";
    // Separators at, before and across every place where reading or cutting could lose one.
    for (const size_t at : {kPartBytes, kLongestPart, kLongestPart + 4}) {
        for (size_t shift = 0; shift < 8; ++shift) {
            const std::string first(at - shift, 'x'), second(kPartBytes + 3, 'y');
            EXPECT_TRUE(text_with(first + "<--->" + second + "<--->z", "<--->") == "|" + first + "|" + second + "|z") << at << " " << shift;
        }
    }
}

TEST(Prepare, TakesAValidationDocumentFromAHandful) {
    const TempFolder folder;
    for (const char* name : {"a", "b", "c"}) write_text(folder / (std::string("in/") + name), name);
    PrepareOptions options = options_for(folder / "in", folder / "out");
    options.val_fraction = 1e-9;
    const PrepareSummary summary = prepare(options);
    EXPECT_EQ(summary.train.documents, 2);
    EXPECT_EQ(summary.val.documents, 1);
    const std::string val = text_of(folder / "out", "val");
    for (const char* name : {"a", "b", "c"}) EXPECT_LE(split_position(val.substr(1)), split_position(name));
}

TEST(Prepare, WritesTheEntropyOfTheValidationText) {
    const TempFolder folder;
    write_text(folder / "in.txt", std::string(15, 'x') + "\naaabbbcc");
    PrepareOptions options = options_for(folder / "in.txt", folder / "out");
    options.val_fraction = 0.4;
    prepare(options);
    ASSERT_EQ(text_of(folder / "out", "val"), "|\naaabbbcc");
    // Tokens: 10, of them 3, 3, 2, 1, 1. Bytes: 9, of them 3, 3, 2, 1.
    const auto meta = nlohmann::json::parse(read_file(folder / "out/meta.json"));
    EXPECT_NEAR(meta["val_token_entropy_nats"], -(0.6 * std::log(0.3) + 0.2 * std::log(0.2) + 0.2 * std::log(0.1)), 1e-12);
    EXPECT_NEAR(meta["val_byte_entropy_nats"], -(std::log(1. / 3) * 6 + std::log(2. / 9) * 2 + std::log(1. / 9)) / 9, 1e-12);
    EXPECT_EQ(meta["tokenizer"], "bytes");
    EXPECT_EQ(meta["vocab_size"], 257);
    EXPECT_EQ(meta["val"]["tokens"], 10);
}

TEST(Prepare, ReplacesOnlyItsOwnFilesAndOnlyWhenAsked) {
    const TempFolder folder;
    write_text(folder / "in/a.txt", std::string(10 * kLeastShardTokens, 'a'));
    PrepareOptions options = options_for(folder / "in", folder / "out");
    options.shard_tokens = kLeastShardTokens;
    EXPECT_EQ(prepare(options).train.shards, 11);
    write_text(folder / "out/mine.bin", "mine");
    EXPECT_ERROR(prepare(options), "holds shards already", "--overwrite");
    options.overwrite = true;
    options.shard_tokens = 6 * kLeastShardTokens;
    prepare(options);
    std::set<std::string> names;
    for (const auto& [name, bytes] : contents_of(folder / "out")) names.insert(name);
    EXPECT_EQ(names, (std::set<std::string>{"meta.json", "mine.bin", "train_000000.bin", "train_000001.bin"}));
}

TEST(Prepare, TakesAwayTheFoldersThatItMadeForNothing) {
    const TempFolder folder;
    write_text(folder / "bin", std::string(1, '\0'));
    std::filesystem::create_directory(folder / "mine");
    for (const char* out : {"a/b/c/", "mine", "mine/d"}) EXPECT_ERROR(prepare(options_for(folder / "bin", folder / out)), "no text in the input");
    EXPECT_ERROR(prepare(options_for(folder / "bin", folder / "bin/e")), "--out", "Not a directory");
    EXPECT_ERROR(prepare(options_for(folder / "bin", folder / ("f/" + std::string(300, 'x')))), "--out", "File name too long");
    EXPECT_FALSE(std::filesystem::exists(folder / "a")) << "of folders that lead there too";
    EXPECT_FALSE(std::filesystem::exists(folder / "f"));
    EXPECT_TRUE(contents_of(folder / "mine").empty());
}

TEST(Prepare, RefusesBadInputAndLeavesNothing) {
    const TempFolder folder;
    write_text(folder / "in/a.txt", "a");
    write_text(folder / "in/b.txt", "b");
    write_text(folder / "bin/a.txt", std::string(1, '\0'));
    const PrepareOptions good = options_for(folder / "in", folder / "out");
    const auto error_with = [&](auto change) {
        PrepareOptions options = good;
        change(options);
        return error_of([&] { prepare(options); });
    };
    const auto expect = [](const std::string& text, const std::string& part) {
        EXPECT_NE(text.find(part), std::string::npos) << text;
    };
    expect(error_with([](auto& o) { o.val_fraction = 1; }), "--val-fraction 1: must be at least 0 and below 1");
    expect(error_with([](auto& o) { o.val_fraction = std::nan(""); }), "--val-fraction nan");
    expect(error_with([](auto& o) { o.val_fraction = 1e-9, o.separator = "?"; }), "validation split is empty: 2 documents");
    expect(error_with([](auto& o) { o.val_fraction = 0.9999999; }), "training split is empty: 2 documents");
    expect(error_with([](auto& o) { o.shard_tokens = kLeastShardTokens - 1; }), "--shard-tokens 4095: must be at least 4096");
    expect(error_with([](auto& o) { o.threads = 0; }), "--threads 0");
    expect(error_with([](auto& o) { o.extensions = ""; }), "--extensions: is empty");
    expect(error_with([](auto& o) { o.out = ""; }), "--out: is empty");
    expect(error_with([](auto& o) { o.inputs = {""}; }), "INPUT: is empty");
    expect(error_with([](auto& o) { o.extensions = "md"; }), "no files with the extensions md");
    expect(error_with([&](auto& o) { o.inputs = {folder / "bin"}; }), "no text in the input: 1 binary");
    expect(error_with([&](auto& o) { o.out = folder / "in/a.txt"; }), "is not a folder");
    // Options first, then the input, then the output.
    const auto all_wrong = [&](auto& o) { o.threads = 0, o.inputs = {folder / "none"}, o.out = folder / "in/a.txt"; };
    expect(error_with(all_wrong), "--threads 0");
    expect(error_with([&](auto& o) { all_wrong(o), o.threads = 1; }), "none: no such file or folder");
    EXPECT_FALSE(std::filesystem::exists(folder / "out")) << "an error leaves an empty folder";
    EXPECT_EQ(prepare(good).train.documents, 2);
}
