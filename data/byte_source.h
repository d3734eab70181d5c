// The bytes of a file as a stream; of a gzip or zstd file, its contents. Memory does not depend on the file's size.
//
// A file's first bytes decide what it is, so that a name cannot mislead. Whatever is damaged or cut short throws Error.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

class ByteSource {
  public:
    virtual ~ByteSource() = default;
    virtual size_t read(char* to, size_t bytes) = 0;  // fewer than `bytes` only at the end; 0 behind it
    virtual int64_t bytes_consumed() const = 0;       // of the file itself
};

std::unique_ptr<ByteSource> open_file(const std::string& path);        // the file's own bytes
std::unique_ptr<ByteSource> open_text_source(const std::string& path);  // unpacked
bool is_compressed(const std::string& path);                            // by its first bytes

// "a.txt.gz" -> "a.txt", and the same for ".zst".
std::string_view without_compression_suffix(std::string_view name);
