#include "trainer/run/agreement.h"

#include <filesystem>
#include <fstream>
#include <sstream>

#include "data/hash.h"
#include "data/loader.h"
#include "data/mapped_file.h"
#include "kernels/common/check.h"

namespace fs = std::filesystem;

namespace {

std::string part_of_file(const std::string& path, uint64_t offset, size_t bytes) {
    std::ifstream file(path, std::ios::binary);
    std::string text(bytes, '\0');
    file.seekg(std::streamoff(offset));
    file.read(text.data(), std::streamsize(bytes));
    text.resize(size_t(file.gcount()));
    return text;
}

// Of names, sizes and both ends of every file: reads little, and tells other data from the same data elsewhere.
uint64_t fingerprint(const std::vector<std::string>& files) {
    constexpr size_t kEnd = 4096;
    std::string all;
    for (const std::string& path : files) {
        const uint64_t size = fs::file_size(path);
        all += fs::path(path).filename().string() + " " + std::to_string(size) + "\n";
        all += part_of_file(path, 0, kEnd) + part_of_file(path, size > kEnd ? size - kEnd : 0, kEnd);
    }
    return hash_bytes(all);
}

std::string hex(uint64_t x) { return message("%016llx", static_cast<unsigned long long>(x)); }

std::vector<World::Fact> facts_of(const Config& config) {
    std::vector<World::Fact> facts;
    std::istringstream lines(to_toml(config));
    for (std::string line; std::getline(lines, line);) {
        const size_t equals = line.find(" = ");
        if (line.starts_with("#") || equals == std::string::npos) continue;
        const std::string name = line.substr(0, equals);
        if (name == "gemm-cache" || (name == "out" && config.out_is_default)) continue;
        facts.emplace_back("--" + name, line.substr(equals + 3));
    }
    facts.emplace_back("program", hex(hash_bytes(part_of_file("/proc/self/exe", 0, fs::file_size("/proc/self/exe")))));
    facts.emplace_back("training data", hex(fingerprint(find_shards(config.train, "train"))));
    if (!config.multiple_choice.empty()) facts.emplace_back("questions", hex(hash_bytes(MappedFile(config.multiple_choice).bytes())));
    if (!config.val.empty()) facts.emplace_back("validation data", hex(fingerprint(find_shards(config.val, "val"))));
    return facts;
}

}  // namespace

void agree(World& world, Config& config) {
    if (world.alone()) return;
    world.require_agreement(facts_of(config));
    if (config.out_is_default) config.out = world.all_texts(config.out)[0];
}
