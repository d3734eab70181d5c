// Pure arithmetic of sharding: which rank holds which elements of a flat buffer.
//
// A buffer is cut into equal slices whose length is a multiple of 512 elements, so that a slice of one-byte codes begins
// on 512 bytes, and a slice of wider elements too. The last slices may be part or all padding. Tensors lie in the buffer
// back to back in any order; a slice cuts them where it must.
#pragma once
#include <cstdint>
#include <vector>

constexpr int64_t kSliceAlignment = 512;  // elements

struct Range {
    int64_t begin = 0, end = 0;
    int64_t size() const { return end - begin; }
    bool operator==(const Range&) const = default;
};
Range intersection(const Range& a, const Range& b);  // empty: {a.begin, a.begin}

// Elements of each of the `ranks` slices of a buffer of `elements`, and of the buffer that holds them all.
int64_t slice_elements(int64_t elements, int ranks);
int64_t padded_elements(int64_t elements, int ranks);
// The slice of a rank, padding included.
Range slice_range(int64_t elements, int rank, int ranks);

// What a range of the buffer holds of tensor `tensor`: `count` of its elements from `first`, at `offset` from the range's begin.
struct Piece {
    int tensor;
    int64_t first, count, offset;
};
// `tensors`: where each lies in the buffer. Pieces in the order of the tensors; none of those that the range misses.
std::vector<Piece> pieces_in(const std::vector<Range>& tensors, const Range& range);

// [0, count) in `parts` parts whose sizes differ by at most one: the k-th.
Range even_part(int64_t count, int part, int parts);
