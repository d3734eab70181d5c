// Training spread over ranks against training on one: every --shard, recipe, --reduce-dtype and --replicate, in graphs and eagerly.
//
//   sharding check                        one GPU: every mode with NCCL's own path for one rank, whose slices are the whole
//   mpirun -np N sharding check           N GPUs, 1, 2, 4 or 8; every rank checks and prints, and all must pass
//
// Buffers of several ranks start as NaN, so that nothing is read before it has been gathered, written or reduced. What must hold:
//
//   weights of equal masters, evaluations and logits with them    the bits of one rank
//   two runs; graphs and eager launches                           the same bits
//   masters and moments, saved by one mode, loaded by any other   the same bits
//   a step that is skipped                                        leaves all of them
//   gradients, losses                                             one rank's, within what another order of sums may do
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>

#include "dev/harness.h"
#include "dev/ranks.h"
#include "trainer/distributed/nccl_communicator.h"
#include "trainer/engine.h"

namespace {

constexpr int kSteps = 4, kMicroBatches = 8, kVocabulary = 257, kSequence = 64, kSequences = 2;  // of a micro-batch

struct Shape {
    const char* name;
    int layers, dim, heads, ffn;
};
// Odd sizes. `mixed`: half of a block's matrices cannot be multiplied in FP8 and are a unit of their own. No slice ends with a matrix.
constexpr Shape kShapes[] = {{"five layers", 5, 80, 5, 208}, {"mixed", 3, 48, 3, 200}, {"one layer", 1, 64, 4, 272}};

struct Mode {
    Shard shard;
    int replicate = 1;
    Element element = Element::f32;
};
std::string name_of(const Mode& m) {
    constexpr const char* kNames[] = {"none", "optimizer", "gradients", "full"};
    return message("%s x%d %s", kNames[int(m.shard)], m.replicate, m.element == Element::bf16 ? "bf16" : "f32");
}

std::vector<Mode> all_modes() {
    std::vector<Mode> modes;
    for (const Element element : {Element::f32, Element::bf16}) {
        modes.push_back({Shard::none, 1, element});
        for (const Shard shard : {Shard::optimizer, Shard::gradients, Shard::full})
            for (int replicate = 1; replicate <= world().size(); replicate *= 2)
                if (replicate == 1 || world().size() > 1) modes.push_back({shard, replicate, element});
    }
    return modes;
}

// Made once for all modes that share them; gone before the ranks part.
std::map<std::pair<bool, int>, Parallel>& communicators() {
    static std::map<std::pair<bool, int>, Parallel> made;
    return made;
}

// As the program makes them. On one GPU NCCL's communicator of one rank takes all parts.
Parallel parallel_of(const Mode& mode) {
    Parallel& parallel = communicators()[{mode.shard == Shard::none, mode.replicate}];
    if (parallel.world->silent()) {
        if (world().alone()) {
            parallel.world = nccl_split(world(), 0, {}, true);
            parallel.replicas = parallel.world;
            if (mode.shard != Shard::none) parallel.group = parallel.world;
        } else {
            parallel = make_gpu_parallel(world(), {.shard = mode.shard, .replicate = mode.replicate});
        }
    }
    Parallel of_mode = parallel;
    of_mode.shard = mode.shard;
    of_mode.gradient_element = mode.element;
    return of_mode;
}

// Of one rank that trains the global batch alone.
EngineOptions options_of(const Shape& s, const std::string& recipe, int micro_batches) {
    return {.model = {.name = "sharding", .n_layers = s.layers, .dim = s.dim, .n_heads = s.heads, .ffn_dim = s.ffn, .vocab_size = kVocabulary, .seq_len = kSequence},
            .recipe = find_recipe(recipe), .micro_batch = kSequences, .seq_len = kSequence, .micro_batches_per_step = micro_batches,
            // Epsilon as large as a typical gradient: updates are smooth in the gradients, with a tiny one they are signs.
            .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-3f, .weight_decay = 0.1f, .max_grad_norm = 0.5f}, .deterministic = true, .gemm_cache = "", .logit_rows = 2};
}
EngineOptions spread(EngineOptions o, const Mode& mode, bool graphs = true) {
    o.parallel = parallel_of(mode);
    o.micro_batches_per_step /= world().size();
    o.use_graphs = graphs;
    o.poison = true;
    return o;
}

