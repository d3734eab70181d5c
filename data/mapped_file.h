// A file of any size, mapped read-only. Movable, not copyable; the mapping ends with the object.
//
// NOTES: a file that another program shortens while it is mapped ends this process with SIGBUS; writers here therefore
// never touch a published file, they rename a new one into place.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>

class MappedFile {
  public:
    MappedFile() = default;
    explicit MappedFile(const std::string& path);  // throws Error when it is no readable regular file
    ~MappedFile();
    MappedFile(MappedFile&& other) noexcept;
    MappedFile& operator=(MappedFile&& other) noexcept;

    std::string_view bytes() const { return {data_, size_}; }

  private:
    const char* data_ = nullptr;
    size_t size_ = 0;
};
