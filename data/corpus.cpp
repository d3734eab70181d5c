#include "data/corpus.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <sstream>

#include "data/hash.h"
#include "kernels/common/check.h"

namespace fs = std::filesystem;

const char* const kTextExtensions =
    "none,txt,text,md,rst,tex,adoc,org,c,h,cc,hh,cpp,hpp,cxx,hxx,inl,ipp,tpp,cu,cuh,py,pyi,rs,go,java,kt,scala,swift,js,"
    "mjs,jsx,ts,tsx,rb,php,pl,pm,lua,jl,r,m,mm,cs,fs,hs,ml,mli,el,lisp,scm,clj,erl,ex,exs,dart,zig,nim,v,sv,vhd,f90,"
    "asm,s,ptx,sh,bash,sql,proto,cmake,mk,yaml,yml,toml,ini,cfg";

namespace {

std::string lower_case(std::string text) {
    for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return text;
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

  private:
    // `open_` holds the real paths of the folders from the root to here: a link back to one of them is a cycle.
    void visit(const fs::path& folder) {
        const auto [place, fresh] = open_.insert(fs::canonical(folder).string());
        if (!fresh) return;
        for (const auto& entry : fs::directory_iterator(folder)) {
            if (entry.path().filename().string().starts_with('.')) continue;
            std::error_code broken_link;  // a link to nothing is not a document, and no reason to stop
            const fs::file_status status = entry.status(broken_link);
            if (fs::is_directory(status)) visit(entry.path());
            if (fs::is_regular_file(status)) take(entry);
        }
        open_.erase(place);
    }

    void take(const fs::directory_entry& entry) {
        std::string extension = lower_case(entry.path().extension().string());
        if (extension.starts_with('.')) extension.erase(0, 1);
        if (!extensions_.contains(extension)) return;
        files_.push_back({entry.path().string(), entry.path().lexically_relative(root_).generic_string(),
                          static_cast<int64_t>(entry.file_size())});
    }

    fs::path root_;
    const std::set<std::string>& extensions_;
    std::set<std::string> open_;
    std::vector<SourceFile> files_;
};

}  // namespace

std::set<std::string> parse_extensions(const std::string& list) {
    std::set<std::string> extensions;
    std::istringstream stream(lower_case(list));
    for (std::string one; std::getline(stream, one, ',');) {
        if (one.starts_with('.')) one.erase(0, 1);
        REQUIRE(!one.empty() && one.find('/') == std::string::npos,
                "--extensions \"%s\": must be extensions separated by commas, \"none\" for files without one", list.c_str());
        extensions.insert(one == "none" ? "" : one);
    }
    return extensions;
}

std::vector<SourceFile> find_source_files(const std::vector<std::string>& inputs, const std::set<std::string>& extensions) {
    std::vector<SourceFile> files;
    std::set<std::string> taken;
    const auto add = [&](SourceFile file) {
        if (taken.insert(fs::canonical(file.path).string()).second) files.push_back(std::move(file));
    };
    for (const std::string& input : inputs) {
        REQUIRE(fs::exists(input), "%s: no such file or folder", input.c_str());
        if (fs::is_directory(input)) {
            for (SourceFile& file : FolderSearch(input, extensions).run()) add(std::move(file));
        } else {
            REQUIRE(fs::is_regular_file(input), "%s: is neither a file nor a folder", input.c_str());
            add({input, fs::path(input).filename().string(), static_cast<int64_t>(fs::file_size(input))});
        }
    }
    return files;
}

bool is_binary(std::string_view bytes) { return bytes.substr(0, 4096).find('\0') != std::string_view::npos; }

std::vector<std::string_view> split_documents(std::string_view text, std::string_view separator) {
    std::vector<std::string_view> documents;
    while (!text.empty()) {
        const std::string_view document = text.substr(0, separator.empty() ? text.size() : text.find(separator));
        if (!document.empty()) documents.push_back(document);
        text.remove_prefix(std::min(text.size(), document.size() + separator.size()));
    }
    return documents;
}

// Exact for GPT-2's pattern: no piece goes from a visible character on to a newline, none looks back, and the left side
// does not end in white space, so "white space up to the end" cannot match there.
size_t next_cut(std::string_view text, size_t from) {
    for (size_t at = text.find('\n', std::max<size_t>(from, 1)); at < text.size(); at = text.find('\n', at + 1))
        if (text[at - 1] > ' ' && text[at - 1] < 0x7f) return at;
    return text.size();
}

bool is_validation(std::string_view name, double fraction) {
    return static_cast<double>(hash_bytes(name) >> 11) * 0x1p-53 < fraction;
}