struct Batch {
    std::vector<int> inputs, targets;
};
// A function of the step; ranks take slices. Some targets are masked, unevenly.
Batch global_batch(int step, int micro_batches) {
    std::mt19937 random(uint32_t(step + 1));
    Batch batch;
    for (int i = 0; i < micro_batches * kSequences * kSequence; ++i) {
        batch.inputs.push_back(int(random() % kVocabulary));
        batch.targets.push_back(random() % uint32_t(3 + i / 64) == 0 ? -1 : (batch.inputs.back() * 7 + 3) % kVocabulary);
    }
    return batch;
}
Batch slice_of(const Batch& all, int rank, int ranks) {
    const auto part = [&](const std::vector<int>& x) {
        const ptrdiff_t n = ptrdiff_t(x.size()) / ranks;
        return std::vector<int>(x.begin() + n * rank, x.begin() + n * (rank + 1));
    };
    return {part(all.inputs), part(all.targets)};
}
StepInputs inputs_of(int step, int micro_batches) {
    return {.step = step, .learning_rate = 1e-2f, .inverse_valid_tokens = 1.0f / float(micro_batches * kSequences * kSequence)};
}

// Weights that are not trivial: vectors too, attention that is not uniform. `nudge`: in the last place, a seed; 0: none.
TrainState whole_state(const ParameterList& list, const ModelSpec& model, int nudge = 0) {
    TrainState state = initial_state(list, model, 7);
    std::mt19937 random(11), noise{uint32_t(nudge)};
    for (const Parameter& p : list.all)
        for (int64_t i = p.offset; i < p.offset + p.count(); ++i) {
            float& x = state.params[size_t(i)];
            x = p.is_vector ? x + 0.1f * (float(random() % 2001) / 1000.0f - 1.0f) : 4.0f * x;
            if (nudge) x = std::nextafter(x, x + float(int(noise() % 3) - 1));
        }
    return state;
}

// Between a state of all parameters, in the order of one rank's list, and what a rank holds.
std::vector<float> held_part(const std::vector<float>& whole, const ParameterList& one, const Held& held) {
    if (whole.empty()) return {};
    std::vector<float> part(size_t(held.elements));
    for (const HeldPiece& piece : held.pieces) std::memcpy(part.data() + piece.offset, whole.data() + one[piece.parameter].offset + piece.first, size_t(piece.count) * sizeof(float));
    return part;
}
TrainState held_part(const TrainState& whole, const ParameterList& one, const Held& held) {
    TrainState part{.params = held_part(whole.params, one, held), .m = held_part(whole.m, one, held), .v = held_part(whole.v, one, held)};
    part.adam_t = whole.adam_t, part.skipped_steps = whole.skipped_steps;
    return part;
}

Held held_of(const EngineOptions& o) {
    const Communicator& group = *o.parallel.group;
    return held_by(make_parameters(o.model, group.size()), group.rank(), group.size());
}

// Of what all ranks hold; each rank gets it.
std::vector<float> whole_of(const std::vector<float>& part, const EngineOptions& o, const ParameterList& one) {
    std::vector<float> whole(size_t(one.flat_elements));
    const std::vector<std::string> parts = world().all_texts({reinterpret_cast<const char*>(part.data()), part.size() * sizeof(float)});
    const int group_size = o.parallel.group->size();
    const ParameterList list = make_parameters(o.model, group_size);
    for (int r = 0; r < world().size(); ++r)
        for (const HeldPiece& piece : held_by(list, r % group_size, group_size).pieces)
            std::memcpy(whole.data() + one[piece.parameter].offset + piece.first, parts[size_t(r)].data() + piece.offset * int64_t(sizeof(float)), size_t(piece.count) * sizeof(float));
    return whole;
}

struct Outcome {
    std::vector<float> losses, norms, gradients;  // gradients of the first step, in the order of one rank's list
    TrainState state;                             // whole
    uint64_t digest_at_start = 0, digest_at_end = 0;
    std::vector<float> evaluated;  // loss and logits of a micro-batch of this rank's own, before the first step
    bool skipped = false;
};

