#include "trainer/distributed/shard.h"

#include <algorithm>

#include "kernels/common/check.h"

Range intersection(const Range& a, const Range& b) {
    const Range both{std::max(a.begin, b.begin), std::min(a.end, b.end)};
    return both.begin < both.end ? both : Range{a.begin, a.begin};
}

int64_t slice_elements(int64_t elements, int ranks) {
    REQUIRE(elements >= 0 && ranks >= 1, "slice of %lld elements over %d ranks: must be at least 0 over at least 1", (long long)elements, ranks);
    const int64_t unit = kSliceAlignment * ranks;
    return (elements + unit - 1) / unit * kSliceAlignment;
}

int64_t padded_elements(int64_t elements, int ranks) { return slice_elements(elements, ranks) * ranks; }

Range slice_range(int64_t elements, int rank, int ranks) {
    REQUIRE(rank >= 0 && rank < ranks, "slice of rank %d of %d: must be from 0 to ranks - 1", rank, ranks);
    const int64_t slice = slice_elements(elements, ranks);
    return {rank * slice, (rank + 1) * slice};
}

std::vector<Piece> pieces_in(const std::vector<Range>& tensors, const Range& range) {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < tensors.size(); ++i) {
        const Range both = intersection(tensors[i], range);
        if (both.size() > 0)
            pieces.push_back({.tensor = int(i), .first = both.begin - tensors[i].begin, .count = both.size(), .offset = both.begin - range.begin});
    }
    return pieces;
}

Range even_part(int64_t count, int part, int parts) {
    REQUIRE(count >= 0 && part >= 0 && part < parts, "part %d of %d of %lld elements", part, parts, (long long)count);
    const int64_t whole = count / parts, rest = count % parts;  // count * parts could overflow
    const int64_t begin = part * whole + std::min<int64_t>(part, rest);
    return {begin, begin + whole + (part < rest ? 1 : 0)};
}
