// AdamW and the scalars of a step against a double reference over several steps; skipped steps; copies; speed.
#include "kernels/adamw.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>

#include "dev/harness.h"
#include "trainer/reference/quantizer.h"

namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kPartials = 1024;

int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// Where the gradients lie: as the parameters do, or from the last tensor to the first (as ranks' buffers may differ).
enum class GradOrder { of_parameters, reversed };

// Parameters on the device, in flat arrays with padding between the tensors.
struct Model {
    std::vector<AdamWTensor> tensors;
    int64_t elements = 0;
    int blocks = 0;
    std::unique_ptr<DeviceBuffer<float>> params, grads, m, v;
    std::unique_ptr<DeviceBuffer<__nv_bfloat16>> copies;
    std::unique_ptr<DeviceBuffer<QuantSlot>> slots;
    std::unique_ptr<DeviceBuffer<AdamWTensor>> table;
    DeviceBuffer<StepState> state{std::vector<StepState>{StepState{}}};
    DeviceBuffer<float> partials{size_t(kPartials)};

    explicit Model(const std::vector<int64_t>& counts, GradOrder grad_order = GradOrder::of_parameters) {
        for (const int64_t count : counts) {
            const size_t i = tensors.size();
            // Two in three have a copy, two in three a slot, every other one decays.
            tensors.push_back({.offset = elements, .grad_offset = elements, .count = count, .bf16_copy = nullptr, .slot = nullptr,
                               .weight_decay = i % 2 ? 0.1f : 0.0f, .first_block = -1});
            elements += padded(count);
        }
        for (AdamWTensor& t : tensors)
            if (grad_order == GradOrder::reversed) t.grad_offset = elements - t.offset - padded(t.count);
        params = std::make_unique<DeviceBuffer<float>>(size_t(elements));
        grads = std::make_unique<DeviceBuffer<float>>(size_t(elements));
        m = std::make_unique<DeviceBuffer<float>>(size_t(elements));
        v = std::make_unique<DeviceBuffer<float>>(size_t(elements));
        copies = std::make_unique<DeviceBuffer<__nv_bfloat16>>(size_t(elements));
        const QuantSlot untouched{.inv_scale = 1.5f, .scale = 2.5f, .amax_bits = 77, .unused = 9};
        slots = std::make_unique<DeviceBuffer<QuantSlot>>(std::vector<QuantSlot>(tensors.size(), untouched));
        for (size_t i = 0; i < tensors.size(); i++) {
            if (i % 3 != 0) tensors[i].bf16_copy = copies->get() + tensors[i].offset;
            if (i % 3 != 1) tensors[i].slot = slots->get() + i;
        }
        blocks = adamw_plan(tensors.data(), int(tensors.size()));
        table = std::make_unique<DeviceBuffer<AdamWTensor>>(tensors);
    }
    AdamWUpdate update(const AdamWConfig& config) const {
        return {.tensors = table->get(), .n_tensors = int(tensors.size()), .blocks = blocks, .params = params->get(),
                .grads = grads->get(), .m = m->get(), .v = v->get(), .state = state.get(), .config = config};
    }
    OptimizerPrepare prepare(const AdamWConfig& config) const {
        return {.state = state.get(), .norm_partials = partials.get(), .n_partials = kPartials,
                .tensors = table->get(), .n_tensors = int(tensors.size()), .config = config};
    }
    bool guards_intact() const {
        return params->guards_intact() && grads->guards_intact() && m->guards_intact() && v->guards_intact() &&
               copies->guards_intact() && slots->guards_intact() && table->guards_intact() && state.guards_intact();
    }
    // Is element i of the flat arrays one of a tensor, not of the padding?
    std::vector<bool> used() const {
        std::vector<bool> in_tensor(size_t(elements), false);
        for (const AdamWTensor& t : tensors) std::fill_n(in_tensor.begin() + t.offset, t.count, true);
        return in_tensor;
    }
    // Gradients given in the order of the parameters, as they lie in `grads`.
    void upload_grads(const std::vector<float>& values) {
        std::vector<float> arranged(values.size(), 0.0f);
        for (const AdamWTensor& t : tensors) std::copy_n(values.begin() + t.offset, t.count, arranged.begin() + t.grad_offset);
        grads->upload(arranged);
    }
    template <class T>
    std::vector<T> of_tensor(const std::vector<T>& flat, const AdamWTensor& t) const {
        return {flat.begin() + t.offset, flat.begin() + t.offset + t.count};
    }
};

