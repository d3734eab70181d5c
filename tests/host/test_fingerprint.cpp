#include "trainer/run/fingerprint.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "temp_folder.h"

namespace {

std::string write(const std::string& path, const std::string& text) {
    write_file(path, text);
    return path;
}

std::string bytes(size_t count) {
    std::string text(count, '\0');
    for (size_t i = 0; i < count; ++i) text[i] = char(i * 31 + i / 251);
    return text;
}

TEST(Fingerprint, WholeFilesMissNoByte) {
    const TempFolder folder;
    for (const size_t size : {size_t(1), size_t(4096), size_t(4097), size_t(9'000'001)}) {  // of several pieces
        const std::string text = bytes(size), file = write(folder / "a", text);
        const uint64_t good = fingerprint({file}, kReadWhole);
        for (const size_t at : {size_t(0), size / 3, size / 2, size - 1}) {
            std::string other = text;
            other[at] = char(other[at] ^ 4);
            EXPECT_NE(fingerprint({write(folder / "a", other)}, kReadWhole), good) << "byte " << at << " of " << size;
        }
        EXPECT_NE(fingerprint({write(folder / "a", text + '\0')}, kReadWhole), good);
        EXPECT_EQ(fingerprint({write(folder / "a", text)}, kReadWhole), good);
    }
}

TEST(Fingerprint, LargeFilesAreSampledFromEndToEnd) {
    const TempFolder folder;
    const size_t size = 64 * 65536;
    const std::string text = bytes(size), file = write(folder / "a", text);
    const uint64_t good = fingerprint({file}, size - 1);
    EXPECT_EQ(fingerprint({file}, size - 1), good);
    for (const size_t at : {size_t(0), size_t(4095), size - 4096, size - 1}) {
        std::string other = text;
        other[at] = char(other[at] ^ 4);
        EXPECT_NE(fingerprint({write(folder / "a", other)}, size - 1), good) << at;
    }
    // Wherever 128 KiB are others: there is a place in every 64 KiB.
    for (size_t from = 0; from + 131072 <= size; from += 50000) {
        std::string other = text;
        for (size_t i = from; i < from + 131072; ++i) other[i] = char(other[i] ^ 4);
        EXPECT_NE(fingerprint({write(folder / "a", other)}, size - 1), good) << from;
    }
}

TEST(Fingerprint, NamesAndOrderCountFoldersDoNot) {
    const TempFolder folder;
    std::filesystem::create_directory(folder / "b");
    const std::string x = write(folder / "x", "one"), y = write(folder / "y", "two"), again = write(folder / "b/x", "one"), other = write(folder / "b/z", "one");
    EXPECT_EQ(fingerprint({x}, kReadWhole), fingerprint({again}, kReadWhole));
    EXPECT_NE(fingerprint({x}, kReadWhole), fingerprint({other}, kReadWhole));
    EXPECT_NE(fingerprint({x, y}, kReadWhole), fingerprint({y, x}, kReadWhole));
    EXPECT_EQ(total_bytes({x, y}), 6u);
}

TEST(Fingerprint, AFileThatIsNotThereIsNamed) {
    EXPECT_NE(error_of([] { fingerprint({"/none/such.bin"}, kReadWhole); }).find("/none/such.bin: cannot open"), std::string::npos);
}

}  // namespace
