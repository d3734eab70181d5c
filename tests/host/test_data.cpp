// Token files and the loader. prepare is tested in test_data_prepare.cpp.
#include <cmath>
#include <cstdlib>
#include <map>
#include <set>
#include <thread>
#include <utility>

#include "data/loader.h"
#include "data/permutation.h"
#include "tests/host/test_data_support.h"

namespace {

struct Batch {
    std::vector<int32_t> inputs, targets;
    bool operator==(const Batch&) const = default;
};

Batch batch_of(const DataLoader& loader, int64_t step, int64_t first_sample, int64_t n_samples) {
    Batch batch{std::vector<int32_t>(n_samples * loader.seq_len(), -1), {}};
    batch.targets = batch.inputs;
    loader.fill(step, first_sample, n_samples, batch.inputs.data(), batch.targets.data());
    return batch;
}

Batch batch_of(const DataLoader& loader, int64_t step) { return batch_of(loader, step, 0, loader.samples_per_step()); }

// Three shards of 10, 7 and 20 samples of 8 tokens, each with some tokens left over.
struct ThreeShards {
    TempFolder folder;
    std::vector<std::string> paths{write_shard(folder / "a_train_0.bin", 0, 10 * 8 + 3),
                                   write_shard(folder / "a_train_1.bin", 1000, 7 * 8 + 1),
                                   write_shard(folder / "a_train_2.bin", 2000, 20 * 8 + 8)};
    static constexpr int64_t kSamples = 37;

    DataLoaderOptions options(int64_t samples_per_step, uint64_t seed = 1) const {
        return {.shards = paths, .seq_len = 8, .samples_per_step = samples_per_step, .seed = seed};
    }
};

// Overwrites header words of a good shard of 5 tokens and says what opening it reports.
std::string error_with_header(const std::map<int, int32_t>& words, int extra_bytes = 0) {
    const TempFolder folder;
    const std::string path = write_shard(folder / "s.bin", 0, 5);
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    for (const auto& [word, value] : words) {
        file.seekp(word * 4);
        file.write(reinterpret_cast<const char*>(&value), 4);
    }
    file.close();
    std::filesystem::resize_file(path, std::filesystem::file_size(path) + extra_bytes);
    return error_of([&] { TokenFile reader(path); });
}

void expect_contains(const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
}

}  // namespace

TEST(TokenFile, WritesAndReadsBothWidths) {
    const TempFolder folder;
    for (const int32_t vocab : {65536, 65537}) {
        const std::string path = folder / std::to_string(vocab);
        TokenFileWriter writer(path, {vocab, TokenizerId::gpt2, 50256});
        writer.append(std::vector<uint32_t>{1, 2, 3});
        writer.append({});
        writer.append(std::vector<uint32_t>{static_cast<uint32_t>(vocab) - 1});
        EXPECT_FALSE(std::filesystem::exists(path)) << "nothing under the final name before publish";
        writer.publish();
        EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));

        const TokenFile reader(path);
        EXPECT_EQ(reader.size(), 4);
        EXPECT_EQ(reader.bytes_per_token(), vocab <= 65536 ? 2 : 4);
        EXPECT_EQ(reader.info().vocab_size, vocab);
        EXPECT_EQ(reader.info().tokenizer, TokenizerId::gpt2);
        EXPECT_EQ(reader.info().end_of_text, 50256);
        std::vector<int32_t> tokens(3);
        reader.read(1, 3, vocab, tokens.data());
        EXPECT_EQ(tokens, (std::vector<int32_t>{2, 3, vocab - 1}));
    }
}

TEST(TokenFile, ReadsForeignHeaders) {
    for (const auto& [word, value] : std::map<int, int32_t>{{4, 0}, {5, 0}, {6, 0}})
        EXPECT_EQ(error_with_header({{word, value}}), "");
}

