// The parsers map files, and a read beyond a mapping's end within its last page is invisible to AddressSanitizer. The
// fuzz programs are linked with --wrap=mmap,--wrap=munmap, so that the parsers get heap blocks of exactly the file's
// size instead: one byte too far is then an error.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

extern "C" void* __wrap_mmap(void* /*place*/, size_t bytes, int /*protection*/, int /*flags*/, int file, off_t offset) {
    char* block = static_cast<char*>(std::malloc(bytes));
    if (block == nullptr) return MAP_FAILED;
    for (size_t done = 0; done < bytes;) {
        const ssize_t now = pread(file, block + done, bytes - done, offset + static_cast<off_t>(done));
        if (now <= 0) {
            std::perror("pread");
            std::abort();
        }
        done += static_cast<size_t>(now);
    }
    return block;
}

extern "C" int __wrap_munmap(void* block, size_t /*bytes*/) {
    std::free(block);
    return 0;
}
