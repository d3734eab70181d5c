#include "data/corpus.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <sstream>

#include "data/byte_source.h"
#include "data/hash.h"
#include "data/parallel_for.h"
#include "data/reason.h"
#include "kernels/common/check.h"

namespace fs = std::filesystem;

const char* const kTextExtensions =
    "none,txt,text,jsonl,ndjson,md,rst,tex,adoc,org,c,h,cc,hh,cpp,hpp,cxx,hxx,inl,ipp,tpp,cu,cuh,py,pyi,rs,go,java,kt,scala,swift,js,"
    "mjs,jsx,ts,tsx,rb,php,pl,pm,lua,jl,r,m,mm,cs,fs,hs,ml,mli,el,lisp,scm,clj,erl,ex,exs,dart,zig,nim,v,sv,vhd,f90,"
    "asm,s,ptx,sh,bash,sql,proto,cmake,mk,yaml,yml,toml,ini,cfg";

namespace {

std::string lower_case(std::string text) {
    for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return text;
}

bool is_ascii_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Unicode's White_Space beyond ASCII, in UTF-8.
bool ends_in_space(std::string_view text) {
    using namespace std::string_view_literals;
    if (static_cast<uint8_t>(text.back()) < 0x80) return is_ascii_space(text.back());
    for (const auto space : {"\xc2\x85"sv, "\xc2\xa0"sv, "\xe1\x9a\x80"sv, "\xe2\x80\xa8"sv, "\xe2\x80\xa9"sv, "\xe2\x80\xaf"sv,
                             "\xe2\x81\x9f"sv, "\xe3\x80\x80"sv})
        if (text.ends_with(space)) return true;
    // U+2000 to U+200A
    return text.size() >= 3 && text.substr(text.size() - 3).starts_with("\xe2\x80") && static_cast<uint8_t>(text.back()) <= 0x8a;
}

FileKind kind_alone(const std::string& path) {
    char bytes[4096];
    const std::string_view start(bytes, open_text_source(path)->read(bytes, sizeof(bytes)));
    return start.empty() ? FileKind::empty : is_binary(start) ? FileKind::binary : FileKind::text;
}

uint64_t hash_file(const std::string& path) {
    std::vector<char> chunk(size_t{1} << 16);
    const auto file = open_file(path);
    uint64_t hash = 0;
    while (const size_t bytes = file->read(chunk.data(), chunk.size())) hash = mix64(hash ^ hash_bytes({chunk.data(), bytes}));
    return hash;
}

// Collects the files of one input folder.
class FolderSearch {
  public:
    FolderSearch(fs::path root, const std::set<std::string>& extensions) : root_(std::move(root)), extensions_(extensions) {}

    std::vector<SourceFile> run() {
        visit(root_);
        std::sort(files_.begin(), files_.end(), [](const SourceFile& a, const SourceFile& b) { return a.name < b.name; });
        return std::move(files_);
    }
    int64_t left_out() const { return left_out_; }

  private:
    // `open_` holds the real paths of the folders from the root to here: a link back to one of them is a cycle.
    void visit(const fs::path& folder) {
        const auto [place, fresh] = open_.insert(fs::canonical(folder).string());
        if (!fresh) return;
        std::error_code error;
        const fs::directory_iterator entries(folder, error);
        REQUIRE(!error, "%s: cannot list this folder: %s", folder.c_str(), reason(error.value()).c_str());
        for (const auto& entry : entries) {
            if (entry.path().filename().string().starts_with('.')) continue;
            std::error_code broken_link;  // a link to nothing is not a document, and no reason to stop
            const fs::file_status status = entry.status(broken_link);
            if (fs::is_directory(status)) visit(entry.path());
            if (fs::is_regular_file(status)) take(entry);
        }
        open_.erase(place);
    }

    void take(const fs::directory_entry& entry) {
        const std::string unpacked(without_compression_suffix(lower_case(entry.path().filename().string())));
        std::string extension = fs::path(unpacked).extension().string();
        if (extension.starts_with('.')) extension.erase(0, 1);
        if (!extensions_.contains(extension)) {
            ++left_out_;
            return;
        }
        files_.push_back({entry.path().string(), entry.path().lexically_relative(root_).generic_string(),
                          static_cast<int64_t>(entry.file_size())});
    }

