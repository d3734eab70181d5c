#include "data/prepare_shards.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "data/byte_source.h"
#include "data/corpus.h"
#include "data/json_text.h"
#include "data/ordered_pool.h"
#include "data/output_folder.h"
#include "data/reason.h"
#include "data/shard_set.h"
#include "data/text_blocks.h"
#include "kernels/common/check.h"

namespace fs = std::filesystem;

namespace {

double entropy_nats(const std::vector<int64_t>& histogram) {
    double total = 0, sum = 0;
    for (const int64_t count : histogram) total += static_cast<double>(count);
    for (const int64_t count : histogram)
        if (count > 0) sum -= static_cast<double>(count) / total * std::log(static_cast<double>(count) / total);
    return sum;
}

// What becomes of the parts of a block on one side of the split.
struct EncodedSide {
    std::vector<uint32_t> ids;
    int64_t documents = 0, bytes = 0;
};

struct Encoded {
    TextBlock block;
    EncodedSide train, val;
    int64_t bad_lines = 0;

    void clear_results() {
        for (EncodedSide* side : {&train, &val}) side->ids.clear(), side->documents = side->bytes = 0;
        bad_lines = 0;
    }
};

// Turns blocks into tokens. One a thread, with that thread's share of the counts.
class BlockEncoder {
  public:
    BlockEncoder(const PrepareOptions& options, const DocumentRules& rules, const Tokenizer& tokenizer)
        : val_token_counts(tokenizer.vocab_size()), val_byte_counts(256), options_(options), rules_(rules), tokenizer_(tokenizer.clone()) {}

    void encode(Encoded& work) {
        if (work.block.lines) encode_lines(work);
        for (const TextPart& part : work.block.parts)
            encode_part(work, std::string_view(work.block.text).substr(part.begin, part.end - part.begin), part.validation,
                        part.begins_document);
    }

    std::vector<int64_t> val_token_counts, val_byte_counts;

  private:
    void encode_part(Encoded& work, std::string_view text, bool validation, bool begins_document) {
        EncodedSide& side = validation ? work.val : work.train;
        const size_t before = side.ids.size();
        if (begins_document) side.ids.push_back(tokenizer_->end_of_text());
        tokenizer_->encode(text, side.ids);
        side.documents += begins_document;
        side.bytes += static_cast<int64_t>(text.size());
        if (!validation) return;
        for (size_t i = before; i < side.ids.size(); ++i) ++val_token_counts[side.ids[i]];
        for (const char byte : text) ++val_byte_counts[static_cast<uint8_t>(byte)];
    }

    void encode_document(Encoded& work, std::string_view text, bool validation) {
        for (size_t at = 0; at < text.size();) {
            const size_t bytes = part_end(text.substr(at));
            encode_part(work, text.substr(at, bytes), validation, at == 0);
            at += bytes;
        }
    }

    void encode_lines(Encoded& work) {
        const SourceFile& file = *work.block.lines;
        int64_t number = work.block.first_line;
        for (std::string_view rest = work.block.text; !rest.empty(); ++number) {
            const std::string_view line = rest.substr(0, rest.find('\n'));
            rest.remove_prefix(std::min(rest.size(), line.size() + 1));
            if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
            const std::string problem = json_text(line, options_.text_field, text_);
            REQUIRE(problem.empty() || options_.skip_bad_lines, "%s:%lld: %s", file.path.c_str(), static_cast<long long>(number + 1),
                    problem.c_str());
            if (problem.empty())
                encode_document(work, text_, rules_.is_validation(file.name + "#" + std::to_string(number)));
            else
                ++work.bad_lines;
        }
    }

    const PrepareOptions& options_;
    const DocumentRules& rules_;
    std::unique_ptr<Tokenizer> tokenizer_;
    std::string text_;
};

class Preparation {
  public:
    Preparation(const PrepareOptions& options, const Tokenizer& tokenizer)
        : options_(options),
          tokenizer_(tokenizer),
          train_(options.out, "train", tokenizer.file_info(), options.shard_tokens),
          val_(options.out, "val", tokenizer.file_info(), options.shard_tokens) {}

    void add_files(std::vector<SourceFile> files);
    PrepareSummary finish();
    void publish() {
        train_.publish();
        val_.publish();
    }

