#include "trainer/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "kernels/common/check.h"
#include "trainer/checksum.h"

namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;  // writes in the order of insertion, but searches linearly
constexpr uint64_t kHeaderLimit = 100'000'000;  // the format's own limit

// Bits of an element; 0 for a type that this program doesn't know, whose size can't be checked.
int dtype_bits(const std::string& dtype) {
    static const std::pair<const char*, int> kTable[] = {
        {"F64", 64}, {"F32", 32}, {"F16", 16}, {"BF16", 16}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"I64", 64}, {"I32", 32},
        {"I16", 16}, {"I8", 8},   {"U64", 64}, {"U32", 32},  {"U16", 16},    {"U8", 8},      {"BOOL", 8}, {"F8_E8M0", 8},
    };
    for (const auto& [name, bits] : kTable)
        if (dtype == name) return bits;
    return 0;
}

struct Place {  // for messages
    const char* path;
    const char* tensor;
};

std::vector<int64_t> parse_shape(const Json& entry, Place at) {
    const auto shape = entry.find("shape");
    REQUIRE(shape != entry.end() && shape->is_array(), "%s: tensor %s: has no shape", at.path, at.tensor);
    std::vector<int64_t> sizes;
    int64_t count = 1;
    for (const Json& size : *shape) {
        REQUIRE(size.is_number_unsigned() && size.get<uint64_t>() <= INT64_MAX,
                "%s: tensor %s: size %s must be a whole number below 2^63", at.path, at.tensor, size.dump().c_str());
        sizes.push_back(size.get<int64_t>());
        // Elements times 64 bits must fit too.
        REQUIRE(!__builtin_mul_overflow(count, sizes.back(), &count) && count <= INT64_MAX / 64,
                "%s: tensor %s: shape %s holds too many elements", at.path, at.tensor, format_shape(sizes).c_str());
    }
    return sizes;
}

TensorEntry parse_entry(const std::string& name, const Json& entry, const std::string& path, uint64_t data_bytes) {
    const Place at{path.c_str(), name.c_str()};
    REQUIRE(entry.is_object(), "%s: tensor %s: is no JSON object", at.path, at.tensor);
    const auto dtype = entry.find("dtype"), offsets = entry.find("data_offsets");
    REQUIRE(dtype != entry.end() && dtype->is_string(), "%s: tensor %s: has no dtype", at.path, at.tensor);
    REQUIRE(offsets != entry.end() && offsets->is_array() && offsets->size() == 2 && (*offsets)[0].is_number_unsigned() &&
                (*offsets)[1].is_number_unsigned(),
            "%s: tensor %s: has no data_offsets [begin, end]", at.path, at.tensor);
    const TensorEntry tensor{.name = name, .dtype = dtype->get<std::string>(), .shape = parse_shape(entry, at),
                             .begin = (*offsets)[0].get<uint64_t>(), .end = (*offsets)[1].get<uint64_t>()};
    const unsigned long long begin = tensor.begin, end = tensor.end;
    REQUIRE(begin <= end && end <= data_bytes, "%s: tensor %s: bytes %llu to %llu, but the file has %llu bytes of data: it is "
            "damaged or truncated", at.path, at.tensor, begin, end, static_cast<unsigned long long>(data_bytes));
    const int bits = dtype_bits(tensor.dtype);
    REQUIRE(bits == 0 || (end - begin) * 8 == static_cast<uint64_t>(tensor.count()) * bits,
            "%s: tensor %s: %llu bytes, but shape %s of %s needs %llu", at.path, at.tensor, end - begin,
            format_shape(tensor.shape).c_str(), tensor.dtype.c_str(), static_cast<unsigned long long>(tensor.count()) * bits / 8);
    return tensor;
}

}  // namespace

int64_t TensorEntry::count() const {
    int64_t n = 1;
    for (const int64_t size : shape) n *= size;
    return n;
}

std::string format_shape(std::span<const int64_t> shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + ")";
}

// ---------------------------------------------------------------------------------------------------------------------
// Reader

