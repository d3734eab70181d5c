// The safetensors format: 8 bytes length of header, JSON header, tensors back to back. Little-endian, row-major.
// https://huggingface.co/docs/safetensors (format section)
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

struct TensorEntry {
    std::string name;
    std::string dtype;           // as in the file: "F32", "BF16", ...
    std::vector<int64_t> shape;  // empty: a scalar
    uint64_t begin, end;         // bytes, from the start of the data

    int64_t count() const;
};
std::string format_shape(std::span<const int64_t> shape);  // (768, 2304)

// A mapped file. The constructor validates every length and offset, so that reading can't leave the file; tensors must
// cover the data without gap or overlap, as the format demands.
class SafetensorsReader {
  public:
    explicit SafetensorsReader(std::string path);
    ~SafetensorsReader();
    SafetensorsReader(const SafetensorsReader&) = delete;
    SafetensorsReader& operator=(const SafetensorsReader&) = delete;

    const std::string& path() const { return path_; }
    const std::vector<TensorEntry>& tensors() const { return tensors_; }  // in the order of their data
    const TensorEntry* find(const std::string& name) const;               // nullptr if there is none
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

    std::span<const std::byte> bytes(const TensorEntry& tensor) const;
    // The JSON text with its length in front, as in the file.
    std::string_view header() const { return {reinterpret_cast<const char*>(map_), data_offset_}; }
    void read(const TensorEntry& tensor, float* out) const;  // F32 or BF16, else Error; all of count() elements

  private:
    void parse_header();

    std::string path_;
    const std::byte* map_ = nullptr;
    size_t size_ = 0, data_offset_ = 0;
    std::vector<TensorEntry> tensors_;
    std::map<std::string, std::string> metadata_;
};

// Writes F32 tensors to PATH.tmp: the header from the list, then elements in any order and from any thread, each exactly
// once, so that no second copy of a model is needed. publish() syncs and renames to PATH; a writer that is destroyed before
// that leaves nothing behind.
class SafetensorsWriter {
  public:
    using Shape = std::vector<int64_t>;
    // Several processes may write one file: one begins it, then all (it too) join it, and each ends its part.
    enum class Share : uint8_t { alone, begin, join };
    SafetensorsWriter(std::string path, const std::vector<std::pair<std::string, Shape>>& tensors, Share share = Share::alone);
    ~SafetensorsWriter();
    SafetensorsWriter(const SafetensorsWriter&) = delete;
    SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

    // Elements [first, first + values.size()) of a tensor of the list.
    void write(const std::string& name, int64_t first, std::span<const float> values);
    void append(const std::string& name, std::span<const float> values);  // the next one of the list, whole
    void publish();
    // Of a shared file: syncs, and returns the elements written here. PATH.tmp is renamed by whoever knows that all have.
    int64_t end_part();
    uint64_t file_bytes() const { return file_bytes_; }
    // Of each tensor of the list, over what was written here (trainer/checksum.h).
    std::vector<uint64_t> checksums() const;

  private:
    struct Place {
        int64_t count;
        uint64_t offset;  // in the file
        size_t number;    // in the list
    };
    void write_at(uint64_t offset, const void* data, size_t bytes);
    std::string temporary() const { return path_ + ".tmp"; }
    void sync_and_close();

    std::string path_;
    Share share_;
    std::vector<std::string> names_;
    std::map<std::string, Place> places_;
    size_t next_ = 0;
    int64_t elements_ = 0;
    std::atomic<int64_t> written_ = 0;
    std::vector<std::atomic<uint64_t>> checksums_;
    uint64_t file_bytes_ = 0;
    int file_ = -1;
    bool published_ = false;
};
