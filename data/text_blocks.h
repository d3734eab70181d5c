// Files -> blocks of text, the portions of work of data/prepare. A file is a stream here: what is in memory is bounded,
// whatever the sizes of files, documents and lines.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/byte_source.h"
#include "data/corpus.h"

// Part of one document, or the whole of it.
struct TextPart {
    size_t begin = 0, end = 0;  // in the block's text
    bool validation = false;
    bool begins_document = false;
};

struct TextBlock {
    std::string text;
    std::vector<TextPart> parts;         // of plain text
    const SourceFile* lines = nullptr;   // the .jsonl file that the text is whole lines of
    int64_t first_line = 0;              // from 0
    int64_t bytes_consumed = 0;          // of all files so far
};

struct DocumentRules {
    std::string separator;  // between the documents of one plain file; empty: the file is a document
    double val_fraction = 0;
    double val_first = -1;           // a document at this split_position() is for validation, too
    int64_t hold_out_from = -1;      // the only document: its validation part begins at a line's end from this byte on

    bool is_validation(std::string_view document) const {
        const double position = split_position(document);
        return position < val_fraction || position == val_first;
    }
};

// Sizes of what is encoded at once. A document without white space for kLongestPart bytes is cut there; its tokens around
// that place may then differ from those of the whole document. They do not depend on anything else.
inline constexpr size_t kPartBytes = size_t{1} << 20;
inline constexpr size_t kLongestPart = size_t{4} << 20;
inline constexpr size_t kLongestLine = size_t{64} << 20;  // of a .jsonl file

bool is_json_lines(const SourceFile& file);

// Where the part of a document that begins at `text`'s start ends: the same for a document in memory and in a stream.
// `text` is the rest of the document or at least its next kLongestPart bytes.
size_t part_end(std::string_view text);

class TextBlockReader {
  public:
    TextBlockReader(std::span<const SourceFile> files, DocumentRules rules);
    ~TextBlockReader();
    // Replaces `block` by the next one; false at the end. Files that change meanwhile are read as far as they go.
    bool next(TextBlock& block);

  private:
    class OpenFile;
    bool open_next();
    void add_lines(TextBlock& block);
    void add_documents(TextBlock& block);

    bool hold_out_before(size_t bytes, int64_t document_bytes) const;
    size_t held_out_begin(std::string_view rest, int64_t document_bytes) const;
    void add_part(TextBlock& block, std::string_view text);

    std::span<const SourceFile> files_;
    DocumentRules rules_;
    std::vector<char> chunk_;
    size_t next_file_ = 0;
    int64_t bytes_before_ = 0;  // of the files that are finished
    std::unique_ptr<OpenFile> open_;
};
