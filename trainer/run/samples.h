// Text from a model: samples during training, and --generate.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"
#include "trainer/config.h"
#include "trainer/engine.h"

// An Error that names both, unless their tokenizers are the same or one is not known.
struct TokenizerOf {
    std::string whose, name;  // of data or a checkpoint
};
void require_same_tokenizer(const TokenizerOf& a, const TokenizerOf& b);

// The tokenizer of that name (token_file.h), for text in and out. `option` is what needs it, for the Error when it is unknown.
std::unique_ptr<Tokenizer> text_tokenizer(const std::string& name, const Config& config, const char* option);

// An Error unless the model has every token of it.
void require_vocabulary(const Tokenizer& tokenizer, const ModelSpec& model);

class Samples {
  public:
    // `shape`: of the engine that run() will get, its logit_rows at least --samples.
    Samples(const Config& config, const EngineOptions& shape, std::unique_ptr<Tokenizer> tokenizer);

    // One text a sample, without the prompt. All ranks call it, and get rank 0's texts.
    struct Calls {
        std::function<void(int sample, std::string_view piece)> on_text = {};  // each printable piece as soon as it is there
        std::function<void()> before_each = {};                                // round of tokens; may throw, on all ranks alike
    };
    std::vector<std::string> run(Engine& engine, int64_t step, Communicator& ranks, const Calls& calls) const;

  private:
    const Config& config_;
    EngineOptions shape_;
    std::unique_ptr<Tokenizer> tokenizer_;
    std::vector<int> prompt_;  // end-of-text, as before every document, then the prompt's tokens
};
