#include "trainer/run/fingerprint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "data/hash.h"
#include "data/parallel_for.h"
#include "data/reason.h"
#include "kernels/common/check.h"

namespace fs = std::filesystem;

namespace {

constexpr uint64_t kBlock = 4096, kPiece = uint64_t(4) << 20;
constexpr uint64_t kBlocksOfAFile = 64, kBlocks = 4096;  // of all files: on a disk over a network each takes a millisecond
constexpr int kThreads = 4;  // other ranks of the machine do the same

class OpenFile {
  public:
    explicit OpenFile(const std::string& path) : path_(path), file_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        REQUIRE(file_ >= 0, "%s: cannot open: %s", path.c_str(), reason(errno).c_str());
    }
    ~OpenFile() { close(file_); }
    OpenFile(const OpenFile&) = delete;
    OpenFile& operator=(const OpenFile&) = delete;

    uint64_t hash(uint64_t offset, uint64_t bytes) const {
        std::string text(bytes, '\0');
        for (uint64_t filled = 0; filled < bytes;) {
            const ssize_t got = pread(file_, text.data() + filled, bytes - filled, off_t(offset + filled));
            if (got < 0 && errno == EINTR) continue;
            REQUIRE(got > 0, "%s: cannot be read: %s", path_.c_str(), got < 0 ? reason(errno).c_str() : "it has become shorter");
            filled += uint64_t(got);
        }
        return hash_bytes(text);
    }

  private:
    const std::string path_;
    const int file_;
};

struct Part {
    uint64_t offset, bytes;
};

std::vector<Part> whole(uint64_t size) {
    std::vector<Part> parts;
    for (uint64_t offset = 0; offset < size; offset += kPiece) parts.push_back({offset, std::min(kPiece, size - offset)});
    return parts;
}

// The same places of files of one size: what they are drawn from is nothing else.
std::vector<Part> sample(uint64_t size, uint64_t blocks) {
    if (size <= kBlock) return whole(size);
    std::vector<Part> parts = {{0, kBlock}, {size - kBlock, kBlock}};
    for (uint64_t i = 0; i < blocks; ++i) parts.push_back({size / blocks * i + mix64(size + i) % std::max<uint64_t>(1, size / blocks), kBlock});
    for (Part& part : parts) part.offset = std::min(part.offset, size - kBlock);
    return parts;
}

uint64_t hash_file(const std::string& path, const std::vector<Part>& parts) {
    const OpenFile file(path);
    std::vector<uint64_t> hashes(parts.size());
    parallel_for(parts.size(), kThreads, [&](size_t i, int) { hashes[i] = file.hash(parts[i].offset, parts[i].bytes); });
    return hash_bytes({reinterpret_cast<const char*>(hashes.data()), hashes.size() * sizeof(uint64_t)});
}

uint64_t size_of(const std::string& path) {
    std::error_code error;
    const uint64_t size = fs::file_size(path, error);
    REQUIRE(!error, "%s: cannot open: %s", path.c_str(), reason(error.value()).c_str());
    return size;
}

}  // namespace

uint64_t total_bytes(const std::vector<std::string>& files) {
    uint64_t bytes = 0;
    for (const std::string& path : files) bytes += size_of(path);
    return bytes;
}

uint64_t fingerprint(const std::vector<std::string>& files, uint64_t whole_up_to) {
    const bool every_byte = total_bytes(files) <= whole_up_to;
    const uint64_t blocks = std::clamp<uint64_t>(kBlocks / std::max<size_t>(1, files.size()), 1, kBlocksOfAFile);
    std::string all;
    for (const std::string& path : files) {
        const uint64_t size = size_of(path);
        all += message("%s %llu %016llx\n", fs::path(path).filename().c_str(), static_cast<unsigned long long>(size),
                       static_cast<unsigned long long>(hash_file(path, every_byte ? whole(size) : sample(size, blocks))));
    }
    return hash_bytes(all);
}
