#include "trainer/run/samples.h"

#include "data/printable.h"
#include "kernels/common/check.h"
#include "trainer/generate.h"

std::unique_ptr<Tokenizer> text_tokenizer(const std::string& name, const Config& config, const char* option) {
    REQUIRE(name != tokenizer_name(TokenizerId::unknown), "%s: needs a tokenizer, and the training data does not say which one made it: use shards of data/prepare", option);
    return make_tokenizer(name, config.gpt2_ranks);
}

void require_same_tokenizer(const TokenizerOf& a, const TokenizerOf& b) {
    const std::string unknown = tokenizer_name(TokenizerId::unknown);
    REQUIRE(a.name == b.name || a.name == unknown || b.name == unknown, "%s: of tokenizer %s, but %s is of tokenizer %s: the same numbers are other texts there",
            a.whose.c_str(), a.name.c_str(), b.whose.c_str(), b.name.c_str());
}

void require_vocabulary(const Tokenizer& tokenizer, const ModelSpec& model) {
    REQUIRE(int(tokenizer.vocab_size()) <= model.vocab_size, "tokenizer %s has %u tokens, the model %d: train it with --vocab-size %u or more, or on data of another tokenizer",
            tokenizer.name(), tokenizer.vocab_size(), model.vocab_size, tokenizer.vocab_size());
}

Samples::Samples(const Config& config, const EngineOptions& shape, std::unique_ptr<Tokenizer> tokenizer)
    : config_(config), shape_(shape), tokenizer_(std::move(tokenizer)), prompt_{int(tokenizer_->end_of_text())} {
    require_vocabulary(*tokenizer_, shape_.model);
    std::vector<uint32_t> ids;
    tokenizer_->encode(config_.prompt, ids);
    prompt_.insert(prompt_.end(), ids.begin(), ids.end());
}

std::vector<std::string> Samples::run(Engine& engine, int64_t step, Communicator& ranks, const Calls& calls) const {
    const size_t samples = size_t(config_.samples);
    std::vector<PrintableStream> streams(samples);
    std::vector<std::string> texts(samples);
    const auto deliver = [&](size_t sample, const std::string& piece) {
        if (piece.empty()) return;
        texts[sample] += piece;
        if (calls.on_text) calls.on_text(int(sample), piece);
    };
    const GenerateOptions options{.shape = shape_,
                                  .sampler = {.temperature = config_.temperature, .top_k = config_.top_k, .seed = config_.seed},
                                  .samples = config_.samples, .max_tokens = config_.max_tokens,
                                  .vocab_size = int(tokenizer_->vocab_size()), .stop_token = int(tokenizer_->end_of_text()), .step = step,
                                  .agree = [&](std::span<int> tokens) { ranks.broadcast(tokens.data(), int64_t(tokens.size_bytes()), 0); },
                                  .before_each = calls.before_each};
    generate(engine, prompt_, options, [&](int sample, int token) {
        const uint32_t id = uint32_t(token);
        deliver(size_t(sample), streams[size_t(sample)].push(tokenizer_->decode({&id, 1})));
    });
    for (size_t sample = 0; sample < samples; ++sample) deliver(sample, streams[sample].finish());
    return texts;
}
