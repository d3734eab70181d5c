// How likely a model finds the endings of a text, and how often the likeliest is the right one.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "trainer/engine.h"

// A context and one ending, as tokens.
struct Ending {
    std::vector<int> tokens;  // context, then ending
    int64_t first;            // where the ending begins, at least 1
    int64_t bytes;            // of its text
};

// Called before each micro-batch, if given: it may throw to abandon the rest.
using BeforeEach = std::function<void()>;

// The natural logarithm of the probability of each ending's tokens given all before them, in micro-batches of the engine's
// shape, one ending a row. Contexts lose their beginning where both together do not fit; an ending that alone does not
// fit is an Error.
std::vector<double> log_likelihoods(Engine& engine, const EngineOptions& shape, std::span<const Ending> endings, const BeforeEach& before_each = {});

// What the likelihood is divided by before the endings of a question are compared.
enum class Normalization : uint8_t { none, tokens, bytes };
constexpr Normalization kNormalizations[] = {Normalization::none, Normalization::tokens, Normalization::bytes};

struct ChoiceQuestion {
    std::vector<Ending> endings;
    int label;
};

struct ChoiceResult {
    int64_t questions = 0;
    struct Accuracy {
        double value, standard_error;  // of a proportion, sqrt(p (1 - p) / (n - 1)); 0 for one question
    };
    Accuracy of[3];  // by Normalization
    const Accuracy& operator[](Normalization n) const { return of[int(n)]; }
};

std::string format_choices(const ChoiceResult& result);  // one line

ChoiceResult choose(Engine& engine, const EngineOptions& shape, std::span<const ChoiceQuestion> questions, const BeforeEach& before_each = {});

// The ending with the greatest normalized likelihood; of equal ones the first.
int likeliest_ending(std::span<const Ending> endings, std::span<const double> log_likelihoods, Normalization by);
