#include "trainer/run/agreement.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "data/hash.h"
#include "data/loader.h"
#include "data/mapped_file.h"
#include "kernels/common/check.h"
#include "trainer/run/fingerprint.h"

namespace fs = std::filesystem;

namespace {

std::string hex(uint64_t x) { return message("%016llx", static_cast<unsigned long long>(x)); }

std::string described(const std::vector<std::string>& files) {
    return message("%zu file%s of %llu bytes, contents %s", files.size(), files.size() == 1 ? "" : "s", static_cast<unsigned long long>(total_bytes(files)),
                   hex(fingerprint(files, kReadWhole)).c_str());
}

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
    facts.emplace_back("program", hex(fingerprint({"/proc/self/exe"}, kReadWhole)));
    facts.emplace_back("training data", described(find_shards(config.train, "train")));
    if (!config.multiple_choice.empty()) facts.emplace_back("questions", hex(hash_bytes(MappedFile(config.multiple_choice).bytes())));
    if (!config.val.empty()) facts.emplace_back("validation data", described(find_shards(config.val, "val")));
    return facts;
}

}  // namespace

void agree(World& world, Config& config) {
    if (world.alone()) return;
    world.require_agreement(facts_of(config));
    if (config.out_is_default) config.out = world.all_texts(config.out)[0];
}

void require_same_files(World& world, const std::string& what, const std::vector<std::string>& files) {
    if (world.alone()) return;
    world.require_agreement({{what, described(files)}});
    if (total_bytes(files) <= kReadWhole) return;
    const bool reads = world.rank() == 0 || world.local_rank() == 0;
    const std::vector<std::string> readers = world.all_texts(reads ? "reads" : "");
    if (std::count(readers.begin(), readers.end(), "") + 1 == world.size()) return;  // one machine
    const std::vector<std::string> hashes = world.all_texts(reads ? hex(fingerprint(files, UINT64_MAX)) : "");
    for (size_t r = 1; r < hashes.size(); ++r)
        if (!hashes[r].empty() && hashes[r] != hashes[0])
            throw JobError(message("rank %zu has %s, contents %s, where rank 0 has %s: give every machine the same files", r, what.c_str(), hashes[r].c_str(), hashes[0].c_str()));
}

namespace {

// The listing makes a file system over a network forget what it knew to be missing.
bool appears(const fs::path& file, double within_s) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(within_s);
    std::error_code error;
    while (!fs::exists(file, error)) {
        if (std::chrono::steady_clock::now() >= end) return false;
        for (const fs::path& folder : {file.parent_path().parent_path(), file.parent_path()}) fs::directory_iterator(folder, error);
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    return true;
}

}  // namespace

void require_shared_folder(World& world, const std::string& out, double patience_s) {
    if (world.alone()) return;
    fs::path token;
    if (world.rank() == 0) {
        token = message(".seen_by_all_%lld_%lld", static_cast<long long>(getpid()), static_cast<long long>(std::chrono::system_clock::now().time_since_epoch().count()));
        if (!std::ofstream(fs::path(out) / token)) token.clear();  // the log will say why
    }
    token = world.all_texts(token.string())[0];
    const bool seen = token.empty() || appears(fs::path(out) / token, patience_s);
    const std::vector<std::string> blind = world.all_texts(seen ? "" : host_name());
    if (world.rank() == 0 && !token.empty()) unlink((fs::path(out) / token).c_str());
    for (size_t r = 0; r < blind.size(); ++r)
        if (!blind[r].empty())
            throw JobError(message("rank %zu (%s) does not see what rank 0 writes in --out %s: give a folder that all machines share, by its whole path", r,
                                   blind[r].c_str(), out.c_str()));
}