TEST(TokenFile, RefusesEachDamageOfTheHeader) {
    EXPECT_EQ(error_with_header({}), "");
    expect_contains(error_with_header({{0, 20240519}}), "magic 20240519, must be 20240520");
    expect_contains(error_with_header({{1, 2}}), "version 2, must be 1");
    expect_contains(error_with_header({{0, 20240801}}), "version 1, must be 7");
    expect_contains(error_with_header({{2, -5}}), "-5 and 0, neither may be negative");
    expect_contains(error_with_header({{3, -1}}), "5 and -1, neither may be negative");
    expect_contains(error_with_header({{2, 0}}), "holds 0 tokens, must be at least 1");
    expect_contains(error_with_header({{2, 6}}), "the file is truncated");
    expect_contains(error_with_header({{2, 4}}), "the file is too long");
    expect_contains(error_with_header({{3, 1}}), "2147483653 tokens");
    expect_contains(error_with_header({{3, INT32_MAX}, {2, INT32_MAX}}), "truncated");
    expect_contains(error_with_header({{4, -1}}), "vocabulary size -1");
    expect_contains(error_with_header({{5, 3}}), "tokenizer 3");
    expect_contains(error_with_header({{6, 60000}}), "end-of-text token 60000");
    expect_contains(error_with_header({{6, -1}}), "end-of-text token -1");
}

TEST(TokenFile, RefusesWrongSizes) {
    expect_contains(error_with_header({}, -2), "truncated");
    expect_contains(error_with_header({}, -1), "truncated");
    expect_contains(error_with_header({}, -10), "truncated");
    expect_contains(error_with_header({}, 1), "bytes of tokens");
    expect_contains(error_with_header({}, 2), "too long");
    expect_contains(error_with_header({}, -11), "at least its header of 1024");
    expect_contains(error_with_header({}, -1034), "0 bytes, a token file has at least its header");
}

TEST(TokenFile, RefusesWhatIsNoFile) {
    const TempFolder folder;
    EXPECT_ERROR(TokenFile(folder / "none.bin"), "none.bin", "No such file");
    EXPECT_ERROR(TokenFile(folder.path()), "is not a regular file");
    EXPECT_ERROR(TokenFile("/dev/null"), "is not a regular file");
}

// Sparse, so it takes no room on the disk.
TEST(TokenFile, HoldsMoreThan2To31Tokens) {
    const TempFolder folder;
    const std::string path = write_shard(folder / "large.bin", 7, 1);
    const int64_t count = (int64_t{1} << 31) + 9;
    std::filesystem::resize_file(path, 1024 + 2 * count);
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    const int32_t words[] = {9, 1};
    const uint16_t last = 4321;
    file.seekp(8).write(reinterpret_cast<const char*>(words), sizeof(words));
    file.seekp(1024 + 2 * (count - 1)).write(reinterpret_cast<const char*>(&last), 2);
    file.close();

    const TokenFile reader(path);
    ASSERT_EQ(reader.size(), count);
    int32_t tokens[2];
    reader.read(count - 2, 2, 0, tokens);
    EXPECT_EQ(tokens[1], 4321);
    EXPECT_ERROR(reader.read(count - 1, 2, 0, tokens), "2147483657");
    const DataLoader loader({.shards = {path}, .seq_len = 1, .samples_per_step = 1, .shuffle = false});
    EXPECT_EQ(batch_of(loader, count - 2).targets[0], 4321);
}

TEST(TokenFileWriter, LeavesNothingWhenItDoesNotFinish) {
    const TempFolder folder;
    {
        TokenFileWriter writer(folder / "s.bin", {100, TokenizerId::unknown, 0});
        writer.append(std::vector<uint32_t>{1, 2});
        EXPECT_ERROR(writer.append(std::vector<uint32_t>{100}), "token 100, must be below the vocabulary size 100");
    }
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
    EXPECT_ERROR(TokenFileWriter(folder / "no/s.bin", {100, TokenizerId::unknown, 0}), "cannot create", "No such file");
    TokenFileWriter empty(folder / "e.bin", {100, TokenizerId::unknown, 0});
    EXPECT_ERROR(empty.publish(), "no tokens to write");
}

TEST(TokenFileWriter, ReportsAFullDisk) {
    if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "this machine has no /dev/full";
    const TempFolder folder;
    std::filesystem::create_symlink("/dev/full", folder / "s.bin.tmp");
    TokenFileWriter writer(folder / "s.bin", {100, TokenizerId::unknown, 0});
    EXPECT_ERROR(writer.append(std::vector<uint32_t>(100000, 1)); writer.publish(), "No space left");
}

