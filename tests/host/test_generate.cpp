// What comes after a text: drawing tokens, continuing a text and choosing an ending, on the reference device.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "kernels/common/check.h"
#include "trainer/generate.h"
#include "trainer/multiple_choice.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Drawing

TEST(DrawToken, GreedyTakesTheLikeliestAndOfEqualOnesTheFirst) {
    const std::vector<float> logits{1, 5, 5, -2};
    EXPECT_EQ(draw_token(logits, {.temperature = 0}, {0, 0, 0}), 1);
    EXPECT_EQ(draw_token(logits, {.temperature = 1, .top_k = 1}, {0, 0, 0}), 1);
}

TEST(DrawToken, FrequenciesFollowTheSoftmax) {
    const std::vector<float> logits{0, std::log(2.0f), std::log(5.0f), -std::numeric_limits<float>::infinity()};
    const int n = 40000;
    for (const float temperature : {1.0f, 0.5f}) {
        std::map<int, int> counts;
        for (int position = 0; position < n; ++position) ++counts[draw_token(logits, {.temperature = temperature, .seed = 3}, {0, 0, position})];
        const double power = 1 / double(temperature), sum = 1 + std::pow(2, power) + std::pow(5, power);
        for (const auto& [token, weight] : std::map<int, double>{{0, 1}, {1, std::pow(2, power)}, {2, std::pow(5, power)}}) {
            const double p = weight / sum;
            EXPECT_NEAR(counts[token], n * p, 5 * std::sqrt(n * p * (1 - p))) << "token " << token << " at " << temperature;
        }
        EXPECT_EQ(counts.count(3), 0u);
    }
}

TEST(DrawToken, TopKCutsTheTail) {
    const std::vector<float> logits{0, 1, 2, 3, 2.5f};
    std::map<int, int> counts;
    for (int position = 0; position < 2000; ++position) ++counts[draw_token(logits, {.temperature = 2, .top_k = 3}, {0, 0, position})];
    EXPECT_EQ(counts.size(), 3u);
    for (const int token : {2, 3, 4}) EXPECT_GT(counts[token], 0) << token;
    EXPECT_NO_THROW(draw_token(logits, {.top_k = 100}, {0, 0, 0}));
}

TEST(DrawToken, EveryPartOfTheKeyChangesTheDraws) {
    const std::vector<float> logits(4096, 0.0f);
    const auto draw = [&](uint64_t seed, const DrawKey& key) { return draw_token(logits, {.seed = seed}, key); };
    const DrawKey key{100, 1, 7};
    EXPECT_EQ(draw(5, key), draw(5, key));
    for (const int other : {draw(6, key), draw(5ull + (1ull << 32), key), draw(5, {101, 1, 7}), draw(5, {100, 2, 7}), draw(5, {100, 1, 8})})
        EXPECT_NE(other, draw(5, key));
}

TEST(DrawToken, RefusesWhatIsNotFinite) {
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    for (const std::vector<float>& logits : {std::vector<float>{0, nan}, {inf, 0}, {-inf, -inf}, {}})
        EXPECT_THROW(draw_token(logits, {}, {0, 0, 0}), Error);
}

// ---------------------------------------------------------------------------------------------------------------------
// The reference device

EngineOptions options_of(const char* recipe, int B) {
    return {.model = {.name = "test", .n_layers = 2, .dim = 32, .n_heads = 2, .ffn_dim = 64, .vocab_size = 50, .seq_len = 16},
            .recipe = find_recipe(recipe), .micro_batch = B, .seq_len = 16, .micro_batches_per_step = 1,
            .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0, .max_grad_norm = 0}, .logit_rows = B};
}

struct Model {
    EngineOptions options;
    std::unique_ptr<Engine> engine;
    Model(const char* recipe, int B) : options(options_of(recipe, B)), engine(make_reference_engine(options)) {
        TrainState state = initial_state(make_parameters(options.model), options.model, 11);
        for (float& x : state.params) x *= 8;  // far from uniform predictions
        engine->load(state);
    }
};

