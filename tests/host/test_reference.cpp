// The reference device: against PyTorch over five steps of the whole loop, and what every device must keep (determinism,
// accumulation, masks, skipped steps, padding).
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "tests/host/golden_file.h"
#include "trainer/engine.h"
#include "trainer/reference/adamw.h"
#include "trainer/reference/linear.h"
#include "trainer/reference/matmul.h"
#include "trainer/reference/ops.h"

namespace {

double relative_difference(std::span<const float> a, std::span<const float> b) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < b.size(); ++i) difference += std::pow(double(a[i]) - b[i], 2), norm += double(b[i]) * b[i];
    return std::sqrt(difference / norm);
}

double largest_difference(std::span<const float> a, std::span<const float> b) {
    double most = 0;
    for (size_t i = 0; i < b.size(); ++i) {
        const double difference = std::fabs(double(a[i]) - b[i]);
        if (!(difference <= most)) most = difference;  // keeps a NaN
    }
    return most;
}

// ---------------------------------------------------------------------------------------------------------------------
// Against PyTorch

constexpr int kGoldenSteps = 5, kGoldenMicroBatches = 3;
constexpr double kTolerance = 1e-5;  // float32 PyTorch itself is within 7e-7 of the golden (float64) values

class Golden {
  public:
    GoldenFile file{"reference_train.safetensors"};
    EngineOptions options{
        .model = {.name = "golden", .n_layers = 2, .dim = 40, .n_heads = 5, .ffn_dim = 160, .vocab_size = 61, .seq_len = 16},
        .recipe = find_recipe("f32"), .micro_batch = 2, .seq_len = 16, .micro_batches_per_step = kGoldenMicroBatches,
        .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .max_grad_norm = file.floats("max_grad_norm").at(0)},
        .gemm_cache = ""};
    ParameterList list = make_parameters(options.model);
    std::vector<int> inputs = file.ints("inputs"), targets = file.ints("targets");
    std::vector<float> learning_rates = file.floats("learning_rate");
    size_t step_tokens = inputs.size() / kGoldenSteps;

    std::vector<float> flat(const std::string& prefix) const {
        std::vector<float> out(size_t(list.flat_elements));
        for (const Parameter& p : list.all) from_file_layout(p, file.floats(prefix + "." + p.name).data(), out.data() + p.offset);
        return out;
    }
    StepInputs step_inputs(int step) const {
        const std::span<const int> t = targets_of(step);
        return {step, learning_rates[size_t(step)], 1.0f / float(std::count_if(t.begin(), t.end(), [](int x) { return x >= 0; }))};
    }
    std::span<const int> inputs_of(int step) const { return {inputs.data() + size_t(step) * step_tokens, step_tokens}; }
    std::span<const int> targets_of(int step) const { return {targets.data() + size_t(step) * step_tokens, step_tokens}; }

    struct Trained {
        std::vector<float> params, losses, norms;
    };
    Trained train(int steps = kGoldenSteps) const {
        Trained out;
        const auto engine = make_reference_engine(options);
        engine->load({.params = flat("initial"), .m = {}, .v = {}});
        for (int step = 0; step < steps; ++step) {
            engine->enqueue_step(step_inputs(step), inputs_of(step), targets_of(step));
            const StepState state = engine->collect();
            out.losses.push_back(state.loss_sum);
            out.norms.push_back(state.grad_norm);
        }
        TrainState state;
        engine->save(state);
        out.params = state.params;
        return out;
    }
};

// A constant added to every key moves all scores of a query alike, so the gradient of the key third of c_attn's bias is
// zero. What is computed is rounding noise, and Adam divides it by its own size: not comparable.
bool is_qkv_bias(const Parameter& p) { return p.name.ends_with("c_attn.bias"); }