TEST(Permutation, IsABijectionForEverySize) {
    std::vector<int64_t> sizes(300);
    std::iota(sizes.begin(), sizes.end(), 1);
    for (const int64_t n : {511, 512, 513, 4095, 4096, 4097, 65537, 100003, 262144}) sizes.push_back(n);
    for (const int64_t n : sizes) {
        const Permutation order(n, static_cast<uint64_t>(n) * 7);
        std::vector<bool> seen(n);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t value = order(i);
            ASSERT_TRUE(value >= 0 && value < n && !seen[value]) << "n=" << n << " i=" << i << " value=" << value;
            seen[value] = true;
        }
    }
    EXPECT_ERROR(Permutation(0, 1), "n=0");
}

// Each value is equally likely at each place: over 20,000 keys, 5 standard deviations of a binomial count.
TEST(Permutation, IsUniformOverKeys) {
    constexpr int64_t n = 10, keys = 20000;
    std::vector<int> count(n * n);
    for (uint64_t key = 0; key < keys; ++key)
        for (int64_t i = 0; i < n; ++i) ++count[i * n + Permutation(n, key)(i)];
    const double expected = double(keys) / n, tolerance = 5 * std::sqrt(expected * (1 - 1.0 / n));
    for (const int c : count) EXPECT_NEAR(c, expected, tolerance);
}

// Checkpoints resume by recomputing the order, so the order must never change.
TEST(Permutation, NeverChanges) {
    const Permutation small(10, 1), large(1000000, 42);
    const int64_t expected[] = {3, 6, 7, 5, 2, 1, 8, 0, 4, 9};
    for (int64_t i = 0; i < 10; ++i) EXPECT_EQ(small(i), expected[i]);
    EXPECT_EQ(large(0), 464155);
    EXPECT_EQ(large(1), 933635);
}

// Neighbours must not stay neighbours: in a random order about 2 of n pairs follow each other.
TEST(Permutation, SeparatesNeighbours) {
    const Permutation order(100000, 3);
    int adjacent = 0;
    for (int64_t i = 0; i + 1 < 100000; ++i) adjacent += std::abs(order(i + 1) - order(i)) == 1;
    EXPECT_LE(adjacent, 12);
}

TEST(DataLoader, CountsSamplesAndClaims) {
    const ThreeShards data;
    const DataLoader loader(data.options(4));
    EXPECT_EQ(loader.samples_per_epoch(), data.kSamples);
    EXPECT_EQ(loader.tokens(), 83 + 57 + 168);
    EXPECT_EQ(loader.shards(), 3u);
    EXPECT_EQ(loader.vocab_size(), 60000);
}

TEST(DataLoader, TargetsAreInputsShiftedByOne) {
    const ThreeShards data;
    const DataLoader loader(data.options(data.kSamples));
    for (int64_t step = 0; step < 3; ++step) {
        const Batch batch = batch_of(loader, step);
        for (size_t i = 0; i < batch.inputs.size(); ++i) ASSERT_EQ(batch.targets[i], batch.inputs[i] + 1);
    }
}

// 7 does not divide 37, so batches cross the ends of epochs.
TEST(DataLoader, EveryEpochHasEverySampleOnceInItsOwnOrder) {
    const ThreeShards data;
    const DataLoader loader(data.options(7));
    std::vector<int32_t> firsts;
    for (int64_t step = 0; step < data.kSamples * 4 / 7 + 1; ++step) {
        const Batch batch = batch_of(loader, step);
        for (int64_t k = 0; k < 7; ++k) firsts.push_back(batch.inputs[k * 8]);
    }
    std::set<int32_t> expected;
    for (const auto& [first, samples] : std::map<int32_t, int32_t>{{0, 10}, {1000, 7}, {2000, 20}})
        for (int32_t i = 0; i < samples; ++i) expected.insert(first + 8 * i);
    std::set<std::vector<int32_t>> orders;
    for (int epoch = 0; epoch < 4; ++epoch) {
        const auto begin = firsts.begin() + epoch * data.kSamples;
        EXPECT_EQ(std::set<int32_t>(begin, begin + data.kSamples), expected) << "epoch " << epoch;
        orders.emplace(begin, begin + data.kSamples);
    }
    EXPECT_EQ(orders.size(), 4u) << "each epoch has an order of its own";
}