SafetensorsReader::SafetensorsReader(std::string path) : path_(std::move(path)) {
    // O_NONBLOCK: opening a pipe must not wait for its other end before it can be refused.
    const int file = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    REQUIRE(file >= 0, "%s: cannot open: %s", path_.c_str(), std::strerror(errno));
    struct stat status {};
    const bool regular = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    size_ = regular ? static_cast<size_t>(status.st_size) : 0;
    void* mapping = size_ > 0 ? mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0) : nullptr;
    const int mapping_error = errno;
    close(file);
    REQUIRE(regular, "%s: is not a regular file", path_.c_str());
    REQUIRE(mapping != MAP_FAILED, "%s: cannot map %zu bytes: %s", path_.c_str(), size_, std::strerror(mapping_error));
    map_ = static_cast<const std::byte*>(mapping);
    try {
        parse_header();
    } catch (...) {  // no destructor runs for a half-made object
        if (map_) munmap(mapping, size_);
        throw;
    }
}

SafetensorsReader::~SafetensorsReader() {
    if (map_) munmap(const_cast<std::byte*>(map_), size_);
}

void SafetensorsReader::parse_header() {
    uint64_t header_bytes = 0;
    REQUIRE(size_ >= sizeof(header_bytes), "%s: %zu bytes, not a safetensors file", path_.c_str(), size_);
    std::memcpy(&header_bytes, map_, sizeof(header_bytes));
    REQUIRE(header_bytes <= kHeaderLimit && header_bytes <= size_ - sizeof(header_bytes),
            "%s: header of %llu bytes in a file of %zu: not a safetensors file, or truncated", path_.c_str(),
            static_cast<unsigned long long>(header_bytes), size_);
    data_offset_ = sizeof(header_bytes) + header_bytes;
    const char* text = reinterpret_cast<const char*>(map_) + sizeof(header_bytes);
    const Json header = Json::parse(text, text + header_bytes, nullptr, false);
    REQUIRE(header.is_object(), "%s: the header is no JSON object: not a safetensors file, or damaged", path_.c_str());
    for (const auto& [name, entry] : header.items()) {
        if (name != "__metadata__") {
            tensors_.push_back(parse_entry(name, entry, path_, size_ - data_offset_));
            continue;
        }
        REQUIRE(entry.is_object(), "%s: __metadata__ is no JSON object", path_.c_str());
        for (const auto& [key, value] : entry.items()) {
            REQUIRE(value.is_string(), "%s: __metadata__ %s: must be a string", path_.c_str(), key.c_str());
            metadata_[key] = value.get<std::string>();
        }
    }
    std::stable_sort(tensors_.begin(), tensors_.end(), [](const TensorEntry& a, const TensorEntry& b) {
        return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    uint64_t covered = 0;
    for (const TensorEntry& tensor : tensors_) {
        REQUIRE(tensor.begin == covered, "%s: tensor %s: begins at byte %llu, must begin at %llu, where the one before it ends",
                path_.c_str(), tensor.name.c_str(), static_cast<unsigned long long>(tensor.begin),
                static_cast<unsigned long long>(covered));
        covered = tensor.end;
    }
    REQUIRE(covered == size_ - data_offset_, "%s: %zu bytes of data, but the tensors cover %llu", path_.c_str(),
            size_ - data_offset_, static_cast<unsigned long long>(covered));
}

const TensorEntry* SafetensorsReader::find(const std::string& name) const {
    const auto at = std::find_if(tensors_.begin(), tensors_.end(), [&](const TensorEntry& t) { return t.name == name; });
    return at == tensors_.end() ? nullptr : &*at;
}

std::span<const std::byte> SafetensorsReader::bytes(const TensorEntry& tensor) const {
    return {map_ + data_offset_ + tensor.begin, static_cast<size_t>(tensor.end - tensor.begin)};
}

void SafetensorsReader::read(const TensorEntry& tensor, float* out) const {
    const std::byte* from = bytes(tensor).data();
    const int64_t n = tensor.count();
    if (tensor.dtype == "F32") {
        if (n > 0) std::memcpy(out, from, size_t(n) * sizeof(float));
        return;
    }
    REQUIRE(tensor.dtype == "BF16", "%s: tensor %s: is of type %s, must be F32 or BF16", path_.c_str(), tensor.name.c_str(),
            tensor.dtype.c_str());
    for (int64_t i = 0; i < n; ++i) {
        uint16_t upper_half;  // of the same number as a float
        std::memcpy(&upper_half, from + 2 * i, sizeof(upper_half));
        const uint32_t bits = uint32_t(upper_half) << 16;
        std::memcpy(out + i, &bits, sizeof(bits));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Writer

SafetensorsWriter::SafetensorsWriter(std::string path, const std::vector<std::pair<std::string, Shape>>& tensors, Share share)
    : path_(std::move(path)), share_(share), checksums_(tensors.size()) {
    OrderedJson header;
    header["__metadata__"]["format"] = "pt";  // transformers refuses files that don't say it
    for (const auto& [name, shape] : tensors) {
        int64_t count = 1;
        for (const int64_t size : shape) count *= size;
        const uint64_t begin = uint64_t(elements_) * sizeof(float), end = begin + uint64_t(count) * sizeof(float);
        REQUIRE(places_.emplace(name, Place{count, begin, names_.size()}).second, "%s: tensor %s: is listed twice", path_.c_str(), name.c_str());
        header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, end}}};
        names_.push_back(name);
        elements_ += count;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // data aligned to 8 bytes
    const uint64_t header_bytes = text.size();
    const uint64_t data_offset = sizeof(header_bytes) + header_bytes;
    for (auto& [name, place] : places_) place.offset += data_offset;
    file_bytes_ = data_offset + uint64_t(elements_) * sizeof(float);
    file_ = open(temporary().c_str(), O_WRONLY | O_CLOEXEC | (share == Share::join ? 0 : O_CREAT | O_TRUNC), 0666);
    REQUIRE(file_ >= 0, "%s: cannot create: %s", temporary().c_str(), std::strerror(errno));
    if (share == Share::join) return;
    try {
        write_at(0, &header_bytes, sizeof(header_bytes));
        write_at(sizeof(header_bytes), text.data(), text.size());
    } catch (...) {  // no destructor runs for a half-made object
        close(file_);
        unlink(temporary().c_str());
        throw;
    }
}

SafetensorsWriter::~SafetensorsWriter() {
    if (file_ >= 0) close(file_);
    if (!published_ && share_ == Share::alone) unlink(temporary().c_str());
}

void SafetensorsWriter::write_at(uint64_t offset, const void* data, size_t bytes) {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
        const ssize_t written = pwrite(file_, from, bytes, off_t(offset));
        if (written < 0 && errno == EINTR) continue;
        REQUIRE(written > 0, "%s: cannot write: %s", temporary().c_str(), std::strerror(written < 0 ? errno : ENOSPC));
        from += written, bytes -= size_t(written), offset += uint64_t(written);
    }
}

void SafetensorsWriter::write(const std::string& name, int64_t first, std::span<const float> values) {
    const auto found = places_.find(name);
    REQUIRE(found != places_.end(), "%s: tensor %s: is not of the list", path_.c_str(), name.c_str());
    const Place& place = found->second;
    REQUIRE(first >= 0 && first <= place.count && values.size() <= size_t(place.count - first),
            "%s: tensor %s: elements %lld to %lld of %lld", path_.c_str(), name.c_str(), (long long)first,
            (long long)first + (long long)values.size(), (long long)place.count);
    write_at(place.offset + uint64_t(first) * sizeof(float), values.data(), values.size_bytes());
    written_ += int64_t(values.size());
    checksums_[place.number] += checksum(values, first);
}

void SafetensorsWriter::append(const std::string& name, std::span<const float> values) {
    REQUIRE(next_ < names_.size(), "%s: tensor %s: all %zu listed tensors are written", path_.c_str(), name.c_str(), names_.size());
    const std::string& expected = names_[next_];
    const int64_t count = places_.at(expected).count;
    REQUIRE(name == expected && values.size() == size_t(count), "%s: tensor %s of %zu elements, must be %s of %lld",
            path_.c_str(), name.c_str(), values.size(), expected.c_str(), (long long)count);
    write(name, 0, values);
    ++next_;
}

void SafetensorsWriter::sync_and_close() {
    REQUIRE(fsync(file_) == 0, "%s: cannot write: %s", temporary().c_str(), std::strerror(errno));
    const int status = close(std::exchange(file_, -1));
    REQUIRE(status == 0, "%s: cannot write: %s", temporary().c_str(), std::strerror(errno));
}

std::vector<uint64_t> SafetensorsWriter::checksums() const { return {checksums_.begin(), checksums_.end()}; }

int64_t SafetensorsWriter::end_part() {
    sync_and_close();
    return written_;
}

void SafetensorsWriter::publish() {
    REQUIRE(written_ == elements_, "%s: %lld of %lld elements are written", path_.c_str(), (long long)written_, (long long)elements_);
    sync_and_close();
    REQUIRE(std::rename(temporary().c_str(), path_.c_str()) == 0, "%s: cannot rename to %s: %s", temporary().c_str(),
            path_.c_str(), std::strerror(errno));
    published_ = true;
}
