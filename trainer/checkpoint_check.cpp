// Reads a checkpoint through and compares it with the checksums in it.
#include <algorithm>
#include <atomic>
#include <span>
#include <vector>

#include "kernels/common/check.h"
#include "trainer/checkpoint_header.h"
#include "trainer/checksum.h"
#include "trainer/safetensors.h"

namespace {

// Of the tensors in their order, all cores together.
std::vector<uint64_t> tensor_checksums(const SafetensorsReader& reader) {
    constexpr size_t kPiece = size_t(1) << 20;
    struct Piece {
        size_t tensor;
        int64_t first;
        std::span<const float> elements;
    };
    std::vector<Piece> pieces;
    for (size_t i = 0; i < reader.tensors().size(); ++i) {
        const TensorEntry& tensor = reader.tensors()[i];
        REQUIRE(tensor.dtype == "F32", "%s: tensor %s: is of type %s, must be F32", reader.path().c_str(), tensor.name.c_str(), tensor.dtype.c_str());
        const std::span elements(reinterpret_cast<const float*>(reader.bytes(tensor).data()), size_t(tensor.count()));
        for (size_t first = 0; first < elements.size(); first += kPiece)
            pieces.push_back({i, int64_t(first), elements.subspan(first, std::min(kPiece, elements.size() - first))});
    }
    std::vector<std::atomic<uint64_t>> sums(reader.tensors().size());
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < pieces.size(); ++i) sums[pieces[i].tensor] += checksum(pieces[i].elements, pieces[i].first);
    return {sums.begin(), sums.end()};
}

void verify_file(const std::string& path, const std::vector<uint64_t>& expected) {
    const SafetensorsReader reader(path);
    const std::string rule = message("does not have the checksum in %s", kInfoFile);
    REQUIRE(expected.size() == 1 + reader.tensors().size() && checksum_of_bytes(reader.header()) == expected[0], "%s: damaged: its header %s",
            path.c_str(), rule.c_str());
    const std::vector<uint64_t> sums = tensor_checksums(reader);
    for (size_t i = 0; i < sums.size(); ++i)
        REQUIRE(sums[i] == expected[1 + i], "%s: damaged: tensor %s %s", path.c_str(), reader.tensors()[i].name.c_str(), rule.c_str());
}

}  // namespace

bool verify_checkpoint(const std::string& path, CheckpointFiles files) {
    const CheckpointHeader header = read_header(path);
    if (header.checksums.empty()) return false;
    verify_file(path + "/" + kParamsFile, header.checksums.at(kParamsFile));
    if (files == CheckpointFiles::all) verify_file(path + "/" + kAdamFile, header.checksums.at(kAdamFile));
    return true;
}
