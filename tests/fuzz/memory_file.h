// A file that holds the fuzzer's bytes: in memory, with a path that the parsers can open.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

class MemoryFile {
  public:
    MemoryFile() : file_(memfd_create("fuzz", MFD_CLOEXEC)) {
        if (file_ < 0) fail("memfd_create");
    }
    MemoryFile(const MemoryFile&) = delete;
    MemoryFile& operator=(const MemoryFile&) = delete;
    ~MemoryFile() { close(file_); }

    // Replaces the contents; returns the path.
    const std::string& assign(std::string_view bytes) {
        if (ftruncate(file_, 0) != 0) fail("ftruncate");
        for (size_t done = 0; done < bytes.size();) {
            const ssize_t now = pwrite(file_, bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
            if (now <= 0) fail("pwrite");
            done += static_cast<size_t>(now);
        }
        return path_;
    }
    const std::string& assign(const uint8_t* data, size_t size) {
        return assign({reinterpret_cast<const char*>(data), size});
    }
    const std::string& path() const { return path_; }

  private:
    static void fail(const char* what) {
        std::perror(what);
        std::abort();
    }
    int file_;
    std::string path_ = "/proc/self/fd/" + std::to_string(file_);
};

// What must hold in every run, NDEBUG or not.
#define FUZZ_CHECK(condition)                                                            \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                \
        }                                                                                \
    } while (0)