  private:
    std::vector<SourceFile> take_text_files(std::vector<SourceFile> files);
    DocumentRules document_rules(std::span<const SourceFile> files) const;
    void store(const Encoded& done);
    void add_entropies(const std::vector<BlockEncoder>& encoders);

    const PrepareOptions& options_;
    const Tokenizer& tokenizer_;
    ShardSet train_, val_;
    PrepareSummary summary_;
    int64_t bytes_total_ = 0;
};

std::vector<SourceFile> Preparation::take_text_files(std::vector<SourceFile> files) {
    const std::vector<FileKind> kinds = classify(files, options_.threads);
    std::vector<SourceFile> taken;
    for (size_t i = 0; i < files.size(); ++i) {
        switch (kinds[i]) {
            case FileKind::text: taken.push_back(std::move(files[i])); break;
            case FileKind::empty: ++summary_.empty_files; break;
            case FileKind::binary: ++summary_.binary_files; break;
            // A copy would be trained on twice, and could be on both sides of the split.
            case FileKind::duplicate: ++summary_.duplicate_files; break;
        }
    }
    return taken;
}

int64_t unpacked_bytes(const SourceFile& file) {
    if (!is_compressed(file.path)) return file.bytes;
    std::vector<char> chunk(size_t{1} << 18);
    const auto source = open_text_source(file.path);
    int64_t bytes = 0;
    while (const size_t now = source->read(chunk.data(), chunk.size())) bytes += static_cast<int64_t>(now);
    return bytes;
}

DocumentRules Preparation::document_rules(std::span<const SourceFile> files) const {
    DocumentRules rules{.separator = options_.separator, .val_fraction = options_.val_fraction};
    const bool file_is_document = options_.separator.empty() && std::none_of(files.begin(), files.end(), is_json_lines);
    if (!file_is_document || options_.val_fraction == 0 || files.empty()) return rules;
    if (files.size() == 1) {
        // One document cannot be on both sides: its end becomes the validation document.
        rules.hold_out_from = static_cast<int64_t>(static_cast<double>(unpacked_bytes(files[0])) * (1 - options_.val_fraction));
        return rules;
    }
    // Of a handful of documents none may lie below the fraction: then the nearest one is taken.
    rules.val_first = 1;
    for (const SourceFile& file : files) rules.val_first = std::min(rules.val_first, split_position(file.name));
    return rules;
}

void Preparation::add_files(std::vector<SourceFile> files) {
    const std::vector<SourceFile> taken = take_text_files(std::move(files));
    summary_.files = static_cast<int64_t>(taken.size());
    for (const SourceFile& file : taken) bytes_total_ += file.bytes;
    const DocumentRules rules = document_rules(taken);
    std::vector<BlockEncoder> encoders;
    for (int thread = 0; thread < options_.threads; ++thread) encoders.emplace_back(options_, rules, tokenizer_);

    OrderedPool<Encoded> pool(options_.threads, [&](Encoded& work, int thread) { encoders[static_cast<size_t>(thread)].encode(work); });
    TextBlockReader reader(taken, rules);
    const size_t budget = static_cast<size_t>(2 * options_.threads + 2) * kPartBytes;
    size_t bytes = 0;  // of the blocks under way
    std::vector<std::unique_ptr<Encoded>> spare;  // used again, so that the memory does not fragment
    const auto store_oldest = [&] {
        spare.push_back(pool.pop());
        bytes -= spare.back()->block.text.size();
        store(*spare.back());
    };
    while (true) {
        if (spare.empty()) spare.push_back(std::make_unique<Encoded>());
        if (!reader.next(spare.back()->block)) break;
        bytes += spare.back()->block.text.size();
        spare.back()->clear_results();
        pool.push(std::move(spare.back()));
        spare.pop_back();
        while (!pool.empty() && bytes > budget) store_oldest();
    }
    while (!pool.empty()) store_oldest();
    add_entropies(encoders);
}

void Preparation::store(const Encoded& done) {
    train_.append(done.train.ids);
    val_.append(done.val.ids);
    summary_.train.documents += done.train.documents;
    summary_.train.bytes += done.train.bytes;
    summary_.val.documents += done.val.documents;
    summary_.val.bytes += done.val.bytes;
    summary_.bad_lines += done.bad_lines;
    if (options_.progress) options_.progress(done.block.bytes_consumed, bytes_total_);
}

void Preparation::add_entropies(const std::vector<BlockEncoder>& encoders) {
    std::vector<int64_t> tokens(tokenizer_.vocab_size()), bytes(256);
    for (const BlockEncoder& encoder : encoders) {
        std::transform(tokens.begin(), tokens.end(), encoder.val_token_counts.begin(), tokens.begin(), std::plus<>());
        std::transform(bytes.begin(), bytes.end(), encoder.val_byte_counts.begin(), bytes.begin(), std::plus<>());
    }
    summary_.val_token_entropy = entropy_nats(tokens);
    summary_.val_byte_entropy = entropy_nats(bytes);
}

PrepareSummary Preparation::finish() {
    REQUIRE(summary_.files > 0, "no text in the input: %lld binary and %lld empty files (text must be UTF-8, or of another encoding without NUL bytes)",
            static_cast<long long>(summary_.binary_files), static_cast<long long>(summary_.empty_files));
    const auto documents = static_cast<long long>(summary_.train.documents + summary_.val.documents);
    REQUIRE(documents > 0, "no documents in the input: %lld lines of .jsonl files without a text", static_cast<long long>(summary_.bad_lines));
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

void write_meta(const std::string& path, const PrepareOptions& options, const Tokenizer& tokenizer, const PrepareSummary& summary) {
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
        {"skipped_lines", summary.bad_lines},
        {"train", json_of(summary.train)},
        {"val", json_of(summary.val)},
        {"val_token_entropy_nats", entropy(summary.val_token_entropy)},
        {"val_byte_entropy_nats", entropy(summary.val_byte_entropy)},
    };
    std::ofstream file(path);
    // A path that is not UTF-8 must not stop the run here, at its end.
    file << meta.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << '\n';
    file.close();
    if (file) return;
    const std::string why = reason(errno);
    std::error_code gone;
    fs::remove(path, gone);
    throw Error(message("%s: cannot write: %s", path.c_str(), why.c_str()));
}

}  // namespace

