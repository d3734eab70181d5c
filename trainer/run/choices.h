// --multiple-choice: questions from a file, as tokens, ready to be asked again and again.
#pragma once
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "trainer/config.h"
#include "trainer/multiple_choice.h"

class Choices {
  public:
    // `shape`: of the engine that run() will get. A space goes between context and ending where neither has one.
    Choices(const std::string& path, const EngineOptions& shape, Tokenizer& tokenizer);
    ChoiceResult run(Engine& engine, const BeforeEach& before_each = {}) const { return choose(engine, shape_, questions_, before_each); }

  private:
    EngineOptions shape_;
    std::vector<ChoiceQuestion> questions_;
};
