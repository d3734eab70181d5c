// What files hold, in 64 bits, to compare them between machines.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

constexpr uint64_t kReadWhole = uint64_t(1) << 30;  // bytes: within a second

// Of names (without folders), sizes and contents: of every byte if the files have at most `whole_up_to` together. Of larger ones, of
// both ends of each and of 4 KiB at 64 places spread over it, of fewer where there are many files. An Error if one cannot be read.
uint64_t fingerprint(const std::vector<std::string>& files, uint64_t whole_up_to);

uint64_t total_bytes(const std::vector<std::string>& files);
