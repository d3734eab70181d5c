// Text files and folders -> documents: which files belong to a corpus, in which order, and where a text may be cut.
#pragma once
#include <cstdint>
#include <set>
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
// through symbolic links, for the given extensions, without hidden files and folders; a file named as an input is taken
// whatever its extension. A file that is reached twice is taken once. Throws Error when an input does not exist.
std::vector<SourceFile> find_source_files(const std::vector<std::string>& inputs, const std::set<std::string>& extensions);

// A NUL byte in the first 4 KiB: no text file has one (UTF-16 has; it would have to be converted first).
bool is_binary(std::string_view bytes);

// The documents of a file: the whole of it, or with a separator the parts between its occurrences, without empty ones.
std::vector<std::string_view> split_documents(std::string_view text, std::string_view separator);

// The first place at or after `from` where `text` can be cut so that encoding both sides alone gives the ids of the
// whole: before a newline that follows a printable ASCII character. text.size() when there is none.
size_t next_cut(std::string_view text, size_t from);

// Whether a document belongs to the validation split: a hash of its name below the fraction. So a document stays on its
// side when others come or go.
bool is_validation(std::string_view name, double fraction);
