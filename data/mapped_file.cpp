#include "data/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "data/reason.h"
#include "kernels/common/check.h"

MappedFile::MappedFile(const std::string& path) {
    // O_NONBLOCK: opening a pipe must not wait for its other end before we can refuse it.
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    REQUIRE(file >= 0, "%s: cannot open: %s", path.c_str(), reason(errno).c_str());
    struct stat status {};
    const bool regular = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    size_ = regular ? static_cast<size_t>(status.st_size) : 0;
    // mmap refuses a length of zero; an empty file is an empty view.
    void* mapping = size_ > 0 ? mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0) : nullptr;
    const int mapping_error = errno;
    close(file);
    REQUIRE(regular, "%s: is not a regular file", path.c_str());
    REQUIRE(mapping != MAP_FAILED, "%s: cannot map %zu bytes: %s", path.c_str(), size_, std::strerror(mapping_error));
    data_ = static_cast<const char*>(mapping);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}