std::vector<int> some_tokens(size_t n, int first) {
    std::vector<int> tokens(n);
    for (size_t i = 0; i < n; ++i) tokens[i] = int((i * 17 + size_t(first)) % 50);
    return tokens;
}

double log_softmax(std::span<const float> logits, int token) {
    double largest = -INFINITY, sum = 0;
    for (const float x : logits) largest = std::max(largest, double(x));
    for (const float x : logits) sum += std::exp(double(x) - largest);
    return double(logits[size_t(token)]) - largest - std::log(sum);
}

TEST(Engine, LogitsAgreeWithTheLosses) {
    for (const char* recipe : {"f32", "bf16", "tensorwise"}) {
        Model m(recipe, 3);
        const std::vector<int> inputs = some_tokens(48, 4), targets = some_tokens(48, 9), positions{0, 21, 47};
        std::vector<float> losses(48), logits(3 * 50);
        m.engine->token_losses(inputs, targets, losses);
        m.engine->logits(inputs, positions, logits);
        double sum = 0;
        for (const float loss : losses) sum += double(loss);
        EXPECT_NEAR(m.engine->evaluate(inputs, targets), sum, 1e-3);
        for (size_t i = 0; i < positions.size(); ++i) {
            const size_t at = size_t(positions[i]);
            EXPECT_NEAR(-log_softmax(std::span(logits).subspan(i * 50, 50), targets[at]), losses[at], 2e-5) << recipe << " position " << at;
        }
    }
}

TEST(Engine, MaskedTokensHaveNoLoss) {
    Model m("bf16", 1);
    std::vector<int> targets = some_tokens(16, 9);
    for (size_t i = 0; i < 16; i += 3) targets[i] = -1;
    std::vector<float> losses(16);
    m.engine->token_losses(some_tokens(16, 4), targets, losses);
    for (size_t i = 0; i < 16; ++i) EXPECT_EQ(losses[i] == 0, i % 3 == 0) << i;
}

