#include "data/byte_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "data/reason.h"
#include "kernels/common/check.h"

namespace {

constexpr size_t kInputBytes = size_t{1} << 17;
constexpr std::string_view kGzipMagic = "\x1f\x8b", kZstdMagic = "\x28\xb5\x2f\xfd";

class FileSource final : public ByteSource {
  public:
    explicit FileSource(const std::string& path) : path_(path) {
        // O_NONBLOCK: opening a pipe must not wait for its other end before it can be refused.
        file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        REQUIRE(file_ >= 0, "%s: cannot open: %s", path.c_str(), reason(errno).c_str());
        struct stat status {};
        const bool regular = fstat(file_, &status) == 0 && S_ISREG(status.st_mode);
        if (!regular) close(file_);  // no destructor runs for a half-made object
        REQUIRE(regular, "%s: is not a regular file", path.c_str());
    }
    FileSource(const FileSource&) = delete;
    FileSource& operator=(const FileSource&) = delete;
    ~FileSource() override { close(file_); }

    size_t read(char* to, size_t bytes) override {
        size_t done = 0;
        while (done < bytes) {
            const ssize_t now = ::read(file_, to + done, bytes - done);
            if (now < 0 && errno == EINTR) continue;
            REQUIRE(now >= 0, "%s: cannot read: %s", path_.c_str(), reason(errno).c_str());
            if (now == 0) break;
            done += static_cast<size_t>(now);
        }
        consumed_ += static_cast<int64_t>(done);
        return done;
    }
    int64_t bytes_consumed() const override { return consumed_; }

  private:
    std::string path_;
    int file_ = -1;
    int64_t consumed_ = 0;
};

// The compressed bytes of a file, a buffer at a time.
class PackedInput {
  public:
    explicit PackedInput(const std::string& path) : path_(path), file_(path), buffer_(kInputBytes) {}

    // What is in the buffer and not used yet; more of the file when that is nothing. Empty: the end.
    std::string_view rest() {
        if (begin_ == end_) begin_ = 0, end_ = file_.read(buffer_.data(), buffer_.size());
        return {buffer_.data() + begin_, end_ - begin_};
    }
    void use(size_t bytes) { begin_ += bytes; }
    int64_t bytes_consumed() const { return file_.bytes_consumed() - static_cast<int64_t>(end_ - begin_); }
    const char* path() const { return path_.c_str(); }

  private:
    std::string path_;
    FileSource file_;
    std::vector<char> buffer_;
    size_t begin_ = 0, end_ = 0;
};

// Any number of members one after the other (RFC 1952); zero bytes may follow, as tape archives have them.
class GzipSource final : public ByteSource {
  public:
    explicit GzipSource(const std::string& path) : input_(path) {
        constexpr int kGzipOnly = 15 + 16;
        REQUIRE(inflateInit2(&stream_, kGzipOnly) == Z_OK, "%s: zlib cannot start", path.c_str());
    }
    GzipSource(const GzipSource&) = delete;
    GzipSource& operator=(const GzipSource&) = delete;
    ~GzipSource() override { inflateEnd(&stream_); }

    size_t read(char* to, size_t bytes) override {
        size_t done = 0;
        while (done < bytes && !finished_) done += inflate_some(to + done, bytes - done);
        return done;
    }
    int64_t bytes_consumed() const override { return input_.bytes_consumed(); }

  private:
    size_t inflate_some(char* to, size_t bytes) {
        const std::string_view packed = input_.rest();
        REQUIRE(!packed.empty(), "%s: the gzip file is cut short", input_.path());
        const auto room = static_cast<uInt>(std::min<size_t>(bytes, UINT32_MAX / 2));
        stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data()));
        stream_.avail_in = static_cast<uInt>(packed.size());
        stream_.next_out = reinterpret_cast<Bytef*>(to);
        stream_.avail_out = room;
        const int status = inflate(&stream_, Z_NO_FLUSH);
        REQUIRE(status == Z_OK || status == Z_STREAM_END || status == Z_BUF_ERROR, "%s: damaged gzip file near byte %lld: %s",
                input_.path(), static_cast<long long>(input_.bytes_consumed()), stream_.msg ? stream_.msg : zError(status));
        input_.use(packed.size() - stream_.avail_in);
        if (status == Z_STREAM_END) next_member();
        return room - stream_.avail_out;
    }

    void next_member() {
        bool zeros = false;
        for (std::string_view packed = input_.rest(); !packed.empty(); packed = input_.rest()) {
            if (packed[0] != '\0') {
                REQUIRE(!zeros, "%s: bytes behind the end of the gzip file, at byte %lld", input_.path(),
                        static_cast<long long>(input_.bytes_consumed()));
                inflateReset(&stream_);  // refuses what is no member
                return;
            }
            zeros = true;
            input_.use(1);
        }
        finished_ = true;
    }

    PackedInput input_;
    z_stream stream_{};
    bool finished_ = false;
};

// Any number of frames (RFC 8878). The library refuses windows above 128 MiB, so that memory stays bounded.
class ZstdSource final : public ByteSource {
  public:
    explicit ZstdSource(const std::string& path) : input_(path), stream_(ZSTD_createDStream(), ZSTD_freeDStream) {
        REQUIRE(stream_, "%s: zstd cannot start", path.c_str());
    }

    size_t read(char* to, size_t bytes) override {
        ZSTD_outBuffer output{to, bytes, 0};
        while (output.pos < output.size) {
            const std::string_view packed = input_.rest();
            if (packed.empty() && frame_complete_) break;
            ZSTD_inBuffer input{packed.data(), packed.size(), 0};
            const size_t before = output.pos;
            const size_t status = ZSTD_decompressStream(stream_.get(), &output, &input);
            REQUIRE(!ZSTD_isError(status), "%s: damaged zstd file near byte %lld: %s", input_.path(),
                    static_cast<long long>(input_.bytes_consumed()), ZSTD_getErrorName(status));
            REQUIRE(!packed.empty() || output.pos > before, "%s: the zstd file is cut short", input_.path());
            input_.use(input.pos);
            frame_complete_ = status == 0;
        }
        return output.pos;
    }
    int64_t bytes_consumed() const override { return input_.bytes_consumed(); }

  private:
    PackedInput input_;
    std::unique_ptr<ZSTD_DStream, size_t (*)(ZSTD_DStream*)> stream_;
    bool frame_complete_ = true;
};

std::string first_bytes(const std::string& path) {
    char bytes[4];
    return {bytes, FileSource(path).read(bytes, sizeof(bytes))};
}

}  // namespace

std::unique_ptr<ByteSource> open_file(const std::string& path) { return std::make_unique<FileSource>(path); }

std::unique_ptr<ByteSource> open_text_source(const std::string& path) {
    const std::string magic = first_bytes(path);
    if (magic.starts_with(kGzipMagic)) return std::make_unique<GzipSource>(path);
    if (magic.starts_with(kZstdMagic)) return std::make_unique<ZstdSource>(path);
    REQUIRE(magic.empty() || without_compression_suffix(path).size() == path.size(), "%s: is neither a gzip nor a zstd file",
            path.c_str());
    return open_file(path);
}

bool is_compressed(const std::string& path) {
    const std::string magic = first_bytes(path);
    return magic.starts_with(kGzipMagic) || magic.starts_with(kZstdMagic);
}

std::string_view without_compression_suffix(std::string_view name) {
    for (const std::string_view suffix : {".gz", ".zst"})
        if (name.size() > suffix.size() && name.ends_with(suffix)) return name.substr(0, name.size() - suffix.size());
    return name;
}