    fs::path root_;
    const std::set<std::string>& extensions_;
    std::set<std::string> open_;
    std::vector<SourceFile> files_;
    int64_t left_out_ = 0;
};

}  // namespace

std::set<std::string> parse_extensions(const std::string& list) {
    std::set<std::string> extensions;
    std::istringstream stream(lower_case(list));
    for (std::string one; std::getline(stream, one, ',');) {
        const std::string extension = one.starts_with('.') ? one.substr(1) : one;
        REQUIRE(!extension.empty() && extension.find_first_of("./*?[] \t") == std::string::npos,
                "--extensions \"%s\": \"%s\" is no extension: must be what follows the last dot of a name, such as md, separated by commas, "
                "\"none\" for files without one; there are no patterns",
                list.c_str(), one.c_str());
        extensions.insert(extension == "none" ? "" : extension);
    }
    REQUIRE(!extensions.empty(), "--extensions: is empty, must be extensions separated by commas, \"none\" for files without one");
    return extensions;
}

std::vector<SourceFile> find_source_files(const std::vector<std::string>& inputs, const std::set<std::string>& extensions, int64_t* left_out) {
    std::vector<SourceFile> files;
    std::set<std::string> taken;
    const auto add = [&](SourceFile file) {
        if (taken.insert(fs::canonical(file.path).string()).second) files.push_back(std::move(file));
    };
    for (const std::string& input : inputs) {
        std::error_code error;
        const fs::file_status status = fs::status(input, error);
        REQUIRE(status.type() != fs::file_type::not_found, "%s: no such file or folder", input.c_str());
        REQUIRE(!error, "%s: cannot open: %s", input.c_str(), reason(error.value()).c_str());
        if (fs::is_directory(status)) {
            FolderSearch search(input, extensions);
            for (SourceFile& file : search.run()) add(std::move(file));
            if (left_out) *left_out += search.left_out();
        } else {
            REQUIRE(fs::is_regular_file(status), "%s: is neither a file nor a folder", input.c_str());
            add({input, fs::path(input).filename().string(), static_cast<int64_t>(fs::file_size(input))});
        }
    }
    return files;
}

bool is_binary(std::string_view bytes) { return bytes.substr(0, 4096).find('\0') != std::string_view::npos; }

// Exact for GPT-2's pattern: no piece goes from a visible character on to white space, none looks back, and the left side
// does not end in white space, so "white space up to the end" cannot match there. What is not UTF-8 becomes U+FFFD, which
// is visible, on either side alone as in the whole: an ASCII byte ends every broken sequence.
size_t next_cut(std::string_view text, size_t from) {
    for (size_t at = std::max<size_t>(from, 1); at < text.size(); ++at)
        if (is_ascii_space(text[at]) && !ends_in_space(text.substr(0, at))) return at;
    return text.size();
}

size_t next_line_cut(std::string_view text, size_t from) {
    for (size_t at = text.find('\n', std::max<size_t>(from, 1)); at < text.size(); at = text.find('\n', at + 1))
        if (!ends_in_space(text.substr(0, at))) return at;
    return text.size();
}

double split_position(std::string_view name) { return static_cast<double>(hash_bytes(name) >> 11) * 0x1p-53; }

std::vector<FileKind> classify(std::span<const SourceFile> files, int threads) {
    std::map<int64_t, int> of_size;
    for (const SourceFile& file : files) ++of_size[file.bytes];
    std::vector<FileKind> kinds(files.size());
    std::vector<uint64_t> hashes(files.size());
    parallel_for(files.size(), threads, [&](size_t i, int) {
        kinds[i] = kind_alone(files[i].path);
        if (kinds[i] == FileKind::text && of_size.at(files[i].bytes) > 1) hashes[i] = hash_file(files[i].path);
    });
    std::set<std::pair<int64_t, uint64_t>> contents;
    for (size_t i = 0; i < files.size(); ++i)
        if (kinds[i] == FileKind::text && !contents.emplace(files[i].bytes, hashes[i]).second) kinds[i] = FileKind::duplicate;
    return kinds;
}
