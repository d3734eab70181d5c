#include "trainer/distributed/shard.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "temp_folder.h"

namespace {

constexpr int kMostRanks = 16;

std::vector<int64_t> odd_sizes() {
    std::vector<int64_t> sizes(1100);  // every size up to two slices' alignment and a bit
    std::iota(sizes.begin(), sizes.end(), 0);
    for (const int64_t n : {4095, 4096, 4097, 8191, 8193, 65537, 786'431, 7'077'889, 15'728'641}) sizes.push_back(n);
    sizes.push_back((int64_t(1) << 32) + 1);
    return sizes;
}

TEST(Shard, SlicesAreEqualAlignedAndCoverTheBuffer) {
    for (const int64_t n : odd_sizes())
        for (int ranks = 1; ranks <= kMostRanks; ++ranks) {
            int64_t end = 0;
            for (int r = 0; r < ranks; ++r) {
                const Range slice = slice_range(n, r, ranks);
                ASSERT_EQ(slice.begin, end) << n << " over " << ranks;
                ASSERT_EQ(slice.size(), slice_elements(n, ranks));
                ASSERT_EQ(slice.begin % kSliceAlignment, 0);
                end = slice.end;
            }
            ASSERT_EQ(end, padded_elements(n, ranks));
            ASSERT_GE(end, n);
            ASSERT_LT(end - n, kSliceAlignment * ranks) << "more padding than alignment needs: " << n << " over " << ranks;
        }
}

// Tensors of odd sizes at the alignment of a parameter list.
std::vector<Range> tensors_of(const std::vector<int64_t>& counts, int64_t alignment) {
    std::vector<Range> tensors;
    int64_t at = 0;
    for (const int64_t n : counts) {
        tensors.push_back({at, at + n});
        at = (at + n + alignment - 1) / alignment * alignment;
    }
    return tensors;
}

TEST(Shard, EveryElementOfEveryTensorIsInExactlyOnePiece) {
    const std::vector<int64_t> sets[] = {{1}, {511, 1, 513}, {0, 7, 0}, {4800, 1600, 6401, 6400}, {3, 5000, 2, 777, 512, 1024}, {12345, 1}};
    for (const auto& counts : sets)
        for (const int64_t alignment : {1, 64, 512})
            for (int ranks = 1; ranks <= kMostRanks; ++ranks) {
                const std::vector<Range> tensors = tensors_of(counts, alignment);
                std::vector<std::vector<int>> seen;
                for (const int64_t n : counts) seen.emplace_back(size_t(n), 0);
                for (int r = 0; r < ranks; ++r) {
                    const Range slice = slice_range(tensors.back().end, r, ranks);
                    for (const Piece& p : pieces_in(tensors, slice)) {
                        ASSERT_GT(p.count, 0);
                        ASSERT_EQ(slice.begin + p.offset, tensors[size_t(p.tensor)].begin + p.first);
                        ASSERT_LE(p.offset + p.count, slice.size());
                        for (int64_t i = p.first; i < p.first + p.count; ++i) ++seen[size_t(p.tensor)][size_t(i)];
                    }
                }
                for (const auto& tensor : seen) ASSERT_TRUE(std::all_of(tensor.begin(), tensor.end(), [](int n) { return n == 1; }));
            }
}

TEST(Shard, EvenPartsCoverAndDifferByOne) {
    for (int64_t n = 0; n < 200; ++n)
        for (int parts = 1; parts <= kMostRanks; ++parts) {
            int64_t end = 0;
            for (int k = 0; k < parts; ++k) {
                const Range part = even_part(n, k, parts);
                ASSERT_EQ(part.begin, end);
                ASSERT_GE(part.size(), n / parts);
                ASSERT_LE(part.size(), n / parts + 1);
                end = part.end;
            }
            ASSERT_EQ(end, n);
        }
    EXPECT_EQ(even_part(INT64_MAX - 1, 15, 16).end, INT64_MAX - 1);
}

TEST(Shard, Intersections) {
    EXPECT_EQ(intersection({0, 10}, {5, 20}), (Range{5, 10}));
    EXPECT_EQ(intersection({5, 20}, {0, 10}), (Range{5, 10}));
    EXPECT_EQ(intersection({0, 10}, {10, 20}).size(), 0);
    EXPECT_EQ(intersection({0, 10}, {3, 4}), (Range{3, 4}));
}

TEST(Shard, WrongRanksAreErrors) {
    EXPECT_NE(error_of([] { slice_range(10, 2, 2); }), "");
    EXPECT_NE(error_of([] { slice_range(10, -1, 2); }), "");
    EXPECT_NE(error_of([] { slice_elements(10, 0); }), "");
    EXPECT_NE(error_of([] { slice_elements(-1, 1); }), "");
}

}  // namespace