Outcome train(const EngineOptions& o, const TrainState& start, const ParameterList& one, int ranks, int micro_batches) {
    const ParameterList list = make_parameters(o.model, o.parallel.group->size());
    const int rank = ranks == 1 ? 0 : world().rank();
    const std::unique_ptr<Engine> engine = make_gpu_engine(o);
    engine->load(held_part(start, one, held_of(o)));
    Outcome r;
    r.digest_at_start = engine->weights_digest();

    const Batch own = slice_of(global_batch(1000 + world().rank(), 1), 0, 1);  // every rank another one
    r.evaluated.resize(2 * kVocabulary + own.inputs.size());
    const int positions[] = {3, kSequence + 5};
    engine->logits(own.inputs, positions, {r.evaluated.data(), size_t(2 * kVocabulary)});
    engine->token_losses(own.inputs, own.targets, {r.evaluated.data() + 2 * kVocabulary, own.inputs.size()});

    for (int step = 0; step < kSteps; ++step) {
        const Batch batch = slice_of(global_batch(step, micro_batches), rank, ranks);
        const StepInputs in = inputs_of(step, micro_batches);
        if (step == 0) {
            const std::vector<float> flat = engine->gradients(in, batch.inputs, batch.targets);
            r.gradients.resize(size_t(one.flat_elements));
            for (size_t i = 0; i < list.all.size(); ++i) std::copy_n(flat.begin() + list.all[i].offset, list.all[i].padded_count(), r.gradients.begin() + one.all[i].offset);
        }
        engine->enqueue_step(in, batch.inputs, batch.targets);
        const StepResult result = engine->collect();
        r.losses.push_back(result.loss_sum), r.norms.push_back(result.grad_norm);
        r.skipped = r.skipped || result.skip_update;
    }
    r.digest_at_end = engine->weights_digest();
    TrainState part;
    engine->save(part);
    r.state = part;
    if (ranks > 1) r.state.params = whole_of(part.params, o, one), r.state.m = whole_of(part.m, o, one), r.state.v = whole_of(part.v, o, one);
    return r;
}

// By parameters: gaps are no one's.
bool same_bits(const std::vector<float>& a, const std::vector<float>& b, const ParameterList& list) {
    for (const Parameter& p : list.all)
        if (std::memcmp(a.data() + p.offset, b.data() + p.offset, size_t(p.padded_count()) * sizeof(float)) != 0) return false;
    return true;
}
bool same_bits(const TrainState& a, const TrainState& b, const ParameterList& list) {
    return same_bits(a.params, b.params, list) && same_bits(a.m, b.m, list) && same_bits(a.v, b.v, list) && a.adam_t == b.adam_t;
}
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// ||a - b|| / ||b|| of the worst parameter; a gradient that is zero in theory (the bias of the keys) counts against a hundredth of
// the root mean square of all.
double worst_difference(const std::vector<float>& a, const std::vector<float>& b, const ParameterList& list) {
    double all = 0, worst = 0;
    for (const float x : b) all += double(x) * double(x);
    const double floor_of_one = 1e-4 * all / double(b.size());
    for (const Parameter& p : list.all) {
        double error = 0, norm = 0;
        for (int64_t i = p.offset; i < p.offset + p.padded_count(); ++i) {
            const double difference = double(a[size_t(i)]) - double(b[size_t(i)]);
            error += difference * difference, norm += double(b[size_t(i)]) * double(b[size_t(i)]);
        }
        const double relative = std::sqrt(error / std::max({norm, floor_of_one * double(p.padded_count()), 1e-60}));
        worst = relative >= 0 ? std::max(worst, relative) : INFINITY;
    }
    return worst;
}

// The micro-batches' gradients are the same numbers in every mode, added up in another order: FP32 sums over 1024 tokens, roundings of
// 2^-24 like independent ones, of running sums that cancellation leaves at most about 30 times the result. An FP8 GEMM that
// overwrites may be another algorithm than one that adds, and keeps 14 bits of a partial sum (dev/linear: 2e-3). BF16: a rounding
// of 2^-9 when a gradient leaves and one for every hop, in the group and among the replicas, in up to 8 micro-batches that partly
// cancel: times 3.
double gradient_tolerance(const Mode& mode, const Recipe& recipe) {
    const double order = 30 * std::sqrt(1024.0) * std::ldexp(1.0, -24), fp8 = recipe.quantizes() ? 2e-3 : 0;
    const double bf16 = mode.element == Element::bf16 ? 3 * (world().size() + 2) * std::ldexp(1.0, -9) : 0;
    return order + fp8 + bf16;
}

