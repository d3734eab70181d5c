// A corpus of text files -> a folder of token files and their meta.json (FORMAT.md). The work of the program data/prepare.
//
// One thread reads files into blocks (text_blocks.h) and writes finished blocks in that order; `threads` more turn blocks into
// tokens. A bounded number of blocks is under way, so that memory grows with the threads and, by about 200 bytes each,
// with the number of files, and with nothing else.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/tokenizer.h"

// A sample of training lies within one shard: shorter ones would be cut to nothing, or be many thousands of files.
constexpr int64_t kLeastShardTokens = 4096;

constexpr int kMostThreads = 1024;

struct PrepareOptions {
    std::vector<std::string> inputs;  // files and folders
    std::string out;                  // folder; made when missing
    std::string extensions;           // kTextExtensions (corpus.h) or a list like it
    std::string separator;            // between the documents of one text file; empty: a file is a document
    std::string text_field = "text";  // of the objects of .jsonl files, each line of which is a document
    bool skip_bad_lines = false;      // of .jsonl files: otherwise the first one is an Error
    double val_fraction = 0.05;
    int64_t shard_tokens = 100'000'000;  // at least kLeastShardTokens
    int threads = 1;         // the output does not depend on it
    bool overwrite = false;  // replace the shards that `out` holds already
    std::function<void(int64_t bytes_done, int64_t bytes_total)> progress;  // of the files as they are; may be empty
};

struct SplitCounts {
    int64_t documents = 0, bytes = 0, tokens = 0, shards = 0;
};

struct PrepareSummary {
    int64_t files = 0;  // taken; the next three were not
    int64_t binary_files = 0, empty_files = 0, duplicate_files = 0;
    int64_t other_files = 0;  // in folders, of extensions that were not asked for
    int64_t bad_lines = 0;  // left out of .jsonl files
    SplitCounts train, val;
    // Nats per symbol of the validation split's frequencies, 0 without one: over tokens it is the loss of a model that
    // knows nothing but how often each token occurs, the mark that training must pass.
    double val_token_entropy = 0, val_byte_entropy = 0;
};

// Error, when an option's value is not allowed. Looks at no file.
void require_valid(const PrepareOptions& options);

// Either publishes a whole data set or throws Error and leaves `out` as it was.
PrepareSummary prepare_shards(const PrepareOptions& options, const Tokenizer& tokenizer);
