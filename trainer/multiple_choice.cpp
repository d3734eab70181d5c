#include "trainer/multiple_choice.h"

#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"

namespace {

struct Row {
    std::span<int> inputs, targets;
};

// The end that fits, the row filled up with a repetition (generate.h says why), only the ending's tokens unmasked.
void fill_row(const Ending& ending, const Row& row) {
    const int64_t T = int64_t(row.inputs.size()), n = int64_t(ending.tokens.size());
    const int64_t dropped = std::max<int64_t>(0, n - 1 - T), used = n - 1 - dropped;
    REQUIRE(ending.first >= 1 && ending.first < n, "an ending begins at token %lld of %lld", (long long)ending.first, (long long)n);
    REQUIRE(dropped < ending.first, "an ending of %lld tokens: the model's context is %lld", (long long)(n - ending.first), (long long)T);
    for (int64_t t = 0; t < T; ++t) {
        row.inputs[size_t(t)] = ending.tokens[size_t(dropped + t % used)];
        const int64_t next = dropped + t + 1;
        row.targets[size_t(t)] = next >= ending.first && next < n ? ending.tokens[size_t(next)] : -1;
    }
}

}  // namespace

std::vector<double> log_likelihoods(Engine& engine, const EngineOptions& shape, std::span<const Ending> endings, const BeforeEach& before_each) {
    const size_t B = size_t(shape.micro_batch), T = size_t(shape.seq_len);
    std::vector<int> inputs(B * T), targets(B * T);
    std::vector<float> losses(B * T);
    std::vector<double> result;
    for (size_t first = 0; first < endings.size(); first += B) {
        if (before_each) before_each();
        const size_t rows = std::min(B, endings.size() - first);
        for (size_t row = 0; row < B; ++row)  // rows behind the last ending repeat the first ones
            fill_row(endings[first + row % rows], {std::span(inputs).subspan(row * T, T), std::span(targets).subspan(row * T, T)});
        engine.token_losses(inputs, targets, losses);
        for (size_t row = 0; row < rows; ++row) {
            double sum = 0;
            for (size_t t = 0; t < T; ++t) sum += double(losses[row * T + t]);
            result.push_back(-sum);
        }
    }
    return result;
}

int likeliest_ending(std::span<const Ending> endings, std::span<const double> log_likelihoods, Normalization by) {
    const auto score = [&](size_t i) {
        const double length = by == Normalization::tokens ? double(int64_t(endings[i].tokens.size()) - endings[i].first)
                            : by == Normalization::bytes  ? double(endings[i].bytes) : 1.0;
        return log_likelihoods[i] / length;
    };
    size_t best = 0;
    for (size_t i = 1; i < endings.size(); ++i)
        if (score(i) > score(best)) best = i;
    return int(best);
}

ChoiceResult choose(Engine& engine, const EngineOptions& shape, std::span<const ChoiceQuestion> questions, const BeforeEach& before_each) {
    REQUIRE(!questions.empty(), "multiple choice: no question");
    std::vector<Ending> all;
    for (const ChoiceQuestion& q : questions) all.insert(all.end(), q.endings.begin(), q.endings.end());
    const std::vector<double> likelihoods = log_likelihoods(engine, shape, all, before_each);
    ChoiceResult result{.questions = int64_t(questions.size()), .of = {}};
    const double n = double(questions.size());
    for (const Normalization by : kNormalizations) {
        int64_t right = 0;
        size_t first = 0;
        for (const ChoiceQuestion& q : questions) {
            right += likeliest_ending(q.endings, std::span(likelihoods).subspan(first, q.endings.size()), by) == q.label;
            first += q.endings.size();
        }
        const double p = double(right) / n;
        result.of[int(by)] = {p, n > 1 ? std::sqrt(p * (1 - p) / (n - 1)) : 0};
    }
    return result;
}

std::string format_choices(const ChoiceResult& result) {
    const auto percent = [&](Normalization n) { return message("%.2f +- %.2f %%", 100 * result[n].value, 100 * result[n].standard_error); };
    return message("%lld questions | accuracy %s | by token %s | by byte %s", (long long)result.questions, percent(Normalization::none).c_str(),
                   percent(Normalization::tokens).c_str(), percent(Normalization::bytes).c_str());
}