// What noise in the last place of the weights does to one rank's losses: 3 times the largest of three runs up to each step, and at
// least 2^-20 of the loss.
std::vector<double> loss_tolerances(const EngineOptions& o, const ParameterList& one, const Outcome& alone, int micro_batches) {
    std::vector<double> tolerances(kSteps);
    for (int nudge = 1; nudge <= 3; ++nudge) {
        const Outcome moved = train(o, whole_state(one, o.model, nudge), one, 1, micro_batches);
        double most = 0;
        for (int i = 0; i < kSteps; ++i) {
            most = std::max(most, std::abs(double(moved.losses[size_t(i)]) - double(alone.losses[size_t(i)])));
            tolerances[size_t(i)] = std::max({tolerances[size_t(i)], 3 * most, std::ldexp(double(alone.losses[size_t(i)]), -20)});
        }
    }
    return tolerances;
}

struct Case {
    Shape shape;
    std::string recipe;
    int micro_batches;  // of the global batch
};

struct Alone {
    EngineOptions options;
    ParameterList list;
    TrainState start;
    Outcome outcome;
    std::vector<double> loss_tolerances;
};

void check_mode(Report& report, const Case& c, const Alone& alone, const Mode& mode) {
    const std::string text = message("%s, %s, %s, %d ranks, %d micro-batches", name_of(mode).c_str(), c.recipe.c_str(), c.shape.name, world().size(), c.micro_batches);
    const int ranks = world().size();
    const auto run = [&](bool graphs) { return train(spread(alone.options, mode, graphs), alone.start, alone.list, ranks, c.micro_batches); };
    const Outcome first = run(true);
    const Outcome& one = alone.outcome;
    // Of groups of several ranks, which mpirun puts on one machine: otherwise the slower way would be taken in silence.
    const Communicator& group = *parallel_of(mode).group;
    if (group.size() > 1) report.expect("copy engines", text, group.copies(), "carry gathers and slices of gradients");
    report.expect("weights of equal masters", text, first.digest_at_start == one.digest_at_start, message("%016llx", (unsigned long long)first.digest_at_start));
    report.expect("logits, losses of tokens", text, same_bits(first.evaluated, one.evaluated), "equal bitwise");
    report.expect("no step skipped", text, !first.skipped, "none");

    const double bound = gradient_tolerance(mode, alone.options.recipe), difference = worst_difference(first.gradients, one.gradients, alone.list);
    report.expect("gradients", text, difference <= bound, message("rel %.1e, tol %.1e", difference, bound));
    double worst = 0;  // of a step's tolerance
    for (int i = 0; i < kSteps; ++i) {
        // What is off in the gradients is off in what they have moved, which the loss follows; before the first update nothing is.
        const double moved = 2 * bound * std::abs(double(one.losses[size_t(i)]) - double(one.losses[0]));
        const double off = std::abs(double(first.losses[size_t(i)]) - double(one.losses[size_t(i)])) / (alone.loss_tolerances[size_t(i)] + moved);
        worst = off >= 0 ? std::max(worst, off) : INFINITY;
    }
    report.expect("losses", text, worst <= 1, message("%.2f of the tolerance, last %.5f", worst, double(first.losses.back())));
    const double norm_off = std::abs(double(first.norms[0]) / double(one.norms[0]) - 1);
    report.expect("gradient norm", text, norm_off <= bound, message("rel %.1e, tol %.1e", norm_off, bound));

    if (c.micro_batches != kMicroBatches || mode.replicate > 1) return;
    const Outcome again = run(true), eager = run(false);
    const auto equal = [&](const Outcome& other) {
        return same_bits(first.losses, other.losses) && same_bits(first.norms, other.norms) && same_bits(first.state, other.state, alone.list) && first.digest_at_end == other.digest_at_end;
    };
    report.expect("two runs", text, equal(again), "equal bitwise");
    report.expect("graphs and eager", text, equal(eager), "equal bitwise");
}

// A state with moments, loaded by every mode and saved by it.
void check_resharding(Report& report, const Case& c, const Alone& alone) {
    for (const Mode& mode : all_modes()) {
        if (mode.element != Element::f32) continue;
        const EngineOptions o = spread(alone.options, mode);
        const std::unique_ptr<Engine> engine = make_gpu_engine(o);
        engine->load(held_part(alone.outcome.state, alone.list, held_of(o)));
        const uint64_t digest = engine->weights_digest();
        TrainState saved;
        engine->save(saved);
        saved.params = whole_of(saved.params, o, alone.list), saved.m = whole_of(saved.m, o, alone.list), saved.v = whole_of(saved.v, o, alone.list);
        const std::string text = message("%s, %s, %s, %d ranks", name_of(mode).c_str(), c.recipe.c_str(), c.shape.name, world().size());
        report.expect("loaded and saved again", text, same_bits(saved, alone.outcome.state, alone.list), "equal bitwise");
        report.expect("weights after it", text, digest == alone.outcome.digest_at_end, message("%016llx, trained %016llx", (unsigned long long)digest, (unsigned long long)alone.outcome.digest_at_end));
    }
}