// What the harness of a step leaves in the state before optimizer_prepare.
void begin_step(Model& model, float learning_rate, float loss_sum, uint32_t nonfinite = 0) {
    StepState state = model.state.download()[0];
    state.in.step += 1;
    state.in.learning_rate = learning_rate;
    state.loss_sum = loss_sum;
    state.nonfinite = nonfinite;
    model.state.upload({state});
}

// Partial sums of squares as global_norm would leave them, and their exact total.
double upload_partials(Model& model, const std::vector<float>& grads) {
    std::vector<float> partials(kPartials);
    double total = 0;
    const size_t chunk = (grads.size() + kPartials - 1) / kPartials;
    for (size_t i = 0; i < partials.size(); i++) {
        double sum = 0;
        for (size_t at = i * chunk; at < std::min(grads.size(), (i + 1) * chunk); at++)
            sum += double(grads[at]) * double(grads[at]);
        partials[i] = float(sum);
        total += sum;
    }
    model.partials.upload(partials);
    return total;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// BF16 copies and amaxes belong to the weights; tensors without them, and the padding, stay as they were.
bool copies_follow(const Model& model, const std::vector<float>& params, const std::vector<__nv_bfloat16>& copies) {
    std::vector<uint16_t> expected(copies.size(), 0xffff), got(copies.size());
    std::memcpy(got.data(), copies.data(), copies.size() * 2);
    for (const AdamWTensor& t : model.tensors)
        for (int64_t i = t.offset; t.bf16_copy && i < t.offset + t.count; i++) expected[i] = bf16_bits(params[i]);
    return got == expected;
}
bool slots_follow(const Model& model, const std::vector<float>& params, const std::vector<QuantSlot>& slots) {
    for (size_t i = 0; i < slots.size(); i++) {
        const std::vector<float> weights = model.of_tensor(params, model.tensors[i]);
        const uint32_t amax = model.tensors[i].slot ? std::bit_cast<uint32_t>(amax_of(weights)) : 77;
        if (slots[i].amax_bits != amax || slots[i].scale != 2.5f || slots[i].inv_scale != 1.5f || slots[i].unused != 9)
            return false;
    }
    return true;
}

std::vector<int64_t> odd_counts(bool small) {
    std::vector<int64_t> counts = {64, 1, 63, 65, 2, 3, 4, 4095, 4096, 4097, 8192, 12289, 1021, 768 * 3};
    for (int i = 0; i < 300; i++) counts.push_back(1 + i % 130);  // more tensors than a block has threads
    if (!small) counts.insert(counts.end(), {1000003, 768 * 3072, 50257 * 64 + 1});
    return counts;
}

// ---------------------------------------------------------------------------------------------------------------------
// Several steps

// A parameter in double, and how far the float one may be from it: the float operations of kernels/adamw.cu one by one, each
// off by at most u = 2^-24 of its result, carried from step to step. A sum's terms may cancel, as those of m do when its
// signs differ: then the bound is large beside the result, and relative to it no bound would hold.
constexpr double kU = 0x1p-24;
constexpr double kSmallest = 0x1p-149;      // what an underflow costs
constexpr double kSecondOrder = 1 + 0x1p-10;  // products of two roundings, of which there are far fewer than 2^14 u

struct Element {
    double p = 0, m = 0, v = 0;
    double error_p = 0, error_m = 0, error_v = 0;
};

struct StepScalars {
    double b1, b2, eps, learning_rate, clip, correction1, correction2;
    // Of clip = limit / (norm + 1e-6): the partial sums are floats, half of which is left after the root; then the norm, the
    // sum and the quotient are rounded. 1 is exact.
    double clip_error() const { return clip < 1 ? 3.5 * kU : 0; }
};

void step(Element& e, double grad, double decay, const StepScalars& s) {
    const double g = grad * s.clip, g_error = s.clip_error() + kU;  // relative
    // m = fma(b1, m, (1 - b1) * g), v = fma(b2, v, ((1 - b2) * g) * g); 1 - b is exact
    const double m_term = (1 - s.b1) * g, v_term = (1 - s.b2) * g * g;
    e.m = s.b1 * e.m + m_term;
    e.v = s.b2 * e.v + v_term;
    e.error_m = s.b1 * e.error_m + std::fabs(m_term) * (g_error + kU) + kU * std::fabs(e.m) + kSmallest;
    e.error_v = s.b2 * e.error_v + v_term * (2 * g_error + 2 * kU) + kU * e.v + kSmallest;

    // 1 / sqrt(1 - b2^t): half of the correction's rounding, the root's, the quotient's; then the root of v, and the fma with eps
    const double root = std::sqrt(e.v / s.correction2), denominator = root + s.eps;
    const double root_error = e.v > 0 ? root * (0.5 * e.error_v / e.v + 3.5 * kU) : std::sqrt(kSmallest / s.correction2);
    // lr / (1 - b1^t): the correction's rounding and the quotient's; then m / denominator
    const double update = s.learning_rate / s.correction1 * e.m / denominator;
    const double update_error = s.learning_rate / s.correction1 * e.error_m / denominator +
                                std::fabs(update) * (root_error / denominator + kU + 2 * kU + kU);
    // 1 - lr * decay: the product's rounding and the difference's; p * that; the last fma
    const double keep = 1 - s.learning_rate * decay, kept = e.p * keep;
    e.error_p = keep * e.error_p + std::fabs(e.p) * (s.learning_rate * decay + 1) * kU + kU * std::fabs(kept) + update_error;
    e.p = kept - update;
    e.error_p += kU * std::fabs(e.p);
}

// Every element within its bound; the figure is the one that uses most of it.
void expect_within(Report& report, const std::string& name, const std::string& shape, const std::vector<float>& got,
                   const std::vector<Element>& reference, double Element::*value, double Element::*error) {
    double most = 0;
    size_t worst = 0;
    for (size_t i = 0; i < got.size(); i++) {
        const double off = std::fabs(double(got[i]) - reference[i].*value), bound = kSecondOrder * reference[i].*error;
        const double share = off == 0 ? 0 : off / bound;
        if (!(share <= most)) most = std::isnan(share) ? kInfinity : share, worst = i;  // a NaN is the worst
    }
    report.expect(name, shape, most <= 1, message("%.2f of the bound, [%zu] %.9g, expected %.9g +- %.1e", most, worst, double(got[worst]),
                                                  reference[worst].*value, kSecondOrder * reference[worst].*error));
}

void check_steps(Report& report, float max_grad_norm, GradOrder grad_order = GradOrder::of_parameters) {
    Model model(odd_counts(report.small_only), grad_order);
    const AdamWConfig config{.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f,
                             .max_grad_norm = max_grad_norm};
    const size_t n = size_t(model.elements);
    std::vector<float> params = random_normal(n, 0.1f), m(n, 0.0f), v(n, 0.0f);
    const std::vector<bool> used = model.used();
    for (size_t i = 0; i < n; i++)
        if (!used[i]) params[i] = 123.0f, m[i] = 124.0f, v[i] = 125.0f;  // padding
    model.params->upload(params), model.m->upload(m), model.v->upload(v);
    std::vector<Element> reference(n);  // zeros in the padding
    for (size_t i = 0; i < n; i++)
        if (used[i]) reference[i].p = params[i];

    const float rates[] = {0.3f, 1e-3f, 0.05f, 0.2f, 6e-4f};
    int64_t t = 0;
    for (const float rate : rates) {
        // Some gradients are zero (unseen tokens), their sizes differ from step to step; clipping is not always active.
        std::vector<float> grads = random_normal(n, t % 2 ? 1e-6f : 0.01f);
        for (size_t i = 0; i < n; i++)
            if (!used[i] || i % 97 == 0) grads[i] = 0.0f;
        model.upload_grads(grads);
        const double norm = std::sqrt(upload_partials(model, grads));
        begin_step(model, rate, 3.5f);
        optimizer_prepare(model.prepare(config), nullptr);
        const std::vector<QuantSlot> zeroed = model.slots->download();
        bool zeroes = true;
        for (size_t i = 0; i < zeroed.size(); i++) zeroes &= zeroed[i].amax_bits == (model.tensors[i].slot ? 0u : 77u);
        adamw_update(model.update(config), nullptr);
        t += 1;

        const double clip = max_grad_norm > 0 ? std::min(1.0, max_grad_norm / (norm + 1e-6)) : 1.0;
        const double b1 = double(config.beta1), b2 = double(config.beta2);
        const double correction1 = 1 - std::pow(b1, double(t)), correction2 = 1 - std::pow(b2, double(t));
        const StepScalars scalars{.b1 = b1, .b2 = b2, .eps = double(config.eps), .learning_rate = double(rate), .clip = clip,
                                  .correction1 = correction1, .correction2 = correction2};
        for (const AdamWTensor& tensor : model.tensors)
            for (int64_t i = tensor.offset; i < tensor.offset + tensor.count; i++)
                step(reference[i], double(grads[i]), double(tensor.weight_decay), scalars);

        const std::string shape = message("step %lld, max norm %g%s", (long long)t, double(max_grad_norm),
                                          grad_order == GradOrder::reversed ? ", gradients reversed" : "");
        const StepState state = model.state.download()[0];
        const auto close = [](float a, double b) { return std::fabs(double(a) - b) <= 3e-7 * std::fabs(b); };
        report.expect("prepare", shape,
                      close(state.grad_norm, norm) && close(state.clip_scale, clip) && zeroes && state.adam_t == t &&
                          state.skipped_steps == 0 && state.skip_update == 0 && state.nonfinite == 0 &&
                          close(state.bias_correction1, correction1) && close(state.bias_correction2, correction2),
                      message("norm %g, clip %g (%g), t %lld, corrections %g %g", double(state.grad_norm),
                              double(state.clip_scale), clip, (long long)state.adam_t, double(state.bias_correction1),
                              double(state.bias_correction2)));
        params = model.params->download(), m = model.m->download(), v = model.v->download();
        const bool copies = copies_follow(model, params, model.copies->download());
        const bool slots = slots_follow(model, params, model.slots->download());
        bool padding = true;
        for (size_t i = 0; i < n; i++)
            if (!used[i]) {
                padding &= params[i] == 123.0f && m[i] == 124.0f && v[i] == 125.0f;
                params[i] = m[i] = v[i] = 0.0f;  // out of the comparisons: they would hide errors of small tensors
            }
        expect_within(report, "params", shape, params, reference, &Element::p, &Element::error_p);
        expect_within(report, "m", shape, m, reference, &Element::m, &Element::error_m);
        expect_within(report, "v", shape, v, reference, &Element::v, &Element::error_v);
        report.expect("copies, slots, padding, guards", shape, copies && slots && padding && model.guards_intact(),
                      message("copies %d slots %d padding %d", copies, slots, padding));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Clipping, skipped steps, refreshed copies

void check_clip(Report& report) {
    Model model({1000, 77});
    struct Clip {
        float norm, limit;
    };
    for (const auto [norm, limit] : {Clip{4.0f, 1.0f}, Clip{0.25f, 1.0f}, Clip{3.0f, 0.0f}, Clip{3.0f, -1.0f},
                                     Clip{1e-18f, 1.0f}, Clip{1e15f, 2.0f}, Clip{0.0f, 1.0f}}) {
        std::vector<float> partials(kPartials, 0.0f);
        partials[5] = norm * norm * 0.75f, partials[1023] = norm * norm * 0.25f;
        model.partials.upload(partials);
        begin_step(model, 1e-3f, 1.0f);
        optimizer_prepare(model.prepare({.beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .weight_decay = 0.0f,
                                         .max_grad_norm = limit}), nullptr);
        const StepState state = model.state.download()[0];
        const double expected = limit > 0 ? std::min(1.0, double(limit) / (double(norm) + 1e-6)) : 1.0;
        report.expect("clip by the norm", message("norm %g limit %g", double(norm), double(limit)),
                      std::fabs(state.clip_scale - expected) <= 3e-7 * expected &&
                          std::fabs(state.grad_norm - norm) <= 3e-7 * norm && state.skip_update == 0,
                      message("norm %g, scale %g", double(state.grad_norm), double(state.clip_scale)));
    }
}

void check_skip(Report& report) {
    Model model(odd_counts(true));
    const AdamWConfig config{.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .max_grad_norm = 1.0f};
    const size_t n = size_t(model.elements);
    const std::vector<float> params = random_normal(n), grads = random_normal(n), m = random_normal(n, 0.1f);
    const std::vector<float> v = random_uniform(n, 0.0f, 1.0f);
    const std::vector<__nv_bfloat16> copies = to_bf16(random_normal(n));
    model.params->upload(params), model.grads->upload(grads), model.m->upload(m), model.v->upload(v);
    model.copies->upload(copies);
    const std::vector<QuantSlot> slots = model.slots->download();

    struct Fault {
        const char* name;
        float partial, loss;
        uint32_t flag;
    };
    int64_t skipped = 0;
    for (const Fault& fault : {Fault{"NaN norm", kNan, 1.0f, 0}, Fault{"infinite norm", kInfinity, 1.0f, 0},
                               Fault{"NaN loss", 1.0f, kNan, 0}, Fault{"infinite loss", 1.0f, -kInfinity, 0},
                               Fault{"raised flag", 1.0f, 1.0f, 1}}) {
        std::vector<float> partials(kPartials, 0.5f);
        partials[kPartials - 1] = fault.partial;
        model.partials.upload(partials);
        begin_step(model, 0.1f, fault.loss, fault.flag);
        const StepState before = model.state.download()[0];
        optimizer_prepare(model.prepare(config), nullptr);
        adamw_update(model.update(config), nullptr);
        skipped += 1;
        const StepState state = model.state.download()[0];
        report.expect("skipped step", fault.name,
                      same_bits(model.params->download(), params) && same_bits(model.m->download(), m) &&
                          same_bits(model.v->download(), v) && same_bits(model.copies->download(), copies) &&
                          same_bits(model.slots->download(), slots) && state.adam_t == before.adam_t &&
                          state.skipped_steps == skipped && state.skip_update == 1 && state.nonfinite == 1 &&
                          state.in.step == before.in.step && same_bits<float>({state.loss_sum}, {before.loss_sum}),
                      message("t %lld, skipped %lld", (long long)state.adam_t, (long long)state.skipped_steps));
    }

    model.partials.upload(std::vector<float>(kPartials, 0.5f));
    begin_step(model, 0.1f, 1.0f);
    optimizer_prepare(model.prepare(config), nullptr);
    adamw_update(model.update(config), nullptr);
    const StepState state = model.state.download()[0];
    report.expect("step after skipped ones", "", state.adam_t == 1 && state.skip_update == 0 &&
                      state.skipped_steps == skipped && !same_bits(model.params->download(), params),
                  message("t %lld", (long long)state.adam_t));
    report.expect("skip guards", "", model.guards_intact(), "intact");
}

void check_refresh(Report& report) {
    Model model(odd_counts(report.small_only));
    const std::vector<float> params = random_normal(size_t(model.elements));
    model.params->upload(params);
    std::vector<QuantSlot> slots = model.slots->download();
    for (size_t i = 0; i < slots.size(); i++) slots[i].amax_bits = model.tensors[i].slot ? 0 : 77;
    model.slots->upload(slots);
    AdamWUpdate refresh = model.update({});
    refresh.grads = nullptr, refresh.m = nullptr, refresh.v = nullptr, refresh.state = nullptr;
    adamw_refresh_copies(refresh, nullptr);
    report.expect("refreshed copies", message("%lld elements", (long long)model.elements),
                  copies_follow(model, params, model.copies->download()) &&
                      slots_follow(model, params, model.slots->download()) &&
                      same_bits(model.params->download(), params) && model.guards_intact(),
                  "copies and amaxes bitwise, weights unchanged");
}

void checks(Report& report) {
    check_steps(report, 1.0f);
    check_steps(report, 0.0f);
    check_steps(report, 1.0f, GradOrder::reversed);
    check_clip(report);
    check_skip(report);
    check_refresh(report);
}

// ---------------------------------------------------------------------------------------------------------------------
// Speed

void fill(DeviceBuffer<float>& buffer, const std::vector<float>& pool) {
    for (size_t at = 0; at < buffer.size(); at += pool.size())
        CUDA_CHECK(cudaMemcpy(buffer.get() + at, pool.data(), std::min(pool.size(), buffer.size() - at) * sizeof(float),
                              cudaMemcpyHostToDevice));
}

void bench_model(Report& report, const char* name, int64_t layers, int64_t C) {
    std::vector<int64_t> counts = {50304 * C, 1024 * C, C, C};
    for (int64_t layer = 0; layer < layers; layer++)
        counts.insert(counts.end(), {C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C});
    Model model(counts);
    for (size_t i = 0; i < model.tensors.size(); i++) {  // a copy and a slot for every tensor: 30 bytes a parameter
        model.tensors[i].bf16_copy = model.copies->get() + model.tensors[i].offset;
        model.tensors[i].slot = model.slots->get() + i;
    }
    model.table->upload(model.tensors);
    const size_t pool = size_t(1) << 22;
    fill(*model.params, random_normal(pool, 0.02f)), fill(*model.grads, random_normal(pool, 1e-3f));
    fill(*model.m, random_normal(pool, 1e-3f)), fill(*model.v, random_uniform(pool, 1e-8f, 1e-6f));
    const AdamWConfig config{.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .max_grad_norm = 1.0f};
    model.partials.upload(std::vector<float>(kPartials, 0.01f));
    begin_step(model, 1e-6f, 1.0f);  // so small that the weights stay sensible over thousands of calls
    optimizer_prepare(model.prepare(config), nullptr);
    report.bench({.name = "adamw_update", .shape = name, .bytes = 30.0 * double(model.elements)},
                 [&](int, cudaStream_t s) { adamw_update(model.update(config), s); });
    report.bench({.name = "adamw_refresh_copies", .shape = name, .bytes = 6.0 * double(model.elements)},
                 [&](int, cudaStream_t s) { adamw_refresh_copies(model.update(config), s); });
    report.bench({.name = "optimizer_prepare", .shape = name},
                 [&](int, cudaStream_t s) { optimizer_prepare(model.prepare(config), s); });
}

void benches(Report& report) {
    bench_model(report, "124M", 12, 768);
    bench_model(report, "1558M", 48, 1600);
}
}  // namespace

int main(int argc, char** argv) { return run_dev_program(argc, argv, "adamw", checks, benches); }
