// Which algorithm of cuBLASLt a shape takes on a machine, as text: one line a shape, tab-separated:
//
//     device, cuBLASLt version, shape, index in the heuristic's list, candidates, algorithm (hex), checksum of the line
//
// The cache file of tuned algorithms and the record in a checkpoint are such lines. An algorithm is a plain struct,
// meaningful to the same version of cuBLASLt only. No CUDA calls here.
#pragma once
#include <cublasLt.h>

#include <istream>
#include <map>
#include <string>

namespace gemm_choices {

struct Entry {
    int index, candidates;
    cublasLtMatmulAlgo_t algorithm;
};
using Table = std::map<std::string, Entry>;  // by "device <tab> version <tab> shape"

std::string line_of(const std::string& name, const Entry& entry);

struct Read {
    Table table;
    int damaged = 0;  // lines that line_of() did not write: they give nothing
};
Read read(std::istream& lines);

// The file is replaced atomically and its folder is made. False with errno if it cannot be written.
bool write(const std::string& path, const Table& table);

}  // namespace gemm_choices