TEST(Engine, LooksLeaveTheTrainingStateAlone) {
    for (const char* recipe : {"f32", "tensorwise"}) {
        const auto run = [&](bool looks) {
            Model m(recipe, 2);
            const std::vector<int> inputs = some_tokens(32, 1), targets = some_tokens(32, 18);
            std::vector<float> norms;
            for (int step = 0; step < 4; ++step) {
                m.engine->enqueue_step({.step = step, .learning_rate = 1e-2f, .inverse_valid_tokens = 1 / 32.0f}, inputs, targets);
                const StepResult result = m.engine->collect();
                norms.push_back(result.grad_norm), norms.push_back(result.loss_sum);
                if (!looks) continue;
                std::vector<float> losses(32), logits(50);
                m.engine->token_losses(targets, inputs, losses);
                m.engine->logits(targets, std::vector<int>{5}, logits);
            }
            return norms;
        };
        EXPECT_EQ(run(true), run(false)) << recipe;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Continuing a text

using Texts = std::vector<std::vector<int>>;

Texts continuations(Model& m, const std::vector<int>& prompt, GenerateOptions options) {
    options.shape = m.options;
    Texts texts(size_t(options.samples));
    generate(*m.engine, prompt, options, [&](int sample, int token) { texts.at(size_t(sample)).push_back(token); });
    return texts;
}

TEST(Generate, EachTokenIsDrawnFromTheLogitsAfterTheOnesBefore) {
    Model m("f32", 1);
    const std::vector<int> prompt = some_tokens(5, 2);
    const SamplerOptions sampler{.temperature = 1.5f, .top_k = 20, .seed = 9};
    const Texts texts = continuations(m, prompt, {.shape = {}, .sampler = sampler, .max_tokens = 30, .step = 77});
    ASSERT_EQ(texts[0].size(), 30u);
    std::vector<int> context = prompt;
    std::vector<float> logits(50);
    for (int position = 0; position < 30; ++position) {
        const size_t used = std::min<size_t>(16, context.size());  // the window slides
        std::vector<int> inputs(16, 0);  // what stands behind the last token cannot matter: attention is causal
        std::copy(context.end() - std::ptrdiff_t(used), context.end(), inputs.begin());
        m.engine->logits(inputs, std::vector<int>{int(used) - 1}, logits);
        ASSERT_EQ(texts[0][size_t(position)], draw_token(logits, sampler, {77, 0, position})) << position;
        context.push_back(texts[0][size_t(position)]);
    }
}

TEST(Generate, SamplesDoNotDependOnEachOtherOrOnTheMicroBatch) {
    Model one("f32", 1), four("f32", 4);
    const GenerateOptions options{.shape = {}, .sampler = {.seed = 4}, .samples = 3, .max_tokens = 12};
    const Texts three = continuations(four, {7, 8, 9}, options);
    EXPECT_NE(three[0], three[1]);
    GenerateOptions alone = options;
    alone.samples = 1;
    EXPECT_EQ(continuations(one, {7, 8, 9}, alone)[0], three[0]);
    EXPECT_EQ(continuations(four, {7, 8, 9}, alone)[0], three[0]);
}

TEST(Generate, EndsAtTheStopToken) {
    Model m("f32", 2);
    GenerateOptions options{.shape = {}, .sampler = {.seed = 4}, .samples = 2, .max_tokens = 12};
    const Texts whole = continuations(m, {7, 8, 9}, options);
    options.stop_token = whole[0][5];
    const size_t first = size_t(std::find(whole[0].begin(), whole[0].end(), options.stop_token) - whole[0].begin());
    const Texts cut = continuations(m, {7, 8, 9}, options);
    EXPECT_EQ(cut[0], std::vector<int>(whole[0].begin(), whole[0].begin() + std::ptrdiff_t(first)));
}

TEST(Generate, Refuses) {
    Model m("f32", 2);
    EXPECT_THROW(continuations(m, {}, {.shape = {}, .sampler = {}, .max_tokens = 1}), Error);
    EXPECT_THROW(continuations(m, {1}, {.shape = {}, .sampler = {}, .samples = 3, .max_tokens = 1}), Error);
    EXPECT_THROW(continuations(m, {50}, {.shape = {}, .sampler = {}, .max_tokens = 1}), Error);  // not in the vocabulary
}

// ---------------------------------------------------------------------------------------------------------------------
// Choosing an ending

Ending ending_of(std::vector<int> context, std::vector<int> ending) {
    const auto first = int64_t(context.size());
    context.insert(context.end(), ending.begin(), ending.end());
    return {.tokens = std::move(context), .first = first, .bytes = int64_t(ending.size()) * 3};
}

TEST(MultipleChoice, LikelihoodsAreThoseOfTheLogits) {
    Model m("f32", 2);
    // Five endings, so that the last micro-batch is part; one that fills the row to its last place; one with a long context.
    const std::vector<Ending> endings{ending_of({1, 2, 3}, {4, 5}), ending_of({1, 2, 3}, {6}), ending_of({9}, some_tokens(16, 3)),
                                      ending_of(some_tokens(40, 5), {7, 8, 9}), ending_of({0}, {0, 0, 0})};
    const std::vector<double> found = log_likelihoods(*m.engine, m.options, endings);
    ASSERT_EQ(found.size(), endings.size());
    for (size_t i = 0; i < endings.size(); ++i) {
        std::vector<int> tokens = endings[i].tokens;
        const size_t dropped = tokens.size() > 17 ? tokens.size() - 17 : 0;
        tokens.erase(tokens.begin(), tokens.begin() + std::ptrdiff_t(dropped));
        double expected = 0;
        for (size_t next = size_t(endings[i].first) - dropped; next < tokens.size(); ++next) {
            std::vector<int> inputs(32, 0);
            std::copy(tokens.begin(), tokens.begin() + std::ptrdiff_t(next), inputs.begin());
            std::vector<float> logits(50);
            m.engine->logits(inputs, std::vector<int>{int(next) - 1}, logits);
            expected += log_softmax(logits, tokens[next]);
        }
        EXPECT_NEAR(found[i], expected, 1e-4) << i;
    }
}

TEST(MultipleChoice, EveryRecipeRunsInTheTrainingShape) {
    for (const char* recipe : {"bf16", "tensorwise"}) {
        Model m(recipe, 4);
        for (const double x : log_likelihoods(*m.engine, m.options, std::vector<Ending>{ending_of({1, 2}, {3}), ending_of({1, 2}, {4, 5})})) EXPECT_LT(x, 0);
    }
}

TEST(MultipleChoice, NormalizationDecides) {
    const std::vector<Ending> endings{{.tokens = {0, 1}, .first = 1, .bytes = 9}, {.tokens = {0, 1, 2, 3}, .first = 1, .bytes = 3}, {.tokens = {0, 1, 2}, .first = 1, .bytes = 1}};
    const std::vector<double> likelihoods{-3.0, -6.0, -3.5};
    EXPECT_EQ(likeliest_ending(endings, likelihoods, Normalization::none), 0);
    EXPECT_EQ(likeliest_ending(endings, likelihoods, Normalization::tokens), 2);  // -3, -2, -1.75
    EXPECT_EQ(likeliest_ending(endings, likelihoods, Normalization::bytes), 0);   // -1/3, -2, -3.5
}

TEST(MultipleChoice, AccuracyAndStandardError) {
    Model m("f32", 2);
    const std::vector<Ending> endings{ending_of({1, 2, 3}, {4, 5}), ending_of({1, 2, 3}, {6, 7})};
    const std::vector<double> likelihoods = log_likelihoods(*m.engine, m.options, endings);
    const int right = likelihoods[0] >= likelihoods[1] ? 0 : 1;
    const std::vector<ChoiceQuestion> questions{{endings, right}, {endings, right}, {endings, right}, {endings, 1 - right}};
    const ChoiceResult result = choose(*m.engine, m.options, questions);
    EXPECT_EQ(result.questions, 4);
    for (const Normalization by : kNormalizations) {
        EXPECT_DOUBLE_EQ(result[by].value, 0.75);
        EXPECT_DOUBLE_EQ(result[by].standard_error, 0.25);
    }
}

// By an exception, between the passes: what a stop of training does.
TEST(Looks, CanBeAbandoned) {
    struct Abandoned {};
    Model m("f32", 2);
    const std::vector<Ending> endings(9, ending_of({1, 2}, {3}));
    for (const int passes : {0, 1, 3}) {
        int calls = 0;
        const auto before_each = [&] {
            if (calls++ == passes) throw Abandoned();
        };
        EXPECT_THROW(log_likelihoods(*m.engine, m.options, endings, before_each), Abandoned);
        EXPECT_EQ(calls, passes + 1);
        calls = 0;
        GenerateOptions options{.shape = m.options, .sampler = {}, .samples = 2, .max_tokens = 12, .before_each = before_each};
        int tokens = 0;
        EXPECT_THROW(generate(*m.engine, std::vector<int>{7}, options, [&](int, int) { ++tokens; }), Abandoned);
        EXPECT_EQ(tokens, 2 * passes);
    }
}

TEST(MultipleChoice, AnEndingThatDoesNotFitIsAnError) {
    Model m("f32", 1);
    EXPECT_THROW(log_likelihoods(*m.engine, m.options, std::vector<Ending>{ending_of({1}, some_tokens(17, 3))}), Error);
}

}  // namespace
