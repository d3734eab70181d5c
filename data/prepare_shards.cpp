#include "data/prepare_shards.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "data/corpus.h"
#include "data/hash.h"
#include "data/mapped_file.h"
#include "data/parallel_for.h"
#include "data/shard_set.h"
#include "kernels/common/check.h"

namespace fs = std::filesystem;

namespace {

// Memory: a group of segments is in memory as text and, at 4 bytes a token, as ids.
constexpr size_t kSegmentBytes = size_t{1} << 20;
constexpr size_t kGroupBytes = size_t{32} << 20;
constexpr size_t kBatchFiles = 4096;  // mapped at a time; Linux allows 65,530 mappings

struct LoadedFile {
    MappedFile file;
    bool binary = false;
    uint64_t hash = 0;
};

// Work for one thread: part of one document.
struct Segment {
    std::string_view text;
    bool validation;
    bool begins_document;
};

double entropy_nats(const std::vector<int64_t>& histogram) {
    double total = 0, sum = 0;
    for (const int64_t count : histogram) total += static_cast<double>(count);
    for (const int64_t count : histogram)
        if (count > 0) sum -= static_cast<double>(count) / total * std::log(static_cast<double>(count) / total);
    return sum;
}

class Preparation {
  public:
    Preparation(const PrepareOptions& options, const Tokenizer& tokenizer)
        : options_(options),
          train_(options.out, "train", tokenizer.file_info(), options.shard_tokens),
          val_(options.out, "val", tokenizer.file_info(), options.shard_tokens),
          val_token_counts_(tokenizer.vocab_size()),
          val_byte_counts_(256) {
        for (int thread = 0; thread < options.threads; ++thread) tokenizers_.push_back(tokenizer.clone());
    }

    void add_files(const std::vector<SourceFile>& files);
    PrepareSummary finish();
    void publish() {
        train_.publish();
        val_.publish();
    }

  private:
    void add_batch(std::span<const SourceFile> files);
    void cut_documents(const SourceFile& file, std::string_view text, std::vector<Segment>& segments);
    void encode_group(std::span<const Segment> segments);
    void store(const Segment& segment, std::span<const uint32_t> ids);

    const PrepareOptions& options_;
    std::vector<std::unique_ptr<Tokenizer>> tokenizers_;  // one a thread
    std::vector<std::vector<uint32_t>> ids_;              // of the segments of a group
    ShardSet train_, val_;
    PrepareSummary summary_;
    std::vector<int64_t> val_token_counts_, val_byte_counts_;
    std::unordered_set<uint64_t> contents_;  // hashes of the files taken so far
    bool only_file_ = false;
    int64_t bytes_done_ = 0, bytes_total_ = 0;
};

void Preparation::add_files(const std::vector<SourceFile>& files) {
    only_file_ = files.size() == 1;
    for (const SourceFile& file : files) bytes_total_ += file.bytes;
    for (size_t first = 0; first < files.size();) {
        size_t count = 0;
        for (int64_t bytes = 0; first + count < files.size() && count < kBatchFiles; ++count) {
            bytes += files[first + count].bytes;
            if (count > 0 && bytes > static_cast<int64_t>(kGroupBytes)) break;
        }
        add_batch(std::span(files).subspan(first, count));
        first += count;
    }
}

void Preparation::add_batch(std::span<const SourceFile> files) {
    std::vector<LoadedFile> loaded(files.size());
    parallel_for(files.size(), options_.threads, [&](size_t i, int) {
        loaded[i].file = MappedFile(files[i].path);
        loaded[i].binary = is_binary(loaded[i].file.bytes());
        if (!loaded[i].binary) loaded[i].hash = hash_bytes(loaded[i].file.bytes());
    });
    std::vector<Segment> segments;
    for (size_t i = 0; i < files.size(); ++i) {
        const std::string_view text = loaded[i].file.bytes();
        if (text.empty())
            ++summary_.empty_files;
        else if (loaded[i].binary)
            ++summary_.binary_files;
        // A copy would be trained on twice, and could be on both sides of the split.
        else if (!contents_.insert(loaded[i].hash).second)
            ++summary_.duplicate_files;
        else
            cut_documents(files[i], text, segments);
    }
    for (size_t first = 0; first < segments.size();) {
        size_t count = 0;
        for (size_t bytes = 0; first + count < segments.size() && bytes < kGroupBytes; ++count)
            bytes += segments[first + count].text.size();
        encode_group(std::span(segments).subspan(first, count));
        first += count;
    }
}

void Preparation::cut_documents(const SourceFile& file, std::string_view text, std::vector<Segment>& segments) {
    ++summary_.files;
    const auto add_document = [&](std::string_view document, bool validation) {
        ++(validation ? summary_.val : summary_.train).documents;
        for (size_t at = 0; at < document.size();) {
            const size_t end = next_cut(document, at + kSegmentBytes);
            segments.push_back({document.substr(at, end - at), validation, at == 0});
            at = end;
        }
    };
    const auto documents = split_documents(text, options_.separator);
    if (only_file_ && documents.size() == 1 && options_.val_fraction > 0) {
        // One document cannot be on both sides: its end becomes the validation document.
        const auto wanted = static_cast<size_t>(static_cast<double>(documents[0].size()) * (1 - options_.val_fraction));
        const size_t cut = next_cut(documents[0], wanted);
        add_document(documents[0].substr(0, cut), false);
        if (cut < documents[0].size()) add_document(documents[0].substr(cut), true);
        return;
    }
    for (size_t i = 0; i < documents.size(); ++i) {
        const std::string name = options_.separator.empty() ? file.name : file.name + "#" + std::to_string(i);
        add_document(documents[i], is_validation(name, options_.val_fraction));
    }
}

void Preparation::encode_group(std::span<const Segment> segments) {
    ids_.resize(std::max(ids_.size(), segments.size()));
    parallel_for(segments.size(), options_.threads, [&](size_t i, int thread) {
        Tokenizer& tokenizer = *tokenizers_[static_cast<size_t>(thread)];
        ids_[i].clear();
        if (segments[i].begins_document) ids_[i].push_back(tokenizer.end_of_text());
        tokenizer.encode(segments[i].text, ids_[i]);
    });
    for (size_t i = 0; i < segments.size(); ++i) {
        store(segments[i], ids_[i]);
        bytes_done_ += static_cast<int64_t>(segments[i].text.size());
    }
    if (options_.progress) options_.progress(bytes_done_, bytes_total_);
}

void Preparation::store(const Segment& segment, std::span<const uint32_t> ids) {
    (segment.validation ? val_ : train_).append(ids);
    (segment.validation ? summary_.val : summary_.train).bytes += static_cast<int64_t>(segment.text.size());
    if (!segment.validation) return;
    for (const uint32_t id : ids) ++val_token_counts_[id];
    for (const char byte : segment.text) ++val_byte_counts_[static_cast<uint8_t>(byte)];
}

PrepareSummary Preparation::finish() {
    REQUIRE(summary_.files > 0, "no text in the input: %lld binary and %lld empty files; see --extensions",
            static_cast<long long>(summary_.binary_files), static_cast<long long>(summary_.empty_files));
    const auto documents = static_cast<long long>(summary_.train.documents + summary_.val.documents);
    REQUIRE(summary_.train.documents > 0, "the training split is empty: %lld documents at --val-fraction %g: lower it",
            documents, options_.val_fraction);
    REQUIRE(summary_.val.documents > 0 || options_.val_fraction == 0,
            "the validation split is empty: %lld documents at --val-fraction %g: raise it, or 0 for no validation split",
            documents, options_.val_fraction);
    train_.close();
    val_.close();
    summary_.train.tokens = train_.tokens();
    summary_.train.shards = train_.shards();
    summary_.val.tokens = val_.tokens();
    summary_.val.shards = val_.shards();
    summary_.val_token_entropy = entropy_nats(val_token_counts_);
    summary_.val_byte_entropy = entropy_nats(val_byte_counts_);
    return summary_;
}

// What this program wrote to `folder` before: its meta.json and shards, nothing else.
std::vector<fs::path> earlier_output(const fs::path& folder) {
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(folder)) {
        const std::string name = entry.path().filename().string();
        if (name == "meta.json" || is_shard_name(name)) found.push_back(entry.path());
    }
    return found;
}