// Worst relative difference of a parameter, key biases excepted.
struct Worst {
    double relative = 0, absolute = 0;
    std::string name, absolute_name;
};
Worst compare(const ParameterList& list, const std::vector<float>& a, const std::vector<float>& b) {
    Worst worst;
    for (const Parameter& p : list.all) {
        std::vector<float> mine(a.begin() + p.offset, a.begin() + p.offset + p.padded_count());
        std::vector<float> other(b.begin() + p.offset, b.begin() + p.offset + p.padded_count());
        if (is_qkv_bias(p)) {
            const int third = p.cols / 3;
            std::fill_n(mine.begin() + third, third, 0.0f);
            std::fill_n(other.begin() + third, third, 0.0f);
        }
        const double relative = relative_difference(mine, other);
        const double absolute = largest_difference(mine, other);
        if (!(relative <= worst.relative)) worst.relative = relative, worst.name = p.name;
        if (!(absolute <= worst.absolute)) worst.absolute = absolute, worst.absolute_name = p.name;
    }
    return worst;
}

double worst_of(const std::vector<float>& a, const std::vector<float>& b) {
    double worst = 0;
    for (size_t i = 0; i < b.size(); ++i) worst = std::max(worst, std::fabs(double(a[i]) / b[i] - 1));
    return worst;
}

EngineOptions rounded_options(const std::string& recipe) {
    return {.model = {.name = "golden", .n_layers = 1, .dim = 32, .n_heads = 2, .ffn_dim = 128, .vocab_size = 50, .seq_len = 8},
            .recipe = find_recipe(recipe), .micro_batch = 1, .seq_len = 8, .micro_batches_per_step = 2, .adamw = {}, .gemm_cache = ""};
}

// ---------------------------------------------------------------------------------------------------------------------
// A small model whose linears can all run in FP8, and random text

EngineOptions small_options(const std::string& recipe, int micro_batch = 2, int micro_batches = 2) {
    return {.model = {.name = "small", .n_layers = 2, .dim = 32, .n_heads = 4, .ffn_dim = 128, .vocab_size = 50, .seq_len = 24},
            .recipe = find_recipe(recipe), .micro_batch = micro_batch, .seq_len = 16, .micro_batches_per_step = micro_batches,
            .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .max_grad_norm = 1.0f},
            .gemm_cache = ""};
}

struct Batch {
    std::vector<int> inputs, targets;
    int valid;
    StepInputs in(int step, float learning_rate = 3e-3f) const { return {step, learning_rate, 1.0f / float(valid)}; }
};
// Every token is a function of the one before, but for some noise; a seventh of the targets is masked.
Batch make_batch(const EngineOptions& o, uint32_t seed) {
    std::mt19937 random(seed);
    const int V = o.model.vocab_size, n = o.micro_batch * o.micro_batches_per_step * o.seq_len;
    Batch batch{.inputs = {}, .targets = {}, .valid = 0};
    int token = 0;
    for (int i = 0; i < n; ++i) {
        batch.inputs.push_back(token);
        token = random() % 4 ? (token * 7 + 3) % V : int(random() % uint32_t(V));
        batch.targets.push_back(random() % 7 ? token : -1);
        batch.valid += batch.targets.back() >= 0;
    }
    return batch;
}

struct Trial {
    std::vector<StepState> steps;
    TrainState state;
};
// `steps` steps from `from` on, whose data depends on the step number alone.
Trial train(Engine& engine, const EngineOptions& o, int from, int steps) {
    Trial run;
    for (int step = from; step < from + steps; ++step) {
        const Batch batch = make_batch(o, uint32_t(step));
        engine.enqueue_step(batch.in(step), batch.inputs, batch.targets);
        run.steps.push_back(engine.collect());
    }
    engine.save(run.state);
    return run;
}
Trial train(const EngineOptions& o, int steps) {
    const auto engine = make_reference_engine(o);
    engine->load(initial_state(make_parameters(o.model), o.model, 1));
    return train(*engine, o, 0, steps);
}

class RoundingRecipe : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Reference, RoundingRecipe, testing::Values("bf16", "tensorwise"),
                         [](const auto& info) { return std::string(info.param); });
