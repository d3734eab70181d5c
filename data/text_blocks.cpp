#include "data/text_blocks.h"

#include <algorithm>
#include <cstring>

#include "kernels/common/check.h"

namespace {

constexpr size_t kReadBytes = size_t{1} << 18;

// Not between the bytes of a character, where there are characters.
size_t character_start(std::string_view text, size_t at) {
    for (size_t back = 0; back < 4 && back < at; ++back)
        if ((static_cast<uint8_t>(text[at - back]) & 0xc0) != 0x80) return at - back;
    return at;
}

}  // namespace

bool is_json_lines(const SourceFile& file) {
    const std::string_view name = without_compression_suffix(file.name);
    return name.ends_with(".jsonl") || name.ends_with(".ndjson");
}

size_t part_end(std::string_view text) {
    if (text.size() <= kPartBytes) return text.size();
    const std::string_view near = text.substr(0, kLongestPart);
    const size_t cut = next_cut(near, kPartBytes);
    if (cut < near.size() || near.size() == text.size()) return cut;
    return character_start(text, kLongestPart);
}

// A file that is being read, with the bytes that were read ahead.
class TextBlockReader::OpenFile {
  public:
    OpenFile(const SourceFile& its, std::vector<char>& chunk) : file(its), source_(open_text_source(its.path)), chunk_(chunk) {}

    // Reads until `bytes` are ahead or the file ends.
    void read_ahead(size_t bytes) {
        while (!at_end_ && ahead().size() < bytes) {
            if (begin_ > pending_.size() / 2) pending_.erase(0, begin_), begin_ = 0;
            const size_t now = source_->read(chunk_.data(), chunk_.size());
            at_end_ = now < chunk_.size();
            pending_.append(chunk_.data(), now);
        }
    }
    std::string_view ahead() const { return std::string_view(pending_).substr(begin_); }
    void use(size_t bytes) { begin_ += bytes; }
    bool at_end() const { return at_end_; }  // `ahead` is all that is left
    bool finished() const { return at_end_ && ahead().empty(); }
    int64_t bytes_consumed() const { return source_->bytes_consumed(); }

    const SourceFile& file;
    int64_t line = 0;            // of a .jsonl file: the next one
    int64_t document = 0;        // its number, which names it in a file of several
    int64_t document_bytes = 0;  // of the current one, used already
    bool held_out = false;       // the rest is the validation part of the only document

  private:
    std::unique_ptr<ByteSource> source_;
    std::vector<char>& chunk_;  // scratch space
    std::string pending_;
    size_t begin_ = 0;
    bool at_end_ = false;
};

TextBlockReader::TextBlockReader(std::span<const SourceFile> files, DocumentRules rules)
    : files_(files), rules_(std::move(rules)), chunk_(kReadBytes) {}

TextBlockReader::~TextBlockReader() = default;

bool TextBlockReader::open_next() {
    if (open_ && !open_->finished()) return true;
    if (open_) bytes_before_ += open_->file.bytes;
    open_.reset();
    if (next_file_ == files_.size()) return false;
    open_ = std::make_unique<OpenFile>(files_[next_file_++], chunk_);
    return true;
}

bool TextBlockReader::next(TextBlock& block) {
    block.text.clear();
    block.parts.clear();
    block.lines = nullptr;
    while (block.text.size() < kPartBytes && !block.lines && open_next()) {
        if (!is_json_lines(open_->file))
            add_documents(block);
        else if (block.text.empty())
            add_lines(block);
        else
            break;  // lines get a block of their own
    }
    block.bytes_consumed = bytes_before_ + (open_ ? open_->bytes_consumed() : 0);
    return !block.text.empty();
}

// The next kPartBytes of whole lines, or one longer line.
void TextBlockReader::add_lines(TextBlock& block) {
    OpenFile& open = *open_;
    size_t end = std::string_view::npos;
    for (size_t bytes = kPartBytes; end == std::string_view::npos; bytes = std::min(2 * bytes, kLongestLine)) {
        open.read_ahead(bytes);
        if (open.finished()) return;
        const size_t newline = open.ahead().rfind('\n');
        end = open.at_end() ? open.ahead().size() : newline == std::string_view::npos ? newline : newline + 1;
        REQUIRE(end != std::string_view::npos || open.ahead().size() < kLongestLine, "%s:%lld: a line of more than %zu MiB",
                open.file.path.c_str(), static_cast<long long>(open.line + 1), kLongestLine >> 20);
    }
    block.text = open.ahead().substr(0, end);
    block.lines = &open.file;
    block.first_line = open.line;
    open.line += std::count(block.text.begin(), block.text.end(), '\n');
    open.use(end);
}

// Parts of the file's documents until the block is full.
void TextBlockReader::add_documents(TextBlock& block) {
    OpenFile& open = *open_;
    const std::string& separator = rules_.separator;
    while (block.text.size() < kPartBytes) {
        open.read_ahead(kLongestPart + separator.size() + 1);
        if (open.finished()) return;
        const size_t found = separator.empty() ? std::string_view::npos : open.ahead().find(separator);
        const bool ends = found != std::string_view::npos || open.at_end();
        // Without the document's end in sight, what may be the beginning of a separator is left for later.
        const size_t seen = open.ahead().size() - (ends ? 0 : separator.size());
        const std::string_view rest = open.ahead().substr(0, std::min(found, seen));
        size_t end = part_end(rest);
        const bool hold_out = hold_out_before(end, open.document_bytes) && !open.held_out;
        if (hold_out) end = held_out_begin(rest, open.document_bytes);
        if (end > 0) add_part(block, rest.substr(0, end));
        const bool whole = ends && end == rest.size();
        open.use(end + (whole && found != std::string_view::npos ? separator.size() : 0));
        if (whole || hold_out) {
            open.document += open.document_bytes > 0;
            open.document_bytes = 0;
        }
        open.held_out |= hold_out;
    }
}

// Whether the validation part of the only document begins in its next `bytes`.
bool TextBlockReader::hold_out_before(size_t bytes, int64_t document_bytes) const {
    return rules_.hold_out_from >= 0 && rules_.hold_out_from - document_bytes < static_cast<int64_t>(bytes);
}

size_t TextBlockReader::held_out_begin(std::string_view rest, int64_t document_bytes) const {
    const int64_t wanted = std::max<int64_t>(1, rules_.hold_out_from - document_bytes);
    return std::min(next_line_cut(rest, static_cast<size_t>(wanted)), kLongestPart);
}

void TextBlockReader::add_part(TextBlock& block, std::string_view text) {
    const std::string& name = open_->file.name;
    const bool validation = rules_.hold_out_from >= 0 ? open_->held_out
                                                      : rules_.is_validation(rules_.separator.empty()
                                                                                 ? name
                                                                                 : name + "#" + std::to_string(open_->document));
    block.parts.push_back({.begin = block.text.size(), .end = block.text.size() + text.size(), .validation = validation,
                           .begins_document = open_->document_bytes == 0});
    block.text += text;
    open_->document_bytes += static_cast<int64_t>(text.size());
}