// A known bug elsewhere: after a resume in a later shard or epoch, shard 0 is read again.
TEST(DataLoader, ResumesAtAnyStep) {
    const ThreeShards data;
    for (const bool shuffle : {true, false}) {
        DataLoaderOptions options = data.options(5);
        options.shuffle = shuffle;
        std::vector<Batch> straight;
        const DataLoader first(options);
        for (int64_t step = 0; step < 30; ++step) straight.push_back(batch_of(first, step));
        for (const int64_t step : {29, 3, 8, 14, 0, 22}) {
            const DataLoader resumed(options);
            EXPECT_EQ(batch_of(resumed, step), straight[step]) << "step " << step;
        }
    }
}

TEST(DataLoader, RanksTakeSlicesOfTheSameBatch) {
    const ThreeShards data;
    const DataLoader loader(data.options(12));
    for (int64_t step = 0; step < 8; ++step) {
        const Batch whole = batch_of(loader, step);
        Batch joined;
        for (const auto& [first, count] : {std::pair{0, 5}, {5, 1}, {6, 0}, {6, 6}}) {
            const Batch slice = batch_of(loader, step, first, count);
            joined.inputs.insert(joined.inputs.end(), slice.inputs.begin(), slice.inputs.end());
            joined.targets.insert(joined.targets.end(), slice.targets.begin(), slice.targets.end());
        }
        EXPECT_EQ(joined, whole);
    }
}

TEST(DataLoader, SeedChangesTheOrderAndNothingElseDoes) {
    const ThreeShards data;
    const DataLoader one(data.options(6)), other(data.options(6, 2)), wide(data.options(12));
    EXPECT_NE(batch_of(one, 0), batch_of(other, 0));
    EXPECT_EQ(batch_of(one, 5), batch_of(wide, 2, 6, 6)) << "the row of samples does not depend on the batch size";
}

TEST(DataLoader, SequentialModeKeepsTheOrder) {
    const ThreeShards data;
    DataLoaderOptions options = data.options(1);
    options.shuffle = false;
    const DataLoader loader(options);
    for (int32_t i = 0; i < 2 * data.kSamples; ++i) {
        const int32_t k = i % 37;
        const int32_t expected = k < 10 ? 8 * k : k < 17 ? 1000 + 8 * (k - 10) : 2000 + 8 * (k - 17);
        EXPECT_EQ(batch_of(loader, i).inputs[0], expected) << "sample " << i;
    }
}

TEST(DataLoader, FillsFromManyThreads) {
    const ThreeShards data;
    const DataLoader loader(data.options(9));
    std::vector<Batch> expected, found(64);
    for (int64_t step = 0; step < 64; ++step) expected.push_back(batch_of(loader, step));
    {
        std::vector<std::jthread> threads;
        for (int t = 0; t < 4; ++t)
            threads.emplace_back([&, t] {
                for (int64_t step = t; step < 64; step += 4) found[step] = batch_of(loader, step);
            });
    }
    EXPECT_EQ(found, expected);
}