nlohmann::ordered_json json_of(const SplitCounts& counts) {
    return {{"documents", counts.documents}, {"bytes", counts.bytes}, {"tokens", counts.tokens}, {"shards", counts.shards}};
}

void write_meta(const PrepareOptions& options, const Tokenizer& tokenizer, const PrepareSummary& summary) {
    const auto entropy = [&](double nats) { return summary.val.tokens > 0 ? nlohmann::ordered_json(nats) : nullptr; };
    const nlohmann::ordered_json meta = {
        {"format", 1},
        {"inputs", options.inputs},
        {"tokenizer", tokenizer.name()},
        {"vocab_size", tokenizer.vocab_size()},
        {"end_of_text", tokenizer.end_of_text()},
        {"val_fraction", options.val_fraction},
        {"files", summary.files},
        {"skipped_files",
         {{"binary", summary.binary_files}, {"empty", summary.empty_files}, {"duplicate", summary.duplicate_files}}},
        {"train", json_of(summary.train)},
        {"val", json_of(summary.val)},
        {"val_token_entropy_nats", entropy(summary.val_token_entropy)},
        {"val_byte_entropy_nats", entropy(summary.val_byte_entropy)},
    };
    const std::string path = options.out + "/meta.json", temporary = path + ".tmp";
    std::ofstream file(temporary);
    // A path that is not UTF-8 must not stop the run here, at its end.
    file << meta.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << '\n';
    file.close();
    REQUIRE(file, "%s: cannot write: %s", temporary.c_str(), std::strerror(errno));
    fs::rename(temporary, path);
}

}  // namespace

PrepareSummary prepare_shards(const PrepareOptions& options, const Tokenizer& tokenizer) {
    REQUIRE(options.val_fraction >= 0 && options.val_fraction < 1, "--val-fraction %g: must be at least 0 and below 1",
            options.val_fraction);
    REQUIRE(options.shard_tokens >= 1, "--shard-tokens %lld: must be at least 1",
            static_cast<long long>(options.shard_tokens));
    REQUIRE(options.threads >= 1 && options.threads <= 1024, "--threads %d: must be 1 to 1024", options.threads);
    const auto files = find_source_files(options.inputs, parse_extensions(options.extensions));
    REQUIRE(!files.empty(), "%s%s: no files with the extensions %s", options.inputs[0].c_str(),
            options.inputs.size() > 1 ? " and the other inputs" : "", options.extensions.c_str());

    REQUIRE(!fs::exists(options.out) || fs::is_directory(options.out), "--out %s: is not a folder", options.out.c_str());
    fs::create_directories(options.out);
    REQUIRE(options.overwrite || earlier_output(options.out).empty(),
            "--out %s: holds shards already: choose another folder, or replace them with --overwrite", options.out.c_str());

    Preparation preparation(options, tokenizer);
    preparation.add_files(files);
    const PrepareSummary summary = preparation.finish();
    for (const fs::path& old : earlier_output(options.out)) fs::remove(old);
    preparation.publish();
    write_meta(options, tokenizer, summary);  // last: its presence says that the folder is complete
    return summary;
}
