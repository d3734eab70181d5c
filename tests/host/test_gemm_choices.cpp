#include "kernels/gemm/choices.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "tests/host/temp_folder.h"

namespace {

using gemm_choices::Entry;
using gemm_choices::Table;

Table two_choices() {
    Entry a{.index = 3, .candidates = 8, .algorithm = {}}, b{.index = 0, .candidates = 1, .algorithm = {}};
    for (size_t i = 0; i < std::size(a.algorithm.data); ++i) a.algorithm.data[i] = 0x9e3779b97f4a7c15u * (i + 1);
    return {{"Card, 132 SMs\t130100\t64x64x64 bf16*bf16>bf16 row row", a}, {"Card, 132 SMs\t130100\t16x16x16 e4m3*e5m2>f32 row row", b}};
}

std::string text_of(const Table& table) {
    std::string text;
    for (const auto& [name, entry] : table) text += gemm_choices::line_of(name, entry) + "\n";
    return text;
}

gemm_choices::Read read(const std::string& text) {
    std::istringstream lines(text);
    return gemm_choices::read(lines);
}

TEST(GemmChoices, ReadsWhatItWrote) {
    const gemm_choices::Read again = read(text_of(two_choices()));
    EXPECT_EQ(again.damaged, 0);
    EXPECT_EQ(text_of(again.table), text_of(two_choices()));
}

// An algorithm that was changed by one bit could compute anything: its line must not count.
TEST(GemmChoices, EveryChangedCharacterIsNoticed) {
    const std::string text = text_of(two_choices());
    for (size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '\n') continue;
        std::string changed = text;
        changed[i] = changed[i] == '1' ? '2' : '1';
        const gemm_choices::Read again = read(changed);
        EXPECT_EQ(again.damaged, 1) << "at " << i;
        EXPECT_EQ(again.table.size(), 1u) << "at " << i;
    }
    EXPECT_EQ(read(text.substr(0, text.size() - 3)).damaged, 1);
    EXPECT_EQ(read("\nnonsense\n\t\t\t\n").damaged, 3);
}

TEST(GemmChoices, MakesItsFolderAndReplacesTheFile) {
    const TempFolder folder;
    const std::string path = folder.path() + "/a/b/gemm.cache";
    ASSERT_TRUE(gemm_choices::write(path, {}));
    ASSERT_TRUE(gemm_choices::write(path, two_choices()));
    std::ifstream file(path);
    EXPECT_EQ(text_of(gemm_choices::read(file).table), text_of(two_choices()));
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path() + "/a/b"), {}), 1);  // no temporary is left
}

TEST(GemmChoices, SaysWhatPreventsWriting) {
    const TempFolder folder;
    std::ofstream(folder.path() + "/file") << "x";
    EXPECT_FALSE(gemm_choices::write(folder.path() + "/file/gemm.cache", two_choices()));
    EXPECT_EQ(errno, ENOTDIR);
}

}  // namespace