TEST(DataLoader, RefusesTokensOutsideTheVocabulary) {
    const ThreeShards data;
    const TempFolder folder;
    DataLoaderOptions options = data.options(data.kSamples);
    options.vocab_size = 59999;
    EXPECT_ERROR(DataLoader{options}, "a_train_0.bin", "vocabulary of 60000", "59999", "--vocab-size 60000");

    // A file that claims less than it holds, as a foreign one does: found when read, in a target too.
    const std::string path = write_shard(folder / "foreign_train.bin", 100, 17);
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(16).write("\0\0\0\0", 4);
    file.close();
    const DataLoaderOptions foreign{.shards = {path}, .seq_len = 8, .samples_per_step = 1, .shuffle = false};
    for (const auto& [vocab, position] : std::map<int32_t, int>{{103, 3}, {108, 8}}) {
        DataLoaderOptions limited = foreign;
        limited.vocab_size = vocab;
        EXPECT_ERROR(batch_of(DataLoader(limited), 0), "foreign_train.bin", message("token %d at position %d", vocab, position));
    }
    DataLoaderOptions enough = foreign;
    enough.vocab_size = 117;
    EXPECT_EQ(batch_of(DataLoader(enough), 1).targets.back(), 116);

    // 32-bit tokens of 2^31 and more must not pass as negative numbers.
    const std::string wide = write_shard(folder / "wide_train.bin", 0, 9, 100000);
    std::fstream(wide, std::ios::in | std::ios::out | std::ios::binary).seekp(1024).write("\xff\xff\xff\xff", 4);
    DataLoaderOptions options32{.shards = {wide}, .seq_len = 8, .samples_per_step = 1, .vocab_size = 100000};
    EXPECT_ERROR(batch_of(DataLoader(options32), 0), "token 4294967295 at position 0");
}

TEST(DataLoader, RefusesBadSizes) {
    const ThreeShards data;
    DataLoaderOptions options = data.options(4);
    options.seq_len = 168;
    EXPECT_ERROR(DataLoader{options}, "no sample of 168 + 1 consecutive tokens");
    options.seq_len = 167;
    EXPECT_EQ(DataLoader(options).samples_per_epoch(), 1);
    options.seq_len = 0;
    EXPECT_ERROR(DataLoader{options}, "sequence length 0");
    EXPECT_ERROR(DataLoader{DataLoaderOptions{}}, "no shards");
    EXPECT_ERROR(DataLoader(data.options(0)), "0 samples per step");
    const DataLoader loader(data.options(4));
    EXPECT_ERROR(batch_of(loader, -1), "step -1");
    EXPECT_ERROR(batch_of(loader, INT64_MAX / 4), "out of range");
    EXPECT_ERROR(batch_of(loader, 0, 3, 2), "2 samples from 3 asked for, a step has 4");
}

TEST(DataLoader, RefusesMixedTokenizers) {
    const TempFolder folder;
    std::vector<std::string> paths;
    for (const TokenizerId id : {TokenizerId::unknown, TokenizerId::bytes, TokenizerId::gpt2}) {
        paths.push_back(folder / tokenizer_name(id));
        TokenFileWriter writer(paths.back(), {50257, id, 0});
        writer.append(std::vector<uint32_t>(20));
        writer.publish();
    }
    EXPECT_ERROR((DataLoader{{.shards = paths, .seq_len = 4}}), "tokenizer gpt2, the shards before it with bytes");
    paths.pop_back();
    EXPECT_EQ(DataLoader({.shards = paths, .seq_len = 4}).info().tokenizer, TokenizerId::bytes);
}

TEST(FindShards, TakesFoldersAndPatterns) {
    const TempFolder folder;
    for (const char* name : {"b_train_2.bin", "b_train_1.bin", "B_train_1.bin", "b_val_0.bin", "b_train_3.bin.tmp", "train.txt"})
        write_text(folder / name, "x");
    const auto in = [&](const std::vector<std::string>& names) {
        std::vector<std::string> paths;
        for (const std::string& name : names) paths.push_back(folder / name);
        return paths;
    };
    EXPECT_EQ(find_shards(folder.path(), "train"), in({"B_train_1.bin", "b_train_1.bin", "b_train_2.bin"}));
    EXPECT_EQ(find_shards(folder.path(), "val"), in({"b_val_0.bin"}));
    EXPECT_EQ(find_shards(folder / "b_*_?.bin", "train"), in({"b_train_1.bin", "b_train_2.bin", "b_val_0.bin"}));
    EXPECT_EQ(find_shards(folder / "b_val_0.bin", "train"), in({"b_val_0.bin"}));
    EXPECT_ERROR(find_shards(folder.path(), "test"), "\"test\"");
    EXPECT_ERROR(find_shards(folder / "none*.bin", "train"), "none*.bin", "no shards");
}
