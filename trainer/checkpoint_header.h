// checkpoint.json: what a checkpoint says of itself, and of its other files. Its last member is a checksum of the text before.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "trainer/checkpoint.h"

constexpr const char* kParamsFile = "params.safetensors";
constexpr const char* kAdamFile = "adam.safetensors";
constexpr const char* kInfoFile = "checkpoint.json";

struct CheckpointHeader {
    CheckpointInfo info;
    int64_t step, adam_t, skipped_steps;
    int64_t saved_ns;  // since 1970
    std::vector<RecentStep> recent;
    std::map<std::string, uint64_t> files;  // sizes
    // Of each file: of its header, then of each tensor in the order of their data (trainer/checksum.h). None: from a program
    // that knew no checksums.
    std::map<std::string, std::vector<uint64_t>> checksums;
};

// Of a parameter's tensor in the other files.
std::vector<int64_t> file_shape(const Parameter& p);

std::string header_text(const CheckpointHeader& header);

// Throws Error if the checkpoint is not complete, or checkpoint.json is damaged.
CheckpointHeader read_header(const std::string& folder);
