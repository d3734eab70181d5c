// Token files ("shards"): 256 int32 header words, then the tokens. FORMAT.md defines every word.
// The 16-bit form is llm.c's GPT-2 form, the 32-bit form is llm.c's Llama form; foreign files of both kinds are read.
#pragma once
#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>

#include "data/mapped_file.h"

enum class TokenizerId : int32_t { unknown = 0, gpt2 = 1, bytes = 2 };
const char* tokenizer_name(TokenizerId id);  // "unknown", "gpt2", "bytes"

// What a header says about its tokens besides their number. Zero means "not said", as in every foreign file.
struct TokenFileInfo {
    int32_t vocab_size = 0;
    TokenizerId tokenizer = TokenizerId::unknown;
    int32_t end_of_text = 0;
};
// What to do where a model has fewer tokens than a file needs: "made with tokenizer gpt2; give --vocab-size 50257 or more, or ...".
std::string vocabulary_advice(const TokenFileInfo& info, int64_t needed);

// Read-only view of one token file. The constructor validates everything but the token values.
class TokenFile {
  public:
    explicit TokenFile(std::string path);

    const std::string& path() const { return path_; }
    const TokenFileInfo& info() const { return info_; }
    int64_t size() const { return size_; }  // in tokens, at least 1
    int32_t bytes_per_token() const { return bytes_per_token_; }

    // out[i] = token first + i, for i < count. Thread-safe. With vocab_size > 0, a token id that is not below it throws
    // Error naming this file and the token's position.
    void read(int64_t first, int64_t count, int32_t vocab_size, int32_t* out) const;

  private:
    std::string path_;
    MappedFile file_;
    TokenFileInfo info_;
    int64_t size_ = 0;
    int32_t bytes_per_token_ = 0;
};

// Streams tokens to PATH.tmp; publish() completes the header and renames the file to PATH. A writer that is destroyed
// before that removes its PATH.tmp, so an error never leaves a file that looks finished.
class TokenFileWriter {
  public:
    TokenFileWriter(std::string path, const TokenFileInfo& info);  // 16-bit where the vocabulary allows
    ~TokenFileWriter();
    TokenFileWriter(const TokenFileWriter&) = delete;
    TokenFileWriter& operator=(const TokenFileWriter&) = delete;

    void append(std::span<const uint32_t> tokens);  // each must be below info.vocab_size
    void close();                                   // header and data are on their way to the disk; still PATH.tmp
    void publish();                                 // close() if needed, then rename
    int64_t size() const { return size_; }
    int32_t bytes_per_token() const { return bytes_per_token_; }

  private:
    struct CloseFile {
        void operator()(std::FILE* file) const { std::fclose(file); }
    };
    void write_all(const void* data, size_t bytes);
    void write_header();
    std::string temporary() const { return path_ + ".tmp"; }

    std::string path_;
    TokenFileInfo info_;
    int64_t size_ = 0;
    int32_t bytes_per_token_ = 0;
    bool published_ = false;
    std::unique_ptr<std::FILE, CloseFile> file_;
};