void require_valid(const PrepareOptions& options) {
    REQUIRE(!options.out.empty(), "--out: is empty, must be a folder");
    for (const std::string& input : options.inputs) REQUIRE(!input.empty(), "INPUT: is empty, must be a file or folder");
    REQUIRE(options.val_fraction >= 0 && options.val_fraction < 1, "--val-fraction %g: must be at least 0 and below 1",
            options.val_fraction);
    REQUIRE(options.shard_tokens >= kLeastShardTokens, "--shard-tokens %lld: must be at least %lld, as no sample goes from one shard to the next",
            static_cast<long long>(options.shard_tokens), static_cast<long long>(kLeastShardTokens));
    REQUIRE(options.separator.size() <= 4096, "--document-separator: %zu bytes, must be at most 4096", options.separator.size());
    REQUIRE(options.threads >= 1 && options.threads <= kMostThreads, "--threads %d: must be 1 to %d", options.threads, kMostThreads);
    parse_extensions(options.extensions);
}

PrepareSummary prepare_shards(const PrepareOptions& options, const Tokenizer& tokenizer) {
    require_valid(options);
    int64_t other_files = 0;
    auto files = find_source_files(options.inputs, parse_extensions(options.extensions), &other_files);
    REQUIRE(!files.empty(), "%s%s: no files with the extensions %.40s%s, %lld with others: see --extensions, or name files", options.inputs[0].c_str(),
            options.inputs.size() > 1 ? " and the other inputs" : "", options.extensions.c_str(), options.extensions.size() > 40 ? "..." : "",
            static_cast<long long>(other_files));

    const OutputFolder folder(options.out);
    REQUIRE(options.overwrite || earlier_output(options.out).empty(),
            "--out %s: holds shards already: choose another folder, or replace them with --overwrite", options.out.c_str());

    Preparation preparation(options, tokenizer);
    preparation.add_files(std::move(files));
    PrepareSummary summary = preparation.finish();
    summary.other_files = other_files;
    const std::string meta = options.out + "/meta.json", temporary = meta + ".tmp";
    write_meta(temporary, options, tokenizer, summary);  // before anything is replaced: the disk may be full
    for (const fs::path& old : earlier_output(options.out)) fs::remove(old);
    preparation.publish();
    fs::rename(temporary, meta);  // last: its presence says that the folder is complete
    return summary;
}
