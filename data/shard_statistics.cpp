#include "data/shard_statistics.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace {

constexpr int64_t kChunk = int64_t{1} << 16;

// Lengths of the documents that begin in the file, in tokens.
class DocumentLengths {
  public:
    explicit DocumentLengths(int32_t end_of_text) : end_of_text_(end_of_text) {}
    void add(std::span<const int32_t> tokens) {
        if (end_of_text_ == 0) return;
        for (const int32_t token : tokens) {
            if (token == end_of_text_) lengths_.push_back(0);
            if (!lengths_.empty()) ++lengths_.back();
        }
    }
    void report(ShardStatistics& statistics) {
        statistics.documents = static_cast<int64_t>(lengths_.size());
        if (lengths_.empty()) return;
        std::sort(lengths_.begin(), lengths_.end());
        statistics.shortest_document = lengths_.front();
        statistics.median_document = lengths_[lengths_.size() / 2];
        statistics.longest_document = lengths_.back();
    }

  private:
    int32_t end_of_text_;
    std::vector<int64_t> lengths_;
};

// Counts of any 32-bit tokens, which a foreign file may hold: large ones not in a table, for its size.
class Histogram {
  public:
    void add(std::span<const int32_t> tokens) {
        for (const int32_t token : tokens) {
            const auto id = static_cast<uint32_t>(token);
            ++(id < kTable ? table_[id] : large_[id]);
        }
    }
    void report(ShardStatistics& statistics, std::span<const uint32_t> token_bytes, int32_t end_of_text) const {
        std::vector<TokenCount> used;
        for (uint32_t id = 0; id < kTable; ++id)
            if (table_[id] > 0) used.push_back({id, table_[id]});
        for (const auto& [id, count] : large_) used.push_back({id, count});
        for (const auto& [id, count] : used) {
            const double part = static_cast<double>(count) / static_cast<double>(statistics.tokens);
            statistics.entropy_nats -= part * std::log(part);
            if (id < token_bytes.size() && static_cast<int64_t>(id) != end_of_text) statistics.text_bytes += count * token_bytes[id];
        }
        statistics.distinct_tokens = static_cast<int64_t>(used.size());
        statistics.largest_token = used.back().token;
        std::stable_sort(used.begin(), used.end(), [](const TokenCount& a, const TokenCount& b) { return a.count > b.count; });
        used.resize(std::min(used.size(), kMostFrequent));
        statistics.most_frequent = std::move(used);
    }

  private:
    static constexpr uint32_t kTable = 1 << 18;
    std::vector<int64_t> table_ = std::vector<int64_t>(kTable);
    std::map<uint32_t, int64_t> large_;
};

}  // namespace

ShardStatistics shard_statistics(const TokenFile& file, std::span<const uint32_t> token_bytes) {
    ShardStatistics statistics{.tokens = file.size(), .most_frequent = {}};
    Histogram histogram;
    DocumentLengths documents(file.info().end_of_text);
    std::vector<int32_t> chunk;
    for (int64_t first = 0; first < file.size(); first += kChunk) {
        chunk.resize(static_cast<size_t>(std::min(kChunk, file.size() - first)));
        file.read(first, static_cast<int64_t>(chunk.size()), file.info().vocab_size, chunk.data());
        histogram.add(chunk);
        documents.add(chunk);
    }
    histogram.report(statistics, token_bytes, file.info().end_of_text);
    documents.report(statistics);
    return statistics;
}
