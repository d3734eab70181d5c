#include "trainer/run/choices.h"

#include <string_view>

#include "data/questions.h"
#include "kernels/common/check.h"
#include "trainer/run/samples.h"

namespace {

std::vector<int> tokens_of(std::string_view text, Tokenizer& tokenizer) {
    std::vector<uint32_t> ids;
    tokenizer.encode(text, ids);
    return {ids.begin(), ids.end()};
}

bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

}  // namespace

Choices::Choices(const std::string& path, const EngineOptions& shape, Tokenizer& tokenizer) : shape_(shape) {
    require_vocabulary(tokenizer, shape.model);
    for (const Question& question : read_questions(path)) {
        ChoiceQuestion q{.endings = {}, .label = question.label};
        std::vector<int> context = tokens_of(question.context, tokenizer);
        if (context.empty()) context.push_back(int(tokenizer.end_of_text()));
        for (const std::string& text : question.endings) {
            const bool apart = question.context.empty() || is_space(question.context.back()) || is_space(text.front());
            const std::vector<int> ending = tokens_of(apart ? text : " " + text, tokenizer);
            REQUIRE(int64_t(ending.size()) <= shape.seq_len, "--multiple-choice %s: an ending has %zu tokens, the model's context %d: \"%.60s...\"", path.c_str(),
                    ending.size(), shape.seq_len, text.c_str());
            q.endings.push_back({.tokens = context, .first = int64_t(context.size()), .bytes = int64_t(text.size())});
            q.endings.back().tokens.insert(q.endings.back().tokens.end(), ending.begin(), ending.end());
        }
        questions_.push_back(std::move(q));
    }
}