// What one rank alone meets is every rank's: a loss that is NaN, and gradients that are finite like the loss, as BF16 and FP32 hold
// them, but whose squares are not, so that only the norm can tell. A limit skips without either. Each counts once, then training
// goes on.
void check_skipping(Report& report, const Case& c, const Alone& alone) {
    for (const Mode& mode : all_modes()) {
        const EngineOptions o = spread(alone.options, mode);
        const std::unique_ptr<Engine> engine = make_gpu_engine(o);
        engine->load(held_part(alone.start, alone.list, held_of(o)));
        const std::string text = message("%s, %s, %s, %d ranks", name_of(mode).c_str(), c.recipe.c_str(), c.shape.name, world().size());
        const Batch batch = slice_of(global_batch(0, c.micro_batches), world().rank(), world().size());
        const auto step = [&](StepInputs in) {
            engine->enqueue_step(in, batch.inputs, batch.targets);
            return engine->collect();
        };
        StepInputs bad = inputs_of(0, c.micro_batches), huge = bad, limited = bad;
        if (world().rank() == world().size() - 1) bad.inverse_valid_tokens = NAN, huge.inverse_valid_tokens = 1e20f;
        limited.loss_limit = 0;
        const StepResult nan = step(bad), infinite = step(huge), outlier = step(limited);
        TrainState saved;
        engine->save(saved);
        const TrainState start = held_part(alone.start, alone.list, held_of(o));
        bool same = saved.adam_t == 0 && saved.skipped_steps == 3 && engine->weights_digest() == alone.outcome.digest_at_start;
        for (const HeldPiece& piece : held_of(o).pieces) same = same && std::memcmp(saved.params.data() + piece.offset, start.params.data() + piece.offset, size_t(piece.count) * sizeof(float)) == 0;
        report.expect("gradients beyond float", text, infinite.skip_update && infinite.nonfinite && std::isfinite(infinite.loss_sum) && !std::isfinite(infinite.grad_norm),
                      message("loss %g, norm %g", double(infinite.loss_sum), double(infinite.grad_norm)));
        report.expect("skipped steps", text, nan.skip_update && nan.nonfinite && outlier.skip_update && !outlier.nonfinite && same, "leave weights and moments");
        const StepResult good = step(inputs_of(0, c.micro_batches));
        const double off = std::abs(double(good.loss_sum) - double(alone.outcome.losses[0]));
        report.expect("the step after them", text, !good.skip_update && off <= alone.loss_tolerances[0], message("loss %.6f", double(good.loss_sum)));
    }
}

void checks(Report& report) {
    const std::string obstacle = nccl_obstacle();
    if (!obstacle.empty()) return report.skip("sharding", "NCCL", obstacle);
    REQUIRE(kMicroBatches % world().size() == 0, "sharding runs on 1, 2, 4 or 8 ranks, not on %d", world().size());
    take_a_gpu();
    for (const Shape& shape : kShapes)
        for (const char* recipe : {"bf16", "tensorwise"})
            for (const int micro_batches : {kMicroBatches, world().size()}) {  // several for each rank, and one
                const bool several = micro_batches == kMicroBatches, mixed = shape.layers == 3;
                if (report.small_only && !(mixed && several)) continue;
                const Case c{shape, recipe, micro_batches};
                Alone alone{.options = options_of(shape, recipe, micro_batches), .list = {}, .start = {}, .outcome = {}, .loss_tolerances = {}};
                alone.list = make_parameters(alone.options.model);
                alone.start = whole_state(alone.list, alone.options.model);
                alone.outcome = train(alone.options, alone.start, alone.list, 1, micro_batches);
                alone.loss_tolerances = loss_tolerances(alone.options, alone.list, alone.outcome, micro_batches);
                for (const Mode& mode : all_modes())
                    if (several || mode.element == Element::f32) check_mode(report, c, alone, mode);
                if (several) check_resharding(report, c, alone);
                if (several && mixed) check_skipping(report, c, alone);
            }
    communicators().clear();
}

void no_benches(Report&) {}  // speeds: tests/gpu/multi_gpu.py

}  // namespace

int main(int argc, char** argv) { return run_dev_program_of_ranks<checks, no_benches>(argc, argv, "sharding"); }
