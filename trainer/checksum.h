// Checksums of checkpoints: the sum, modulo 2^64, of 32-bit elements, each times an odd number that is made of its place. So
// whatever changes one element changes the sum; and parts of an array can be summed in any order, by any thread or rank, and
// added up.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

// Of elements first, first + 1, ... of an array.
uint64_t checksum(std::span<const float> elements, int64_t first = 0);
// Of bytes, with their number; the last element is filled up with zeros.
uint64_t checksum_of_bytes(std::string_view bytes);

std::string format_checksum(uint64_t sum);                 // 16 hexadecimal digits
bool parse_checksum(std::string_view text, uint64_t& sum);  // false: it is none
