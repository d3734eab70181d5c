// Text files and folders -> documents: which files belong to a corpus, in which order, and where a text may be cut.
#pragma once
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

struct SourceFile {
    std::string path;
    std::string name;  // relative to the input folder, '/' between its parts: the same on every machine
    int64_t bytes = 0;
};

// "h,cpp,none" -> {"h", "cpp", ""}; "none" stands for files without an extension, case does not matter.
std::set<std::string> parse_extensions(const std::string& list);

// Extensions of text and source code, and none at all (README, Makefile, the headers of the C++ library).
extern const char* const kTextExtensions;

// The files of the inputs, input by input, each folder's in byte order of their names. A folder is searched recursively
// through symbolic links, for the given extensions (before a .gz or .zst), without hidden files and folders; a file named as
// an input is taken whatever its extension. A file that is reached twice is taken once. Throws Error when an input does not exist.
// `left_out`, if given, is raised by the number of files of other extensions.
std::vector<SourceFile> find_source_files(const std::vector<std::string>& inputs, const std::set<std::string>& extensions, int64_t* left_out = nullptr);

// A NUL byte in the first 4 KiB: no text file has one (UTF-16 has; it would have to be converted first).
bool is_binary(std::string_view bytes);

// Places where `text` can be cut so that encoding both sides alone gives the ids of the whole: before ASCII white space
// that follows a character that is not white space. The first one at or after `from`, text.size() when there is none;
// next_line_cut: before a newline only.
size_t next_cut(std::string_view text, size_t from);
size_t next_line_cut(std::string_view text, size_t from);

// Where a document stands between training and validation, in [0, 1): a hash of its name. Below the validation fraction it
// is a validation document, and so stays on its side when others come or go.
double split_position(std::string_view name);

enum class FileKind : uint8_t { text, empty, binary, duplicate };

// What each file is; a duplicate holds the same bytes as an earlier one. Reads the first 4 KiB of each (unpacked), and files
// of equal size once more.
std::vector<FileKind> classify(std::span<const SourceFile> files, int threads);
