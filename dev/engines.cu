// The whole training step on small models: the GPU engine against the reference device, and against itself.
//
// Which planted bug dies where (llmq's and llm.c's are those of shared/reference/peers.md 5.4):
//   match_reference     wrong scale of an FP8 layer's bias gradient (llmq), gradient overwritten instead of accumulated
//                       over micro-batches (llm.c), loss divided by one micro-batch's valid tokens, classifier's tail at
//                       odd vocabularies (llm.c), missing causal mask or score scale, a tied gradient added once only,
//                       T below the context length, padded rows that take part, a second head chunk forgotten
//   (dev/linear.cu)     recipe ignored, E4M3 and E5M2 swapped, a scale inverted or of another tensor: the bound here is too
//                       wide for those (see expected_gradients())
//   steps_match         clipping by the squared norm (llmq), moments fed unclipped gradients, bias correction with the
//                       wrong t, weight decay of norms and biases, epsilon inside the root
//   repeat, eager       races, float atomics, a pointer or scalar frozen in the captured graph, GEMMs picked by timing, the graph
//                       of another position, gradients of the step before that stay in the sum
//   resume              moments, adam_t or skipped steps not saved, copies not rebuilt after load
//   nonfinite           a skipped step that moves weights, moments, adam_t or a scale; a flag that is never cleared; a norm
//                       that overflows unseen
//   evaluation          evaluation that writes gradients or loss of the step (llm.c's False that is true), or another mask
//   copies_follow       FP8 codes, scales or BF16 copies of the weights of an earlier step; an amax that never sinks
//   unquantizable       FP8 where dimensions forbid it; a table that says otherwise
//   split               normalization or accumulation that depends on how a batch is cut
//   masked              a masked micro-batch that adds NaN (zero amax) or counts as valid
//   confident           loss through log(probability), which underflows (llm.c)
//   in_flight           a batch or result of a step overwritten by the next one
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>

#include "dev/harness.h"
#include "trainer/engine.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Cases

struct Shape {
    int layers, dim, heads, ffn, vocab, context;
    int B, T, micro_batches;
};
constexpr Shape kSmall{.layers = 2, .dim = 64, .heads = 4, .ffn = 256, .vocab = 257, .context = 64, .B = 4, .T = 64, .micro_batches = 2};
// Head dimensions 64 and 128, which have kernels of their own on Hopper; T is more than a tile of them and no multiple of it.
constexpr Shape kLargeHeads[] = {
    {.layers = 1, .dim = 128, .heads = 2, .ffn = 256, .vocab = 257, .context = 160, .B = 2, .T = 160, .micro_batches = 2},
    {.layers = 1, .dim = 256, .heads = 2, .ffn = 256, .vocab = 257, .context = 160, .B = 2, .T = 160, .micro_batches = 2},
};

struct Batch {
    std::vector<int> inputs, targets;
    int64_t valid = 0;  // unmasked targets
};

struct Setup {
    EngineOptions options;
    ParameterList list;
    TrainState state;
    std::vector<Batch> batches;  // one a step
    std::string text;

    StepInputs inputs(size_t step) const {
        return {.step = int64_t(step), .learning_rate = 1e-2f / float(1 + step),
                .inverse_valid_tokens = float(1.0 / double(std::max<int64_t>(batches[step].valid, 1)))};
    }
};

// GPT-2's initialization is so small that attention is uniform and logits are flat; here nothing is trivial.
TrainState random_state(const ParameterList& list, const ModelSpec& model) {
    TrainState state = initial_state(list, model, uint64_t(random_ints(1, 0, 1 << 30)[0]));
    for (const Parameter& p : list.all) {
        float* x = state.params.data() + p.offset;
        const std::vector<float> noise = random_normal(size_t(p.count()), 0.2f);
        for (int64_t i = 0; i < p.count(); ++i) x[i] = p.is_vector ? x[i] + noise[size_t(i)] : 5.0f * x[i];
    }
    return state;
}

