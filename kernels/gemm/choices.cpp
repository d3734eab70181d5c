#include "kernels/gemm/choices.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <type_traits>

#include "kernels/common/check.h"

namespace gemm_choices {
namespace {

std::string hex_checksum(const std::string& text) {  // FNV-1a, 64 bits
    uint64_t h = 0xcbf29ce484222325u;
    for (const unsigned char c : text) h = (h ^ c) * 0x100000001b3u;
    return message("%016llx", static_cast<unsigned long long>(h));
}

// A line that line_of() did not write gives nothing: writing again what was read must give the same text.
std::optional<std::pair<std::string, Entry>> parse(const std::string& line) {
    std::array<std::string, 7> fields;
    size_t from = 0;
    for (size_t i = 0; i < fields.size(); i++) {
        const size_t tab = std::min(line.find('\t', from), line.size());
        fields[i] = line.substr(from, tab - from);
        from = std::min(tab + 1, line.size());
    }
    Entry entry{std::atoi(fields[3].c_str()), std::atoi(fields[4].c_str()), {}};
    constexpr size_t kWords = std::extent_v<decltype(entry.algorithm.data)>;
    if (fields[5].size() != 16 * kWords) return std::nullopt;
    for (size_t i = 0; i < kWords; i++)
        entry.algorithm.data[i] = std::strtoull(fields[5].substr(16 * i, 16).c_str(), nullptr, 16);
    const std::string name = fields[0] + '\t' + fields[1] + '\t' + fields[2];
    if (line_of(name, entry) != line) return std::nullopt;
    return std::make_pair(name, entry);
}

bool write_lines(const std::string& path, const Table& table) {
    std::FILE* file = std::fopen(path.c_str(), "w");
    if (!file) return false;
    bool written = true;
    for (const auto& [name, entry] : table) written &= std::fprintf(file, "%s\n", line_of(name, entry).c_str()) > 0;
    return (std::fclose(file) == 0) && written;
}

}  // namespace

std::string line_of(const std::string& name, const Entry& entry) {
    std::string line = message("%s\t%d\t%d\t", name.c_str(), entry.index, entry.candidates);
    for (const uint64_t word : entry.algorithm.data) line += message("%016llx", static_cast<unsigned long long>(word));
    return line + '\t' + hex_checksum(line);
}

Read read(std::istream& lines) {
    Read result;
    for (std::string line; std::getline(lines, line);) {
        const auto entry = parse(line);
        if (entry) result.table.insert(*entry);
        else result.damaged++;
    }
    return result;
}

bool write(const std::string& path, const Table& table) {
    std::error_code ignored;  // if there is no folder, opening the file says why
    const std::filesystem::path folder = std::filesystem::path(path).parent_path();
    if (!folder.empty()) std::filesystem::create_directories(folder, ignored);
    const std::string temporary = message("%s.%d.tmp", path.c_str(), int(getpid()));
    if (write_lines(temporary, table) && std::rename(temporary.c_str(), path.c_str()) == 0) return true;
    const int reason = errno;
    std::remove(temporary.c_str());
    errno = reason;
    return false;
}

}  // namespace gemm_choices
