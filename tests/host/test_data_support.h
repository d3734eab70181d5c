// What the data tests share: small shards, options of prepare, and the text of an expected error.
#pragma once
#include <gtest/gtest.h>

#include <filesystem>
#include <numeric>
#include <string>
#include <vector>

#include "data/prepare_shards.h"
#include "data/token_file.h"
#include "tests/host/temp_folder.h"

// write_file, and the folders that lead there.
inline void write_text(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    write_file(path, text);
}

// Tokens first, first + 1, ...: a sample's place can be read off its first token.
inline std::string write_shard(const std::string& path, uint32_t first, size_t count, int32_t vocab_size = 60000) {
    std::vector<uint32_t> tokens(count);
    std::iota(tokens.begin(), tokens.end(), first);
    TokenFileWriter writer(path, {vocab_size, TokenizerId::unknown, 0});
    writer.append(tokens);
    writer.publish();
    return path;
}

// All byte tokens of a shard as text, "|" for end-of-text.
inline std::string text_of_shard(const std::string& path) {
    const TokenFile file(path);
    std::vector<int32_t> tokens(file.size());
    file.read(0, file.size(), 257, tokens.data());
    std::string text;
    for (const int32_t token : tokens) text += token == 256 ? '|' : static_cast<char>(token);
    return text;
}

// Everything into the training split.
inline PrepareOptions prepare_options(const std::string& input, const std::string& out, const std::string& extensions) {
    PrepareOptions options;
    options.inputs = {input};
    options.out = out;
    options.extensions = extensions;
    options.val_fraction = 0;
    return options;
}

// EXPECT_ERROR(action, part, ...): an Error of one line that contains every part.
#define EXPECT_ERROR(action, ...)                                                                       \
    do {                                                                                                \
        const std::string text = error_of([&] { action; });                                             \
        EXPECT_NE(text, "") << "no error from " #action;                                                \
        EXPECT_EQ(text.find('\n'), std::string::npos) << text;                                          \
        for (const std::string& part : std::vector<std::string>{__VA_ARGS__})                           \
            EXPECT_NE(text.find(part), std::string::npos) << text;                                      \
    } while (0)