// Random tokens; 40 % of the targets of even micro-batches are masked, 10 % of the others'.
Batch random_batch(const Shape& s) {
    const size_t micro = size_t(s.B) * size_t(s.T), n = micro * size_t(s.micro_batches);
    Batch batch{.inputs = random_ints(n, 0, s.vocab), .targets = random_ints(n, 0, s.vocab)};
    const std::vector<float> draws = random_uniform(n, 0, 1);
    for (size_t i = 0; i < n; ++i) {
        if (draws[i] < (i / micro % 2 == 0 ? 0.4f : 0.1f)) batch.targets[i] = -1;
        batch.valid += batch.targets[i] >= 0;
    }
    return batch;
}

Setup make_setup(const Shape& s, const std::string& recipe, int steps) {
    const ModelSpec model{.name = "check", .n_layers = s.layers, .dim = s.dim, .n_heads = s.heads, .ffn_dim = s.ffn,
                          .vocab_size = s.vocab, .seq_len = s.context};
    Setup setup{.options = {.model = model, .recipe = find_recipe(recipe), .micro_batch = s.B, .seq_len = s.T,
                            .micro_batches_per_step = s.micro_batches,
                            .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .max_grad_norm = 1.0f},
                            .deterministic = true, .gemm_cache = ""},
                .list = make_parameters(model), .state = {}, .batches = {},
                .text = message("%s L%d C%d H%d F%d V%d T%d/%d B%dx%d", recipe.c_str(), s.layers, s.dim, s.heads, s.ffn, s.vocab,
                                s.T, s.context, s.B, s.micro_batches)};
    setup.state = random_state(setup.list, model);
    for (int i = 0; i < steps; ++i) setup.batches.push_back(random_batch(s));
    return setup;
}

struct Outcome {
    std::vector<StepState> steps;
    TrainState state;
};

// Steps [first, last) from where the engine is.
Outcome run_steps(Engine& engine, const Setup& s, size_t first, size_t last) {
    Outcome outcome;
    for (size_t i = first; i < last; ++i) {
        engine.enqueue_step(s.inputs(i), s.batches[i].inputs, s.batches[i].targets);
        outcome.steps.push_back(engine.collect());
    }
    engine.save(outcome.state);
    return outcome;
}
Outcome train(Engine& engine, const Setup& s) {
    engine.load(s.state);
    return run_steps(engine, s, 0, s.batches.size());
}

double mean_loss(Engine& engine, const Setup& s, const Batch& batch) {
    const size_t micro = size_t(s.options.micro_batch) * size_t(s.options.seq_len);
    double sum = 0;
    for (size_t first = 0; first < batch.inputs.size(); first += micro)
        sum += engine.evaluate({batch.inputs.data() + first, micro}, {batch.targets.data() + first, micro});
    return sum / double(batch.valid);
}