class EveryRecipe : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Reference, EveryRecipe, testing::Values("f32", "bf16", "tensorwise"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace

TEST(ReferenceAgainstTorch, GradientsOfTheFirstStep) {
    const Golden golden;
    const auto engine = make_reference_engine(golden.options);
    engine->load({.params = golden.flat("initial"), .m = {}, .v = {}});
    const std::vector<float> gradients = engine->gradients(golden.step_inputs(0), golden.inputs_of(0), golden.targets_of(0));
    const Worst worst = compare(golden.list, gradients, golden.flat("grad0"));
    EXPECT_LE(worst.relative, kTolerance) << worst.name << ", largest difference " << worst.absolute;
    for (const Parameter& p : golden.list.all) {
        if (!is_qkv_bias(p)) continue;
        for (int i = p.cols / 3; i < 2 * p.cols / 3; ++i) EXPECT_LE(std::fabs(gradients[size_t(p.offset + i)]), 1e-7f) << p.name;
    }
}

TEST(ReferenceAgainstTorch, FiveSteps) {
    const Golden golden;
    const Golden::Trained mine = golden.train();
    const std::vector<float> initial = golden.flat("initial");
    const float most = std::accumulate(golden.learning_rates.begin(), golden.learning_rates.end(), 0.0f);
    const Worst worst = compare(golden.list, mine.params, golden.flat("final"));
    EXPECT_LE(worst.relative, kTolerance) << worst.name;
    // An element whose gradient is not much larger than its rounding error moves by another share of the learning rate.
    EXPECT_LE(worst.absolute, 0.01 * most) << worst.absolute_name;
    EXPECT_LE(worst_of(mine.losses, golden.file.floats("loss")), kTolerance);
    EXPECT_LE(worst_of(mine.norms, golden.file.floats("grad_norm")), kTolerance);
    RecordProperty("worst_relative", message("%.2g in %s, largest difference %.2g in %s", worst.relative, worst.name.c_str(),
                                             worst.absolute, worst.absolute_name.c_str()));

    // The key biases: noise moves them by less than the learning rates allow.
    for (const Parameter& p : golden.list.all) {
        if (!is_qkv_bias(p)) continue;
        for (size_t i = size_t(p.offset) + size_t(p.cols) / 3; i < size_t(p.offset) + 2 * size_t(p.cols) / 3; ++i)
            EXPECT_LE(std::fabs(mine.params[i] - initial[i]), most) << p.name;
    }
}

// Gradients with every rounding in its place. Float and float64 sums differ by 1e-7, so of the 40,000 roundings a few fall
// on the other side; one rounding left out, or one too many, changes every element it touches.
TEST_P(RoundingRecipe, RoundsWhereTheGpuStores) {
    const std::string recipe = GetParam();
    const GoldenFile file("reference_rounded.safetensors");
    const EngineOptions o = rounded_options(recipe);
    const ParameterList list = make_parameters(o.model);
    const auto flat = [&](const std::string& prefix) {
        std::vector<float> out(size_t(list.flat_elements));
        for (const Parameter& p : list.all) from_file_layout(p, file.floats(prefix + p.name).data(), out.data() + p.offset);
        return out;
    };
    const auto engine = make_reference_engine(o);
    engine->load({.params = flat("initial."), .m = {}, .v = {}});
    const std::vector<int> inputs = file.ints("inputs"), targets = file.ints("targets");
    const auto valid = std::count_if(targets.begin(), targets.end(), [](int t) { return t >= 0; });
    const std::vector<float> gradients = engine->gradients({0, 0.0f, 1.0f / float(valid)}, inputs, targets);
    const Worst worst = compare(list, gradients, flat(recipe + ".grad."));
    EXPECT_LE(worst.relative, 1e-5) << worst.name;
    RecordProperty("worst_relative", message("%.2g in %s", worst.relative, worst.name.c_str()));
}

// The comparison must be able to fail: each of these loops is wrong in one way.
TEST(ReferenceAgainstTorch, PlantedDifferencesAreSeen) {
    const Golden right;
    const std::vector<float> expected = right.flat("final");
    const auto expect_seen = [&](const char* what, const auto& plant, int steps = kGoldenSteps) {
        Golden wrong;
        plant(wrong);
        EXPECT_GT(compare(right.list, wrong.train(steps).params, expected).relative, 3 * kTolerance) << what;
    };
    expect_seen("one step fewer", [](Golden&) {}, kGoldenSteps - 1);
    expect_seen("no clipping", [](Golden& g) { g.options.adamw.max_grad_norm = 0; });
    expect_seen("no weight decay", [](Golden& g) { g.options.adamw.weight_decay = 0; });
    expect_seen("another beta2", [](Golden& g) { g.options.adamw.beta2 = 0.999f; });
    expect_seen("another epsilon", [](Golden& g) { g.options.adamw.eps = 1e-5f; });
    expect_seen("learning rates of two steps exchanged", [](Golden& g) { std::swap(g.learning_rates[1], g.learning_rates[2]); });
    expect_seen("masks ignored", [](Golden& g) {
        for (int& target : g.targets) target = std::max(target, 0);
    });
    expect_seen("one more target masked, in the last step", [](Golden& g) {
        *std::find_if(g.targets.rbegin(), g.targets.rend(), [](int t) { return t >= 0; }) = -1;
    });
    expect_seen("BF16", [](Golden& g) { g.options.recipe = find_recipe("bf16"); });
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(ReferenceMatmul, OddShapesAndLayouts) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    const auto noise = [&](int n) {
        std::vector<float> x(static_cast<size_t>(n));
        for (float& value : x) value = normal(random);
        return x;
    };
    for (const auto& [M, N, K] : {std::tuple{1, 1, 1}, {7, 17, 5}, {6, 16, 256}, {97, 33, 300}, {13, 50, 1030}})
        for (const bool a_transposed : {false, true})
            for (const bool b_transposed : {false, true}) {
                const std::vector<float> a = noise(M * K), b = noise(K * N), bias = noise(N), before = noise(M * N);
                std::vector<float> d = before;
                reference::matmul({.a = a.data(), .a_transposed = a_transposed, .b = b.data(), .b_transposed = b_transposed,
                                   .d = d.data(), .bias = bias.data(), .alpha = 0.5f, .accumulate = true, .M = M, .N = N, .K = K});
                for (int m = 0; m < M; ++m)
                    for (int n = 0; n < N; ++n) {
                        double sum = 0, magnitude = 0;
                        for (int k = 0; k < K; ++k) {
                            const double product = double(a[size_t(a_transposed ? k * M + m : m * K + k)]) *
                                                   double(b[size_t(b_transposed ? n * K + k : k * N + n)]);
                            sum += product;
                            magnitude += std::fabs(product);
                        }
                        const size_t at = size_t(m * N + n);
                        const double expected = double(before[at]) + bias[size_t(n)] + 0.5 * sum;
                        const double bound = (256 + K / 256) * 0x1p-24 * magnitude + 1e-6;  // every partial sum rounds once
                        ASSERT_LE(std::fabs(d[at] - expected), bound) << M << "x" << N << "x" << K << " at " << m << "," << n;
                    }
            }
}

// The target's probability, exp(-200), underflows; the logarithm must not be taken of it.
TEST(ReferenceClassifier, LossOfAnUnlikelyTargetIsFinite) {
    std::vector<float> logits = {100, -100, 99};
    const int target = 1;
    float loss = 0;
    reference::classifier({.logits = logits.data(), .targets = &target, .losses = &loss, .with_gradient = true,
                           .gradient_scale = 1, .rows = 1, .V = 3});
    EXPECT_FLOAT_EQ(loss, 200 + std::log1p(std::exp(-1.0f)));
    EXPECT_FLOAT_EQ(logits[1], -1);
}

TEST_P(EveryRecipe, ThreadCountChangesNoBit) {
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    const Trial one = train(small_options(GetParam()), 3);
    for (const int count : {2, 3, 7}) {
        omp_set_num_threads(count);
        const Trial many = train(small_options(GetParam()), 3);
        EXPECT_EQ(one.state.params, many.state.params) << count << " threads";
        EXPECT_EQ(one.steps.back().loss_sum, many.steps.back().loss_sum);
        EXPECT_EQ(one.steps.back().grad_norm, many.steps.back().grad_norm);
    }
    omp_set_num_threads(threads);
}

TEST_P(EveryRecipe, SavedStateContinuesBitEqually) {
    const EngineOptions o = small_options(GetParam());
    const Trial whole = train(o, 4), half = train(o, 2);
    const auto engine = make_reference_engine(o);
    engine->load(half.state);
    const Trial rest = train(*engine, o, 2, 2);
    EXPECT_EQ(rest.state.params, whole.state.params);
    EXPECT_EQ(rest.state.m, whole.state.m);
    EXPECT_EQ(rest.state.v, whole.state.v);
    EXPECT_EQ(rest.state.adam_t, 4);
    EXPECT_EQ(rest.steps.back().loss_sum, whole.steps.back().loss_sum);
}

TEST_P(EveryRecipe, PaddedVocabularyStaysZero) {
    const EngineOptions o = small_options(GetParam());
    const ParameterList list = make_parameters(o.model);
    const Trial run = train(o, 3);
    const Parameter& wte = list[list.wte];
    ASSERT_GT(wte.padded_rows, wte.rows);
    for (const std::vector<float>* flat : {&run.state.params, &run.state.m, &run.state.v})
        EXPECT_TRUE(std::all_of(flat->begin() + wte.offset + wte.count(), flat->begin() + wte.offset + wte.padded_count(),
                                [](float x) { return x == 0.0f; }));
}

// 36 sequences as one micro-batch (whose head runs in two chunks) or as three: only the order of sums over tokens differs.
TEST(Reference, SplittingIntoMicroBatchesKeepsTheGradient) {
    const EngineOptions whole = small_options("f32", 36, 1), split = small_options("f32", 12, 3);
    const Batch batch = make_batch(whole, 9);
    const TrainState state = initial_state(make_parameters(whole.model), whole.model, 1);
    const auto gradients = [&](const EngineOptions& o) {
        const auto engine = make_reference_engine(o);
        engine->load(state);
        return engine->gradients(batch.in(0), batch.inputs, batch.targets);
    };
    EXPECT_LE(relative_difference(gradients(split), gradients(whole)), 1e-6);
}

TEST_P(EveryRecipe, NonFiniteStepIsSkippedAndCounted) {
    const EngineOptions o = small_options(GetParam());
    const ParameterList list = make_parameters(o.model);
    const TrainState good = train(o, 1).state;
    const Batch batch = make_batch(o, 1);
    for (const int where : {list.wte, list.blocks[1].fc1_weight, list.blocks[0].ln1_bias, list.blocks[0].qkv_bias}) {
        SCOPED_TRACE(list[where].name);
        const auto engine = make_reference_engine(o);
        TrainState bad = good, after;
        bad.params[size_t(list[where].offset) + 3] = std::numeric_limits<float>::infinity();
        engine->load(bad);
        engine->enqueue_step(batch.in(1), batch.inputs, batch.targets);
        const StepState skipped = engine->collect();
        EXPECT_EQ(skipped.skip_update, 1u);
        EXPECT_NE(skipped.nonfinite, 0u);
        EXPECT_EQ(skipped.skipped_steps, 1);
        EXPECT_EQ(skipped.adam_t, 1);
        engine->save(after);
        EXPECT_EQ(after.params, bad.params);
        EXPECT_EQ(after.m, good.m);
        EXPECT_EQ(after.v, good.v);

        // Restored, it goes on as if nothing had happened, but for the count.
        after.params = good.params;
        engine->load(after);
        const Trial next = train(*engine, o, 1, 1);
        EXPECT_EQ(next.steps[0].nonfinite, 0u);
        EXPECT_EQ(next.steps[0].skip_update, 0u);
        EXPECT_EQ(next.steps[0].skipped_steps, 1);
        EXPECT_EQ(next.steps[0].adam_t, 2);
        EXPECT_EQ(next.state.params, train(o, 2).state.params);
    }
}

// Each of norm, loss and flag alone is enough.
TEST(Reference, AnyValueThatIsNotFiniteSkips) {
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    struct Case {
        float norm, loss;
        uint32_t flag;
    };
    for (const Case& c : {Case{inf, 1, 0}, {nan, 1, 0}, {1, inf, 0}, {1, -inf, 0}, {1, nan, 0}, {1, 1, 1}, {1, 1, 0}}) {
        StepState state{};
        state.in.loss_limit = state.in.grad_norm_limit = inf;
        state.loss_sum = c.loss;
        state.nonfinite = c.flag;
        reference::optimizer_prepare({.max_grad_norm = 1}, c.norm, state);
        const bool good = c.norm == 1 && c.loss == 1 && c.flag == 0;
        EXPECT_EQ(state.skip_update != 0, !good) << c.norm << ' ' << c.loss << ' ' << c.flag;
        EXPECT_EQ(state.nonfinite != 0, !good) << c.norm << ' ' << c.loss << ' ' << c.flag;
        EXPECT_EQ(state.skipped_steps, good ? 0 : 1);
    }
}

// A GEMM's output may hide what its input was: FP8 codes saturate.
TEST(Reference, AnOperandThatIsNotFiniteRaisesTheFlag) {
    reference::Linear linear(find_recipe("tensorwise"), 16, 16);
    const std::vector<float> weight(256, 0.5f), bias(16, 0.0f);
    std::vector<float> x(256, 1.0f), y(256);
    linear.use(weight.data(), 1.0f, bias.data());
    for (const float bad : {1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        x[37] = bad;
        uint32_t nonfinite = 0;
        linear.forward(x.data(), y.data(), 16, &nonfinite);
        EXPECT_EQ(nonfinite != 0, bad != 1.0f) << bad;
    }
}

// Without a load in between: what a bad step raised must be gone in the next.
TEST_P(EveryRecipe, BadStepLeavesNoTrace) {
    const EngineOptions o = small_options(GetParam());
    const auto engine = make_reference_engine(o);
    engine->load(initial_state(make_parameters(o.model), o.model, 1));
    const Trial first = train(*engine, o, 0, 1);
    const Batch batch = make_batch(o, 1);
    engine->enqueue_step({1, 3e-3f, std::numeric_limits<float>::infinity()}, batch.inputs, batch.targets);
    EXPECT_EQ(engine->collect().skip_update, 1u);
    const Trial second = train(*engine, o, 1, 1);
    EXPECT_EQ(second.state.params, train(o, 2).state.params);
    EXPECT_EQ(second.state.skipped_steps, 1);
}

TEST(Reference, TensorwiseFollowsFloat) {
    const Trial f32 = train(small_options("f32"), 60), bf16 = train(small_options("bf16"), 60), fp8 = train(small_options("tensorwise"), 60);
    EXPECT_LT(f32.steps.back().loss_sum, 0.8f * f32.steps.front().loss_sum);
    double bf16_apart = 0, fp8_apart = 0;
    for (size_t i = 0; i < f32.steps.size(); ++i) {
        bf16_apart += std::fabs(bf16.steps[i].loss_sum - f32.steps[i].loss_sum) / 60;
        fp8_apart += std::fabs(fp8.steps[i].loss_sum - f32.steps[i].loss_sum) / 60;
    }
    EXPECT_GT(bf16_apart, 0);
    EXPECT_LT(bf16_apart, 0.01);
    EXPECT_GT(fp8_apart, bf16_apart);
    EXPECT_LT(fp8_apart, 0.03);
}

// E4M3 keeps 4 significant bits and E5M2 3: rounding errors of about 2% and 5% of a tensor's norm. BF16: 8 bits.
TEST(Reference, GradientErrorIsThatOfTheFormats) {
    const auto gradients = [](const char* recipe) {
        const EngineOptions o = small_options(recipe, 4, 4);
        const Batch batch = make_batch(o, 3);
        const auto engine = make_reference_engine(o);
        engine->load(initial_state(make_parameters(o.model), o.model, 1));
        return engine->gradients(batch.in(0), batch.inputs, batch.targets);
    };
    const std::vector<float> f32 = gradients("f32");
    const double bf16 = relative_difference(gradients("bf16"), f32), fp8 = relative_difference(gradients("tensorwise"), f32);
    EXPECT_GT(bf16, 1e-4);
    EXPECT_LT(bf16, 0.02);
    EXPECT_GT(fp8, 2 * bf16);
    EXPECT_LT(fp8, 0.15);
}

// Dimensions that FP8 tensor cores refuse run in BF16: a model of nothing else has the bits of the recipe `bf16`.
TEST(Reference, LinearsThatFp8RefusesRunInBf16) {
    EngineOptions bf16 = small_options("bf16"), fp8 = small_options("tensorwise");
    for (EngineOptions* o : {&bf16, &fp8}) o->model.dim = 40, o->model.n_heads = 5, o->model.ffn_dim = 152;
    EXPECT_EQ(train(bf16, 2).state.params, train(fp8, 2).state.params);
    for (const LinearRow& row : make_reference_engine(fp8)->linear_table()) EXPECT_EQ(row.precision, "BF16") << row.name;
}

TEST_P(EveryRecipe, EvaluationIsTheTrainingLossAndChangesNothing) {
    const EngineOptions o = small_options(GetParam());
    const Batch batch = make_batch(o, 0);
    const auto engine = make_reference_engine(o);
    engine->load(initial_state(make_parameters(o.model), o.model, 1));
    TrainState before, after;
    engine->save(before);
    const size_t n = batch.inputs.size() / 2;
    double sum = 0;
    for (const size_t at : {size_t(0), n}) sum += engine->evaluate({batch.inputs.data() + at, n}, {batch.targets.data() + at, n});
    engine->save(after);
    EXPECT_EQ(before.params, after.params);
    engine->enqueue_step(batch.in(0), batch.inputs, batch.targets);
    EXPECT_NEAR(engine->collect().loss_sum, sum / batch.valid, 1e-6);
}

TEST(Reference, GradientsChangeNoState) {
    const EngineOptions o = small_options("tensorwise");
    const Batch batch = make_batch(o, 0);
    const auto engine = make_reference_engine(o);
    engine->load(initial_state(make_parameters(o.model), o.model, 1));
    engine->gradients(batch.in(0), batch.inputs, batch.targets);
    EXPECT_EQ(train(*engine, o, 0, 2).state.params, train(o, 2).state.params);
}

TEST(Reference, StepsAreCollectedInOrder) {
    const EngineOptions o = small_options("bf16");
    const auto engine = make_reference_engine(o);
    engine->load(initial_state(make_parameters(o.model), o.model, 1));
    EXPECT_THROW(engine->collect(), Error);
    for (const int step : {7, 8}) {
        const Batch batch = make_batch(o, uint32_t(step));
        engine->enqueue_step(batch.in(step), batch.inputs, batch.targets);
    }
    for (const int step : {7, 8}) {
        const StepState state = engine->collect();
        EXPECT_EQ(state.in.step, step);
        EXPECT_EQ(state.adam_t, step - 6);
    }
    EXPECT_THROW(engine->collect(), Error);
}

TEST(Reference, BadInputIsAnError) {
    EngineOptions o = small_options("bf16");
    const auto engine = make_reference_engine(o);
    engine->load(initial_state(make_parameters(o.model), o.model, 1));
    Batch batch = make_batch(o, 0);
    EXPECT_THROW(engine->evaluate(batch.inputs, batch.targets), Error) << "two micro-batches instead of one";
    batch.inputs[5] = o.model.vocab_size;
    EXPECT_THROW(engine->enqueue_step(batch.in(0), batch.inputs, batch.targets), Error);
    EXPECT_THROW(engine->load(TrainState{}), Error);
    o.seq_len = o.model.seq_len + 1;
    EXPECT_THROW(make_reference_engine(o), Error);
}
