// data/inspect: what a token file holds: its header, statistics of its tokens, and samples of its text.
//
//   data/inspect shards/mine              every shard of a folder
//   data/inspect shards/mine/val_000000.bin --samples 5 --sample-tokens 100
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>

#include "data/hash.h"
#include "data/loader.h"
#include "data/program.h"
#include "data/shard_statistics.h"
#include "data/tokenizer.h"

namespace {

struct CommandLine {
    std::vector<std::string> inputs;
    int samples = 3, sample_tokens = 60;
    uint64_t seed = 0;
    std::string gpt2_ranks;  // empty: where make_tokenizer looks
};

void define_options(CLI::App& app, CommandLine& line) {
    app.option_defaults()->always_capture_default();
    app.add_option("INPUT", line.inputs, "token files, and folders of them")->required();
    app.add_option("--samples", line.samples, "texts to show of each file")->check(whole_number(0, 1000));
    app.add_option("--sample-tokens", line.sample_tokens, "tokens of a text")->check(whole_number(1, 100000));
    app.add_option("--seed", line.seed, "of the choice of texts")->check(whole_number(uint64_t{0}, std::numeric_limits<uint64_t>::max()));
    app.add_option("--gpt2-ranks", line.gpt2_ranks, "GPT-2's byte-pair ranks (empty: deps/gpt2.tiktoken here or where the program was built, as `make data-gpt2-ranks` brings it)");
}

// One line: line ends as \n, what a terminal would act on as \xNN.
std::string printable(const std::string& text) {
    std::string line;
    for (const char c : text) {
        if (c == '\n')
            line += "\\n";
        else if (static_cast<uint8_t>(c) < ' ' || c == 0x7f)
            line += message("\\x%02x", static_cast<uint8_t>(c));
        else
            line += c;
    }
    return line;
}

// The tokenizer that the header names, if it is known and its files are here.
class Decoder {
  public:
    Decoder(TokenizerId id, const std::string& gpt2_ranks) {
        if (id == TokenizerId::unknown) return;
        try {
            tokenizer_ = make_tokenizer(tokenizer_name(id), gpt2_ranks);
        } catch (const Error& error) {
            std::printf("text       | not shown: %s\n", error.what());
        }
    }

    // Tokens without a known text, and a foreign vocabulary's, as <id>.
    std::string text(std::span<const int32_t> tokens) const {
        std::string text;
        for (const int32_t token : tokens) {
            const auto id = static_cast<uint32_t>(token);
            text += tokenizer_ && id < tokenizer_->vocab_size() ? tokenizer_->decode({&id, 1}) : message("<%u>", id);
        }
        return text;
    }

    std::vector<uint32_t> token_bytes() const {
        std::vector<uint32_t> bytes(tokenizer_ ? tokenizer_->vocab_size() : 0);
        for (uint32_t id = 0; id < bytes.size(); ++id) bytes[id] = static_cast<uint32_t>(tokenizer_->decode({&id, 1}).size());
        return bytes;
    }

  private:
    std::unique_ptr<Tokenizer> tokenizer_;
};

void print_header(const TokenFile& file) {
    const TokenFileInfo& info = file.info();
    std::printf("%s\n", file.path().c_str());
    std::printf("header     | %lld tokens of %d bits | vocabulary %d%s | tokenizer %s | end of text %d%s\n",
                static_cast<long long>(file.size()), 8 * file.bytes_per_token(), info.vocab_size,
                info.vocab_size == 0 ? " (not said)" : "", tokenizer_name(info.tokenizer), info.end_of_text,
                info.end_of_text == 0 ? " (not said)" : "");
}

void print_statistics(const ShardStatistics& s, const Decoder& decoder) {
    std::printf("tokens     | %lld different | largest %u | entropy %.4f nats", static_cast<long long>(s.distinct_tokens), s.largest_token,
                s.entropy_nats);
    if (s.text_bytes > 0)
        std::printf(" | %lld bytes of text | %.3f bytes/token", static_cast<long long>(s.text_bytes),
                    static_cast<double>(s.text_bytes) / static_cast<double>(s.tokens));
    std::printf("\n");
    if (s.documents > 0)
        std::printf("documents  | %lld begin here | tokens: shortest %lld, median %lld, longest %lld\n", static_cast<long long>(s.documents),
                    static_cast<long long>(s.shortest_document), static_cast<long long>(s.median_document),
                    static_cast<long long>(s.longest_document));
    std::printf("frequent   |");
    for (const auto& [token, count] : s.most_frequent) {
        const auto id = static_cast<int32_t>(token);
        std::printf(" %u \"%s\" %.1f %%", token, printable(decoder.text({&id, 1})).c_str(),
                    100.0 * static_cast<double>(count) / static_cast<double>(s.tokens));
    }
    std::printf("\n");
}

// A random place, then on to where a document begins, if one does within reach.
int64_t sample_place(const TokenFile& file, uint64_t random) {
    constexpr int64_t kReach = 1 << 16;
    const auto place = static_cast<int64_t>(random % static_cast<uint64_t>(file.size()));
    if (file.info().end_of_text == 0) return place;
    std::vector<int32_t> tokens(static_cast<size_t>(std::min(kReach, file.size() - place)));
    file.read(place, static_cast<int64_t>(tokens.size()), 0, tokens.data());
    const auto found = std::find(tokens.begin(), tokens.end(), file.info().end_of_text);
    return found == tokens.end() ? place : place + (found - tokens.begin());
}

void print_samples(const TokenFile& file, const Decoder& decoder, const CommandLine& line) {
    for (int i = 0; i < line.samples; ++i) {
        const int64_t place = sample_place(file, mix64(mix64(line.seed) + static_cast<uint64_t>(i)));
        std::vector<int32_t> tokens(static_cast<size_t>(std::min<int64_t>(line.sample_tokens, file.size() - place)));
        file.read(place, static_cast<int64_t>(tokens.size()), 0, tokens.data());
        std::printf("at %-8lld| %s\n", static_cast<long long>(place), printable(decoder.text(tokens)).c_str());
    }
}

void inspect(const std::string& path, const CommandLine& line) {
    const TokenFile file(path);
    print_header(file);
    const Decoder decoder(file.info().tokenizer, line.gpt2_ranks);
    print_statistics(shard_statistics(file, decoder.token_bytes()), decoder);
    print_samples(file, decoder, line);
}

void run(const CommandLine& line) {
    for (const std::string& input : line.inputs) {
        if (!std::filesystem::is_directory(input)) {
            inspect(input, line);
            continue;
        }
        for (const std::string& shard : find_shards(input, "")) inspect(shard, line);
    }
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app("Shows what token files hold: header, statistics of the tokens, samples of the text.");
    CommandLine line;
    define_options(app, line);
    return run_program(app, argc, argv, [&] { run(line); });
}