double norm_of(const std::vector<float>& x) {
    double sum = 0;
    for (const float value : x) sum += double(value) * double(value);
    return std::sqrt(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Comparison

// Between two engines that round at the same places, summing in another order flips a BF16 rounding here and there, and
// the GPU's attention also rounds P and dS. If every one of a block's 12 roundings (forward and backward) fell out
// differently, errors of 2^-9 would add up like independent ones to this.
double bf16_tolerance(const ModelSpec& m) { return std::ldexp(1.0, -9) * std::sqrt(2.0 * 12 * (m.n_layers + 1)); }

// When scales differ, so do all roundings: two independent errors of at most 2^-3 / sqrt(12) (E4M3) and 2^-2 / sqrt(12)
// (E5M2) for each of a block's 4 inputs and 4 gradients.
double requantized_tolerance(const EngineOptions& o) {
    const double fp8 = o.recipe.quantizes() ? 2 * 4.0 * o.model.n_layers * (std::ldexp(1.0, -6) + std::ldexp(1.0, -4)) / 12 : 0;
    return std::sqrt(std::pow(bf16_tolerance(o.model), 2) + fp8);
}

struct Worst {
    double relative = 0;
    std::string where = "nothing";

    void take(double error, const std::string& at) {
        if (!(error >= 0)) error = std::numeric_limits<double>::infinity();
        if (error > relative) relative = error, where = at;
    }
};

constexpr int kTile = 128;

// ||got - want|| / max(||want||, half of what a tile of the tensor's root mean square would have). The floor is for parts
// that are zero in theory, such as the gradient of the keys' bias (softmax ignores a shift of all scores).
double tile_error(const Parameter& p, const float* got, const float* want, double rms, int64_t row, int64_t col) {
    const int64_t rows = std::min<int64_t>(p.rows - row, kTile), cols = std::min<int64_t>(p.cols - col, kTile);
    double error = 0, reference = 0;
    for (int64_t r = row; r < row + rows; ++r)
        for (int64_t c = col; c < col + cols; ++c) {
            const double w = want[r * p.cols + c], difference = got[r * p.cols + c] - w;
            error += difference * difference;
            reference += w * w;
        }
    return std::sqrt(error / std::max({reference, 0.25 * rms * rms * double(rows * cols), 1e-60}));
}

// The worst 128x128 tile of all tensors; padding must be exactly zero.
Worst worst_tile(const ParameterList& list, const std::vector<float>& got, const std::vector<float>& want) {
    Worst worst;
    if (got.size() != want.size()) worst.take(INFINITY, "size");
    if (got.size() != want.size()) return worst;
    for (const Parameter& p : list.all) {
        const float *g = got.data() + p.offset, *w = want.data() + p.offset;
        const double rms = norm_of(std::vector<float>(w, w + p.count())) / std::sqrt(double(p.count()));
        for (int64_t row = 0; row < p.rows; row += kTile)
            for (int64_t col = 0; col < p.cols; col += kTile)
                worst.take(tile_error(p, g, w, rms, row, col), message("%s tile (%lld,%lld)", p.name.c_str(),
                                                                        (long long)row / kTile, (long long)col / kTile));
        for (int64_t i = p.count(); i < p.padded_count(); ++i)
            if (g[i] != 0.0f) worst.take(INFINITY, "padding of " + p.name);
    }
    return worst;
}

void expect_close(Report& report, const std::string& name, const std::string& text, const Worst& worst, double tolerance) {
    report.expect(name, text, worst.relative <= tolerance, message("rel %.1e %s, tol %.1e", worst.relative, worst.where.c_str(), tolerance));
}
void expect_value(Report& report, const std::string& name, const std::string& text, double got, double want, double tolerance) {
    const double error = std::abs(got - want) / std::max(std::abs(want), 1e-30);
    report.expect(name, text, error <= tolerance, message("%.6g, expected %.6g, rel %.1e, tol %.1e", got, want, error, tolerance));
}

// "" or the first difference, by bits.
std::string difference(const ParameterList& list, const std::string& what, const std::vector<float>& a, const std::vector<float>& b) {
    if (a.size() != b.size()) return message("%s: %zu and %zu elements", what.c_str(), a.size(), b.size());
    if (std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0) return "";
    size_t i = 0;
    while (std::memcmp(&a[i], &b[i], sizeof(float)) == 0) ++i;
    std::string name = "gap";
    for (const Parameter& p : list.all)
        if (int64_t(i) >= p.offset && int64_t(i) < p.offset + p.padded_count()) name = p.name;
    return message("%s of %s, flat [%zu]: %.9g and %.9g", what.c_str(), name.c_str(), i, double(a[i]), double(b[i]));
}
std::string difference(const ParameterList& list, const TrainState& a, const TrainState& b) {
    std::string text = difference(list, "weights", a.params, b.params);
    if (text.empty()) text = difference(list, "m", a.m, b.m);
    if (text.empty()) text = difference(list, "v", a.v, b.v);
    if (text.empty() && a.adam_t != b.adam_t) text = message("adam_t %lld and %lld", (long long)a.adam_t, (long long)b.adam_t);
    return text;
}
std::string difference(const StepState& a, const StepState& b) {
    const auto differ = [](float x, float y) { return std::memcmp(&x, &y, sizeof x) != 0; };
    if (differ(a.loss_sum, b.loss_sum)) return message("loss %.9g and %.9g", double(a.loss_sum), double(b.loss_sum));
    if (differ(a.grad_norm, b.grad_norm)) return message("norm %.9g and %.9g", double(a.grad_norm), double(b.grad_norm));
    if (differ(a.clip_scale, b.clip_scale)) return message("clip scale %.9g and %.9g", double(a.clip_scale), double(b.clip_scale));
    if (a.adam_t != b.adam_t) return message("adam_t %lld and %lld", (long long)a.adam_t, (long long)b.adam_t);
    return a.skip_update != b.skip_update ? "skip_update" : "";
}
// Compares the last steps of two runs of which the second may be shorter (a resumed one).
void expect_same(Report& report, const std::string& name, const Setup& s, const Outcome& a, const Outcome& b) {
    std::string text = difference(s.list, a.state, b.state);
    for (size_t i = 0; i < b.steps.size() && text.empty(); ++i)
        text = difference(a.steps[a.steps.size() - b.steps.size() + i], b.steps[i]);
    report.expect(name, s.text, text.empty(), text.empty() ? "equal bitwise" : "differ: " + text);
}

// ---------------------------------------------------------------------------------------------------------------------
// GPU against reference

// How far two correct engines may be apart is a property of the model: a sum in another order, or the GPU's rounding of P and
// dS, moves a value across a rounding boundary, FP8 turns that into a step of up to 2^-2, softmax and depth amplify it. At
// worst every rounding to BF16 falls out differently, and what follows from it with them. So the bound is measured on the
// reference itself, with its embeddings nudged by as much as one rounding to BF16, 2^-9 / sqrt(3) as root mean square: that
// moves everything which is stored behind them, every token apart, and leaves the matrices, of which both engines multiply
// the same copies or codes. (A nudge of 1e-5 reaches a boundary here and there only: with one layer and T = 1024 it moved
// tensorwise gradients by 0.014 to 0.048, from one nudge to the next, while rounding P and dS alone moved them by up to 0.059.)
//
// The error of a correct GPU is then at most one more draw from the distribution of the nudges' errors. Their logarithms
// deviate by 0.04 to 0.13 within one model (dev/LOG.md), so 1.5 times the largest of four nudges lies 7 to 3.4 deviations of
// (one draw minus the largest of four) above its mean: less than one comparison in 3000 fails by chance.
constexpr int kNudges = 4;
constexpr double kOverLargestNudge = 1.5;
// A gradient that is doubled, not written or of another place is off by 1: a bound that wide could not tell.
constexpr double kBluntBound = 1;

TrainState nudged(const Setup& s) {
    TrainState state = s.state;
    const std::vector<float> noise = random_normal(state.params.size(), float(std::ldexp(1.0, -9) / std::sqrt(3.0)));
    for (const int embedding : {s.list.wte, s.list.wpe}) {
        const Parameter& p = s.list[embedding];
        for (int64_t i = p.offset; i < p.offset + p.count(); ++i) state.params[size_t(i)] *= 1 + noise[size_t(i)];
    }
    return state;
}

struct Expected {
    std::vector<float> gradients;
    double bound;
};

// Leaves the setup's state in the reference engine.
Expected expected_gradients(Engine& cpu, const Setup& s) {
    const Batch& b = s.batches[0];
    cpu.load(s.state);
    Expected expected{.gradients = cpu.gradients(s.inputs(0), b.inputs, b.targets), .bound = 0};
    for (int i = 0; i < kNudges; ++i) {
        cpu.load(nudged(s));
        const Worst moved = worst_tile(s.list, cpu.gradients(s.inputs(0), b.inputs, b.targets), expected.gradients);
        expected.bound = std::max(expected.bound, kOverLargestNudge * moved.relative);
    }
    cpu.load(s.state);
    return expected;
}

void match_reference(Report& report, const Shape& shape, const std::string& recipe) {
    const Setup s = make_setup(shape, recipe, 1);
    const auto gpu = make_gpu_engine(s.options), cpu = make_reference_engine(s.options);
    gpu->load(s.state);
    const Batch& b = s.batches[0];
    const Expected expected = expected_gradients(*cpu, s);
    const double bound = expected.bound;
    expect_close(report, "gradients", s.text, worst_tile(s.list, gpu->gradients(s.inputs(0), b.inputs, b.targets), expected.gradients), bound);
    report.expect("bound of the gradients", s.text, bound < kBluntBound, message("%.1e, must be below %g", bound, kBluntBound));
    // A logit of standard deviation about 1 is off by the bound; the mean over the tokens evens most of that out.
    expect_value(report, "loss", s.text, mean_loss(*gpu, s, b), mean_loss(*cpu, s, b), 0.1 * bound);
}

// Three steps with active clipping. Adam's epsilon is as large as a typical gradient, so that updates are smooth in the
// gradients; with the usual tiny one they are signs, and a comparison says little.
void steps_match(Report& report, const std::string& recipe) {
    Setup s = make_setup(kSmall, recipe, 3);
    const Expected expected = expected_gradients(*make_reference_engine(s.options), s);
    const double norm = norm_of(expected.gradients);
    s.options.adamw.max_grad_norm = float(0.3 * norm);
    s.options.adamw.eps = float(0.3 * norm / std::sqrt(double(s.list.published_count())));
    const auto gpu = make_gpu_engine(s.options), cpu = make_reference_engine(s.options);
    const Outcome a = train(*gpu, s), b = train(*cpu, s);

    const double g = expected.bound;
    for (size_t i = 0; i < a.steps.size(); ++i) {
        const StepState& step = a.steps[i];
        const std::string text = message("%s step %zu", s.text.c_str(), i);
        expect_value(report, "loss of a step", text, step.loss_sum, b.steps[i].loss_sum, 0.1 * g);
        expect_value(report, "gradient norm", text, step.grad_norm, b.steps[i].grad_norm, g);
        expect_value(report, "clip scale", text, step.clip_scale,
                     std::min(1.0, double(s.options.adamw.max_grad_norm) / (double(step.grad_norm) + 1e-6)), 1e-6);
        expect_value(report, "bias corrections", text, double(step.bias_correction1) * double(step.bias_correction2),
                     (1 - std::pow(0.9f, double(i + 1))) * (1 - std::pow(0.95f, double(i + 1))), 1e-5);
    }
    std::vector<float> update_a = a.state.params, update_b = b.state.params;
    for (size_t i = 0; i < update_a.size(); ++i) update_a[i] -= s.state.params[i], update_b[i] -= s.state.params[i];
    expect_close(report, "m after 3 steps", s.text, worst_tile(s.list, a.state.m, b.state.m), 1.5 * g);
    expect_close(report, "v after 3 steps", s.text, worst_tile(s.list, a.state.v, b.state.v), 3 * g);
    expect_close(report, "update of 3 steps", s.text, worst_tile(s.list, update_a, update_b), 2 * g);
    report.expect("clipping is active", s.text, a.steps[0].clip_scale < 0.5f && a.state.adam_t == 3, message("scale %.3f", double(a.steps[0].clip_scale)));
}

// Amaxes are those of a micro-batch, so in FP8 the two ways of cutting have different scales.
void split(Report& report, const std::string& recipe) {
    Shape whole = kSmall;
    whole.B = 8, whole.micro_batches = 1;
    Setup s = make_setup(whole, recipe, 1);
    const auto one = make_gpu_engine(s.options);
    const Outcome a = train(*one, s);
    s.options.micro_batch = 4, s.options.micro_batches_per_step = 2;
    const auto two = make_gpu_engine(s.options);
    const Outcome b = train(*two, s);
    expect_close(report, "1x8 against 2x4: m", s.text, worst_tile(s.list, b.state.m, a.state.m), requantized_tolerance(s.options));
    expect_value(report, "1x8 against 2x4: loss", s.text, b.steps[0].loss_sum, a.steps[0].loss_sum, 0.1 * requantized_tolerance(s.options));
}

void masked(Report& report, const std::string& recipe) {
    Setup s = make_setup(kSmall, recipe, 1);
    Batch& b = s.batches[0];
    std::fill(b.targets.begin(), b.targets.begin() + std::ptrdiff_t(b.targets.size() / 2), -1);  // all of the first micro-batch
    b.valid = std::count_if(b.targets.begin(), b.targets.end(), [](int t) { return t >= 0; });
    const auto gpu = make_gpu_engine(s.options), cpu = make_reference_engine(s.options);
    gpu->load(s.state);
    const Expected expected = expected_gradients(*cpu, s);
    expect_close(report, "masked micro-batch", s.text,
                 worst_tile(s.list, gpu->gradients(s.inputs(0), b.inputs, b.targets), expected.gradients), expected.bound);
    std::fill(b.targets.begin(), b.targets.end(), -1);
    const double norm = norm_of(gpu->gradients(s.inputs(0), b.inputs, b.targets));
    report.expect("everything masked", s.text, norm == 0, message("gradient norm %g", norm));
}

// Logits with a spread of hundreds: the target's probability underflows, its logarithm must not.
void confident(Report& report) {
    Setup s = make_setup(kSmall, "bf16", 1);
    const Parameter& p = s.list[s.list.lnf_weight];
    for (int64_t i = 0; i < p.count(); ++i) s.state.params[size_t(p.offset + i)] *= 200;
    const auto gpu = make_gpu_engine(s.options), cpu = make_reference_engine(s.options);
    gpu->load(s.state);
    const double bound = expected_gradients(*cpu, s).bound;
    const Batch& b = s.batches[0];
    const double loss = mean_loss(*gpu, s, b);
    expect_value(report, "confident and wrong: loss", s.text, loss, mean_loss(*cpu, s, b), bound);
    const double norm = norm_of(gpu->gradients(s.inputs(0), b.inputs, b.targets));
    report.expect("confident and wrong: finite", s.text, std::isfinite(norm) && loss > 100, message("loss %.1f, gradient norm %g", loss, norm));
}

// ---------------------------------------------------------------------------------------------------------------------
// GPU against itself, by bits

void repeat_and_eager(Report& report, const Shape& shape, const std::string& recipe) {
    Setup s = make_setup(shape, recipe, 3);
    const auto engine = make_gpu_engine(s.options);
    const Outcome first = train(*engine, s);
    expect_same(report, "same engine again", s, first, train(*engine, s));
    expect_same(report, "another engine", s, first, train(*make_gpu_engine(s.options), s));
    s.options.use_graphs = false;
    expect_same(report, "eager against graphs", s, first, train(*make_gpu_engine(s.options), s));
}

// Tuned GEMMs: the choices of one engine, in a cache, must be the other's.
void repeat_tuned(Report& report) {
    Setup s = make_setup(kSmall, "tensorwise", 3);
    s.options.deterministic = false;
    s.options.gemm_cache = (std::filesystem::temp_directory_path() / message("engines_check_%d.cache", int(getpid()))).string();
    const Outcome first = train(*make_gpu_engine(s.options), s);
    expect_same(report, "another engine, cached GEMMs", s, first, train(*make_gpu_engine(s.options), s));
    unlink(s.options.gemm_cache.c_str());
}

void resume(Report& report, const Shape& shape, const std::string& recipe) {
    const Setup s = make_setup(shape, recipe, 4);
    const auto engine = make_gpu_engine(s.options), other = make_gpu_engine(s.options);
    const Outcome whole = train(*engine, s);
    engine->load(s.state);
    const Outcome half = run_steps(*engine, s, 0, 2);
    other->load(half.state);
    expect_same(report, "resumed after 2 of 4 steps", s, whole, run_steps(*other, s, 2, 4));
    expect_same(report, "saving changes nothing", s, whole, run_steps(*engine, s, 2, 4));
}

// A step that must be skipped, between steps 1 and 2: afterwards only the count of skipped steps differs.
void nonfinite(Report& report, const std::string& recipe) {
    const Setup s = make_setup(kSmall, recipe, 3);
    const auto engine = make_gpu_engine(s.options);
    const Outcome whole = train(*engine, s);
    struct Bad {
        const char* name;
        float inverse_valid_tokens;
    };
    // 1e34 leaves the loss finite and makes the norm's squares overflow.
    for (const Bad& bad : {Bad{"infinite loss", INFINITY}, Bad{"NaN loss", NAN}, Bad{"overflowing norm", 1e34f}}) {
        engine->load(s.state);
        const Outcome before = run_steps(*engine, s, 0, 2);
        StepInputs in = s.inputs(2);
        in.inverse_valid_tokens = bad.inverse_valid_tokens;
        engine->enqueue_step(in, s.batches[2].inputs, s.batches[2].targets);
        const StepState step = engine->collect();
        TrainState after;
        engine->save(after);
        const std::string text = difference(s.list, before.state, after);
        report.expect(message("%s is skipped", bad.name), s.text,
                      step.skip_update && step.skipped_steps == 1 && after.skipped_steps == 1 && step.adam_t == 2 && text.empty(),
                      text.empty() ? message("skip %u, skipped %lld, adam_t %lld", step.skip_update, (long long)step.skipped_steps, (long long)step.adam_t) : text);
        expect_same(report, message("%s: the next step", bad.name), s, whole, run_steps(*engine, s, 2, 3));
    }

    const Outcome before = [&] { engine->load(s.state); return run_steps(*engine, s, 0, 2); }();
    TrainState broken = before.state;
    broken.params[size_t(s.list[s.list.blocks[0].fc1_weight].offset)] = INFINITY;
    engine->load(broken);
    const Outcome skipped = run_steps(*engine, s, 2, 3);
    const std::string text = difference(s.list, broken, skipped.state);
    report.expect("infinite weight is skipped", s.text, skipped.steps[0].skip_update && skipped.state.skipped_steps == 1 && text.empty(),
                  text.empty() ? message("skip %u", skipped.steps[0].skip_update) : text);
    engine->load(before.state);
    expect_same(report, "infinite weight: restored", s, whole, run_steps(*engine, s, 2, 3));
}

void evaluation(Report& report, const std::string& recipe) {
    const Setup s = make_setup(kSmall, recipe, 2);
    const auto engine = make_gpu_engine(s.options);
    const Outcome whole = train(*engine, s);
    engine->load(s.state);
    expect_value(report, "evaluated loss is the step's", s.text, mean_loss(*engine, s, s.batches[0]), whole.steps[0].loss_sum, 1e-5);
    Outcome mixed;
    for (size_t i = 0; i < 2; ++i) {
        engine->enqueue_step(s.inputs(i), s.batches[i].inputs, s.batches[i].targets);
        mean_loss(*engine, s, s.batches[1 - i]);  // between a step and its collection
        mixed.steps.push_back(engine->collect());
        mean_loss(*engine, s, s.batches[0]);
    }
    engine->save(mixed.state);
    expect_same(report, "evaluation changes nothing", s, whole, mixed);
}

// What the optimizer keeps up to date must be what a fresh engine derives from the masters.
void copies_follow(Report& report, const std::string& recipe) {
    Setup s = make_setup(kSmall, recipe, 3);
    s.options.adamw.weight_decay = 40;  // with the learning rate 1e-2: amaxes sink by 40 %, and must be seen to
    const auto engine = make_gpu_engine(s.options), fresh = make_gpu_engine(s.options);
    const Outcome outcome = train(*engine, s);
    fresh->load(outcome.state);
    const double moved = mean_loss(*engine, s, s.batches[0]), loaded = mean_loss(*fresh, s, s.batches[0]);
    report.expect("copies follow the masters", s.text, moved == loaded, message("loss %.9g, of a fresh engine %.9g", moved, loaded));
}

void unquantizable(Report& report) {
    constexpr Shape kOdd{.layers = 2, .dim = 40, .heads = 5, .ffn = 88, .vocab = 257, .context = 64, .B = 4, .T = 64, .micro_batches = 2};
    Setup s = make_setup(kOdd, "tensorwise", 2);
    const auto fp8 = make_gpu_engine(s.options);
    bool all_bf16 = true;
    for (const LinearRow& row : fp8->linear_table()) all_bf16 &= row.precision == "BF16";
    report.expect("table says BF16", s.text, all_bf16, all_bf16 ? "all rows" : "a row says otherwise");
    const Outcome a = train(*fp8, s);
    s.options.recipe = find_recipe("bf16");
    expect_same(report, "tensorwise of unfit dimensions is bf16", s, a, train(*make_gpu_engine(s.options), s));
}

// As many steps ahead as the engine takes, then an Error instead of an overwritten batch.
void in_flight(Report& report) {
    const Setup s = make_setup(kSmall, "tensorwise", 6);
    const auto engine = make_gpu_engine(s.options);
    const Outcome whole = train(*engine, s);
    engine->load(s.state);
    Outcome ahead;
    size_t enqueued = 0;
    bool refused = false;
    while (ahead.steps.size() < s.batches.size()) {
        try {
            if (enqueued < s.batches.size()) {
                engine->enqueue_step(s.inputs(enqueued), s.batches[enqueued].inputs, s.batches[enqueued].targets);
                ++enqueued;
                continue;
            }
        } catch (const Error&) {
            refused = true;
        }
        ahead.steps.push_back(engine->collect());
    }
    engine->save(ahead.state);
    expect_same(report, "steps in flight", s, whole, ahead);
    report.expect("too many in flight", s.text, refused, refused ? "refused" : "6 steps accepted at once");
}

// ---------------------------------------------------------------------------------------------------------------------

void checks(Report& report) {
    constexpr Shape kShapes[] = {
        kSmall,
        {.layers = 2, .dim = 48, .heads = 6, .ffn = 88, .vocab = 259, .context = 64, .B = 16, .T = 33, .micro_batches = 2},    // FP8 and BF16 linears
        {.layers = 1, .dim = 40, .heads = 5, .ffn = 88, .vocab = 130, .context = 48, .B = 16, .T = 1, .micro_batches = 3},
        {.layers = 3, .dim = 192, .heads = 3, .ffn = 768, .vocab = 1000, .context = 128, .B = 3, .T = 112, .micro_batches = 2},
        {.layers = 2, .dim = 256, .heads = 2, .ffn = 512, .vocab = 640, .context = 160, .B = 2, .T = 160, .micro_batches = 1},  // head dimension 128
        {.layers = 1, .dim = 32, .heads = 2, .ffn = 64, .vocab = 257, .context = 1024, .B = 17, .T = 1024, .micro_batches = 1}, // two head chunks
    };
    for (const Shape& shape : kShapes)
        for (const char* recipe : {"bf16", "tensorwise"})
            if (!report.small_only || &shape < kShapes + 3) match_reference(report, shape, recipe);
    nonfinite(report, "tensorwise");
    if (report.small_only) return;

    nonfinite(report, "bf16");
    for (const char* recipe : {"bf16", "tensorwise"}) {
        steps_match(report, recipe);
        split(report, recipe);
        masked(report, recipe);
        for (const int micro_batches : {1, 2, 4}) {  // every position
            Shape shape = kSmall;
            shape.B = 2, shape.micro_batches = micro_batches;
            repeat_and_eager(report, shape, recipe);
        }
        resume(report, kSmall, recipe);
        for (const Shape& shape : kLargeHeads) repeat_and_eager(report, shape, recipe), resume(report, shape, recipe);
        evaluation(report, recipe);
        copies_follow(report, recipe);
    }
    confident(report);
    repeat_tuned(report);
    unquantizable(report);
    in_flight(report);
}

void no_benches(Report&) {}

}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "engines", checks, no_benches); }
