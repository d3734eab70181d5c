#include "data/loader.h"

#include <glob.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>

#include "data/hash.h"
#include "data/permutation.h"
#include "data/reason.h"
#include "kernels/common/check.h"

namespace {

std::vector<std::string> shards_in_folder(const std::string& folder, const std::string& split) {
    std::error_code status;
    const std::filesystem::directory_iterator entries(folder, status);
    REQUIRE(!status, "%s: cannot list this folder: %s", folder.c_str(), reason(status.value()).c_str());
    std::vector<std::string> paths;
    for (const auto& entry : entries)
        if (entry.path().extension() == ".bin" && entry.path().stem().string().find(split) != std::string::npos)
            paths.push_back(entry.path().string());
    return paths;
}

std::vector<std::string> shards_of_pattern(const std::string& pattern) {
    glob_t found{};
    const std::unique_ptr<glob_t, void (*)(glob_t*)> release(&found, globfree);
    const int status = glob(pattern.c_str(), 0, nullptr, &found);
    REQUIRE(status == 0 || status == GLOB_NOMATCH, "%s: cannot be searched as a pattern", pattern.c_str());
    return {found.gl_pathv, found.gl_pathv + found.gl_pathc};
}

}  // namespace

std::vector<std::string> find_shards(const std::string& where, const std::string& split) {
    std::error_code status;
    const bool folder = std::filesystem::is_directory(where, status);
    REQUIRE(status != std::errc::permission_denied, "%s: cannot open: %s", where.c_str(), reason(status.value()).c_str());
    const std::string named = split.empty() ? "" : " with \"" + split + "\" in the name";
    std::vector<std::string> paths = folder ? shards_in_folder(where, split) : shards_of_pattern(where);
    REQUIRE(!paths.empty(), "%s: no shards: expected %s", where.c_str(),
            folder ? ("*.bin files" + named + " in this folder").c_str()
                   : "a folder of shards, or a file or glob pattern that exists");
    // Neither the order of a folder nor glob's (which follows the locale) is the same on every machine.
    std::sort(paths.begin(), paths.end());
    return paths;
}

DataLoader::DataLoader(DataLoaderOptions options) : options_(std::move(options)), first_sample_{0} {
    REQUIRE(options_.seq_len >= 1, "data loader: sequence length %lld, must be at least 1",
            static_cast<long long>(options_.seq_len));
    REQUIRE(options_.samples_per_step >= 1, "data loader: %lld samples per step, must be at least 1",
            static_cast<long long>(options_.samples_per_step));
    REQUIRE(!options_.shards.empty(), "data loader: no shards given, must be at least 1");
    shards_.reserve(options_.shards.size());
    for (const std::string& path : options_.shards) {
        const TokenFile& shard = shards_.emplace_back(path);
        check_agreement(shard);
        tokens_ += shard.size();
        first_sample_.push_back(first_sample_.back() + (shard.size() - 1) / options_.seq_len);
    }
    REQUIRE(samples_per_epoch() > 0,
            "%s%s: no sample of %lld + 1 consecutive tokens (%lld tokens in %zu shards): shorten the sequence or add data",
            options_.shards[0].c_str(), shards_.size() > 1 ? " and the other shards" : "",
            static_cast<long long>(options_.seq_len), static_cast<long long>(tokens_), shards_.size());
    hash_ = hash_of_places();
}

uint64_t DataLoader::hash_of_places() const {
    constexpr int64_t kPlaces = 256, kTokens = 64;
    uint64_t hash = 0;
    for (const TokenFile& shard : shards_) {
        const int64_t places = std::max<int64_t>(1, kPlaces / static_cast<int64_t>(shards_.size()));
        std::vector<int32_t> tokens(static_cast<size_t>(std::min(kTokens, shard.size())));
        for (int64_t i = 0; i < places; ++i) {
            const int64_t last = shard.size() - static_cast<int64_t>(tokens.size());
            shard.read(last / places * i + last % places, static_cast<int64_t>(tokens.size()), 0, tokens.data());
            hash = mix64(hash ^ hash_bytes({reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(int32_t)}));
        }
        hash = mix64(hash ^ static_cast<uint64_t>(shard.size()));
    }
    return hash | 1;  // never 0
}

void DataLoader::check_agreement(const TokenFile& shard) {
    const TokenFileInfo& its = shard.info();
    REQUIRE(options_.vocab_size <= 0 || its.vocab_size <= options_.vocab_size,
            "%s: made with a vocabulary of %d, must be at most the model's %d: %s", shard.path().c_str(), its.vocab_size,
            options_.vocab_size, vocabulary_advice(its, its.vocab_size).c_str());
    REQUIRE(its.tokenizer == TokenizerId::unknown || info_.tokenizer == TokenizerId::unknown ||
                its.tokenizer == info_.tokenizer,
            "%s: made with tokenizer %s, the shards before it with %s", shard.path().c_str(),
            tokenizer_name(its.tokenizer), tokenizer_name(info_.tokenizer));
    info_.vocab_size = std::max(info_.vocab_size, its.vocab_size);
    if (its.tokenizer != TokenizerId::unknown) info_.tokenizer = its.tokenizer;
    if (its.end_of_text != 0) info_.end_of_text = its.end_of_text;
}

void DataLoader::fill(int64_t step, int64_t first_sample, int64_t n_samples, int32_t* inputs, int32_t* targets) const {
    REQUIRE(step >= 0 && step <= INT64_MAX / options_.samples_per_step - 1, "data loader: step %lld is out of range",
            static_cast<long long>(step));
    REQUIRE(first_sample >= 0 && n_samples >= 0 && first_sample <= options_.samples_per_step - n_samples,
            "data loader: %lld samples from %lld asked for, a step has %lld", static_cast<long long>(n_samples),
            static_cast<long long>(first_sample), static_cast<long long>(options_.samples_per_step));
    const int64_t per_epoch = samples_per_epoch();
    int64_t next = step * options_.samples_per_step + first_sample;
    const int64_t end = next + n_samples;
    while (next < end) {
        const int64_t epoch = next / per_epoch, epoch_begin = epoch * per_epoch;
        const Permutation order(per_epoch, mix64(mix64(options_.seed) + static_cast<uint64_t>(epoch)));
        for (const int64_t stop = std::min(end, epoch_begin + per_epoch); next < stop; ++next) {
            const int64_t index = next - epoch_begin;
            read_sample(options_.shuffle ? order(index) : index, inputs, targets);
            inputs += options_.seq_len;
            targets += options_.seq_len;
        }
    }
}

void DataLoader::read_sample(int64_t sample, int32_t* inputs, int32_t* targets) const {
    const auto after = std::upper_bound(first_sample_.begin(), first_sample_.end(), sample);
    const auto shard = static_cast<size_t>(after - first_sample_.begin()) - 1;
    const int64_t first = (sample - first_sample_[shard]) * options_.seq_len;
    shards_[shard].read(first, options_.seq_len, options_.vocab_size, inputs);
    std::copy(inputs + 1, inputs + options_.seq_len, targets);
    shards_[shard].read(first + options_.seq_len, 1, options_.vocab_size, targets + options_.seq_len - 1);
}
