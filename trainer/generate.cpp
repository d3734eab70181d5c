#include "trainer/generate.h"

#include <algorithm>
#include <vector>

#include "kernels/common/check.h"

namespace {

struct Sample {
    std::vector<int> context;
    bool stopped = false;
};

// The end of the context that fits, repeated to fill the row. Returns the position of its last token.
int fill_row(const std::vector<int>& context, std::span<int> row) {
    const size_t used = std::min(context.size(), row.size());
    const auto first = context.end() - std::ptrdiff_t(used);
    for (size_t t = 0; t < row.size(); ++t) row[t] = first[std::ptrdiff_t(t % used)];
    return int(used) - 1;
}

}  // namespace

void generate(Engine& engine, std::span<const int> prompt, const GenerateOptions& o, const std::function<void(int, int)>& on_token) {
    const int B = o.shape.micro_batch, T = o.shape.seq_len, V = o.shape.model.vocab_size;
    const size_t drawn = o.vocab_size > 0 ? size_t(std::min(o.vocab_size, V)) : size_t(V);
    REQUIRE(!prompt.empty(), "generate: the prompt has no token");
    REQUIRE(o.samples >= 1 && o.samples <= o.shape.logit_rows, "generate: %d samples, the engine was made for 1 to %d", o.samples, o.shape.logit_rows);
    std::vector<Sample> samples(size_t(o.samples), Sample{{prompt.begin(), prompt.end()}});
    std::vector<int> inputs(size_t(B) * size_t(T)), positions(size_t(o.samples)), tokens(size_t(o.samples));
    std::vector<float> logits(size_t(o.samples) * size_t(V));
    for (int position = 0; position < o.max_tokens; ++position) {
        if (std::all_of(samples.begin(), samples.end(), [](const Sample& s) { return s.stopped; })) return;
        if (o.before_each) o.before_each();
        for (int row = 0; row < B; ++row) {
            const int i = row % o.samples;
            const int last = fill_row(samples[size_t(i)].context, std::span(inputs).subspan(size_t(row) * size_t(T), size_t(T)));
            if (row < o.samples) positions[size_t(i)] = row * T + last;
        }
        engine.logits(inputs, positions, logits);
        for (int i = 0; i < o.samples; ++i)
            tokens[size_t(i)] = draw_token(std::span(logits).subspan(size_t(i) * size_t(V), drawn), o.sampler, {o.step, i, position});
        if (o.agree) o.agree(tokens);
        for (int i = 0; i < o.samples; ++i) {
            Sample& sample = samples[size_t(i)];
            const int token = tokens[size_t(i)];
            if (sample.stopped) continue;
            sample.stopped = token == o.stop_token;
            if (sample.stopped) continue;
            sample.context.push_back(token);
            on_token(i, token);
        }
    }
}
