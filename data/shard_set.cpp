#include "data/shard_set.h"

#include <algorithm>

#include "kernels/common/check.h"

void ShardSet::append(std::span<const uint32_t> tokens) {
    tokens_ += static_cast<int64_t>(tokens.size());
    while (!tokens.empty()) {
        if (writers_.empty() || writers_.back()->size() == shard_tokens_) {
            if (!writers_.empty()) writers_.back()->close();
            REQUIRE(writers_.size() < 1'000'000, "%s: more than 1000000 shards: raise --shard-tokens above %lld",
                    folder_.c_str(), static_cast<long long>(shard_tokens_));
            writers_.push_back(std::make_unique<TokenFileWriter>(
                message("%s/%s_%06zu.bin", folder_.c_str(), split_.c_str(), writers_.size()), info_));
        }
        const auto room = static_cast<size_t>(shard_tokens_ - writers_.back()->size());
        const auto now = tokens.first(std::min(room, tokens.size()));
        writers_.back()->append(now);
        tokens = tokens.subspan(now.size());
    }
}

void ShardSet::close() {
    if (!writers_.empty()) writers_.back()->close();
}

void ShardSet::publish() {
    close();
    for (const auto& writer : writers_) writer->publish();
}

bool is_shard_name(const std::string& name) {
    const size_t digits = name.find('_') + 1;  // 0 when there is none
    const std::string split = name.substr(0, digits);
    return (split == "train_" || split == "val_") && name.size() == digits + 10 && name.ends_with(".bin") &&
           std::all_of(name.begin() + static_cast<ptrdiff_t>(digits), name.end() - 4,
                       [](char c) { return c >= '0' && c <= '9'; });
}
