// data/prepare: text files and folders -> shards of tokens. FORMAT.md describes what it writes.
//
//   data/prepare --out shards/cuda_headers --tokenizer bytes /usr/local/cuda/include
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <thread>

#include "data/corpus.h"
#include "data/prepare_shards.h"
#include "data/program.h"

namespace {

struct CommandLine {
    PrepareOptions prepare;
    std::string tokenizer = "bytes";
    std::string gpt2_ranks;  // empty: where make_tokenizer looks
};

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
double megabytes(int64_t bytes) { return static_cast<double>(bytes) / 1e6; }

void define_options(CLI::App& app, CommandLine& line) {
    PrepareOptions& prepare = line.prepare;
    prepare.extensions = kTextExtensions;
    prepare.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    app.option_defaults()->always_capture_default();
    app.add_option("INPUT", prepare.inputs, "text files, .jsonl files, either of them as .gz or .zst; and folders to search for such")->required();
    app.add_option("--out", prepare.out, "folder for the shards and meta.json")->required();
    app.add_option("--tokenizer", line.tokenizer, "bytes or gpt2");
    app.add_option("--gpt2-ranks", line.gpt2_ranks, "GPT-2's byte-pair ranks (empty: deps/gpt2.tiktoken here or where the program was built, as `make data-gpt2-ranks` brings it), for --tokenizer gpt2");
    app.add_option("--val-fraction", prepare.val_fraction, "part of the documents for validation, chosen by name");
    app.add_option("--shard-tokens", prepare.shard_tokens, "most tokens of one shard: no sample goes from one to the next")
        ->check(whole_number(kLeastShardTokens, std::numeric_limits<int64_t>::max()));
    app.add_option("--extensions", prepare.extensions, "of files in folders; \"none\": files without one");
    app.add_option("--document-separator", prepare.separator,
                   "text between the documents of one file, e.g. \"<|endoftext|>\"; empty: one document a file");
    app.add_option("--text-field", prepare.text_field, "member of the objects of .jsonl files that is the document");
    app.add_flag("--skip-bad-lines", prepare.skip_bad_lines, "leave out and count .jsonl lines without that text");
    app.add_option("--threads", prepare.threads, "does not change the output")->check(whole_number(1, kMostThreads));
    app.add_flag("--overwrite", prepare.overwrite, "replace the shards in --out");
}

// A bar on a terminal; in a file a line every ten seconds.
class Progress {
  public:
    explicit Progress(bool terminal) : terminal_(terminal) {}
    ~Progress() {
        if (terminal_) std::fputs("\r\x1b[K", stderr);
    }

    void show(int64_t done, int64_t total) {
        const double seconds = seconds_since(start_), fraction = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1;
        if (seconds_since(shown_) < (terminal_ ? 0.1 : 10)) return;
        shown_ = Clock::now();
        const std::string text = message("%3.0f %% | %.1f of %.1f MB | %.1f MB/s | %.0f s left", 100 * fraction, megabytes(done),
                                         megabytes(total), megabytes(done) / seconds, seconds * (1 - fraction) / std::max(fraction, 1e-9));
        if (!terminal_) {
            std::fprintf(stderr, "prepare | %s\n", text.c_str());
            return;
        }
        constexpr size_t kWidth = 30;
        const auto filled = static_cast<size_t>(std::min(fraction, 1.0) * kWidth);
        std::fprintf(stderr, "\r[%s%s] %s\x1b[K", std::string(filled, '=').c_str(), std::string(kWidth - filled, ' ').c_str(), text.c_str());
    }

  private:
    bool terminal_;
    Clock::time_point start_ = Clock::now(), shown_ = start_;
};

void print_split(const char* name, const SplitCounts& counts) {
    std::printf("%-5s | %lld documents | %lld bytes | %lld tokens | %.3f bytes/token | %lld shards\n", name,
                static_cast<long long>(counts.documents), static_cast<long long>(counts.bytes),
                static_cast<long long>(counts.tokens),
                static_cast<double>(counts.bytes) / static_cast<double>(std::max<int64_t>(1, counts.tokens)),
                static_cast<long long>(counts.shards));
}

void print_summary(const CommandLine& line, const PrepareSummary& summary, double seconds) {
    std::printf("files | %lld taken | skipped: %lld binary, %lld empty, %lld duplicates\n",
                static_cast<long long>(summary.files), static_cast<long long>(summary.binary_files),
                static_cast<long long>(summary.empty_files), static_cast<long long>(summary.duplicate_files));
    if (summary.other_files > 0)
        std::printf("other | %lld files of other extensions were left out; --extensions LIST or naming a file takes them\n",
                    static_cast<long long>(summary.other_files));
    if (summary.bad_lines > 0) std::printf("lines | %lld without a text skipped\n", static_cast<long long>(summary.bad_lines));
    print_split("train", summary.train);
    print_split("val", summary.val);
    if (summary.val.tokens > 0)
        std::printf("val entropy | %.4f nats/token | %.4f nats/byte (unigram)\n", summary.val_token_entropy,
                    summary.val_byte_entropy);
    std::printf("%s | tokenizer %s | %.2f s | %.1f MB/s\n", line.prepare.out.c_str(), line.tokenizer.c_str(), seconds,
                megabytes(summary.train.bytes + summary.val.bytes) / seconds);
}

PrepareSummary prepare_with_progress(CommandLine& line) {
    Progress progress(isatty(STDERR_FILENO) == 1);
    line.prepare.progress = [&](int64_t done, int64_t total) { progress.show(done, total); };
    require_valid(line.prepare);
    const auto tokenizer = make_tokenizer(line.tokenizer, line.gpt2_ranks);
    return prepare_shards(line.prepare, *tokenizer);
}

void run(CommandLine& line) {
    const auto start = Clock::now();
    const PrepareSummary summary = prepare_with_progress(line);
    print_summary(line, summary, seconds_since(start));
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Turns text into shards of tokens: one document a file, end-of-text before each document.");
    CommandLine line;
    define_options(app, line);
    return run_program(app, argc, argv, [&] { run(line); });
}
