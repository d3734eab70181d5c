// The reference device: GPT-2's whole training step in plain C++, for `--device cpu` and as the oracle of the GPU's tests.
//
// Every tensor is float. Where the GPU stores BF16, store() rounds to it; where it multiplies in FP8, reference::Linear
// casts with the exact rule. What the GPU keeps on chip (scores, probabilities, sums) is not rounded, so the two differ
// by the order of sums and by the BF16 rounding of P and dS inside the GPU's attention. The parameters are those of a
// ParameterStore, which alone knows of ranks.
#include "trainer/engine.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <utility>

#include "kernels/common/check.h"
#include "kernels/common/mark.h"
#include "trainer/reference/adamw.h"
#include "trainer/reference/linear.h"
#include "trainer/reference/matmul.h"
#include "trainer/reference/ops.h"
#include "trainer/reference/parameter_store.h"
#include "trainer/reference/quantizer.h"

namespace {

using reference::Linear;

struct NormStatistics {
    std::vector<float> mean, rstd;  // (rows)
    explicit NormStatistics(size_t rows) : mean(rows), rstd(rows) {}
};

// A block's linears and what it keeps from forward to backward.
struct Block {
    Linear qkv, proj, fc1, fc2;
    NormStatistics norm1, norm2;
    std::vector<float> x1, y1, qkv_out, attention_out, lse;  // (rows, C) (rows, C) (rows, 3C) (rows, C) (B, H, T)
    std::vector<float> x2, y2, pre_activation, activation;   // (rows, C) (rows, C) (rows, F) (rows, F)

    Block(const ModelSpec& m, const Recipe& recipe, size_t rows)
        : qkv(recipe, 3 * m.dim, m.dim), proj(recipe, m.dim, m.dim), fc1(recipe, m.ffn_dim, m.dim), fc2(recipe, m.dim, m.ffn_dim),
          norm1(rows), norm2(rows),
          x1(rows * size_t(m.dim)), y1(x1.size()), qkv_out(3 * x1.size()), attention_out(x1.size()), lse(rows * size_t(m.n_heads)),
          x2(x1.size()), y2(x1.size()), pre_activation(rows * size_t(m.ffn_dim)), activation(pre_activation.size()) {}
};

class ReferenceEngine final : public Engine {
  public:
    explicit ReferenceEngine(const EngineOptions& options);

    void load(const TrainState& state) override;
    std::shared_future<void> snapshot(TrainState& into) override;
    void enqueue_step(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) override;
    StepResult collect() override;
    std::vector<float> gradients(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) override;
    double evaluate(std::span<const int> inputs, std::span<const int> targets) override;
    void token_losses(std::span<const int> inputs, std::span<const int> targets, std::span<float> losses) override;
    void logits(std::span<const int> inputs, std::span<const int> positions, std::span<float> logits) override;
    uint64_t weights_digest() override { return store_.weights_digest(); }
    std::string device_name() const override { return "CPU reference"; }
    std::vector<MemoryRow> memory_table() const override;
    std::vector<LinearRow> linear_table() const override;

  private:
    // Indices into a block's parameters, for one of its two norms or four linears.
    struct Affine {
        int weight, bias;
    };

    void check_tokens(std::span<const int> inputs, std::span<const int> targets, int micro_batches) const;
    // A block's weights, from the collective that brings them to their release.
    void gather_block(int layer);
    void use_block(Block& block, int layer);
    void release_block(int layer);
    void store(float* x, int64_t n) const {  // here the GPU stores x in BF16
        if (options_.recipe.rounds_to_bf16()) round_to_bf16(x, x, n);
    }
    void store(std::vector<float>& x) const { store(x.data(), int64_t(x.size())); }
    const float* effective(int parameter) const { return store_.get(parameter); }
    float* grad(int parameter) { return store_.grad(parameter); }

    // All micro-batches of a step: the gradients, loss_sum and nonfinite of all ranks' tokens.
    void forward_backward(std::span<const int> inputs, std::span<const int> targets);

    void forward(const int* inputs);
    void forward_block(Block& block, int layer);
    void norm_forward(const std::vector<float>& x, const Affine& at, NormStatistics& statistics, std::vector<float>& out);
    void linear_forward(Linear& linear, const std::vector<float>& x, std::vector<float>& y);

    void reduce_over_ranks(double loss);
    // Sum of the micro-batch's losses; with a gradient scale also the head's gradients, that of its input into dbranch_.
    enum class Gradient : bool { no, yes };
    double head(const int* targets, Gradient gradient);
    void backward(const int* inputs, Position position);
    void backward_block(Block& block, int layer);
    void norm_backward(const std::vector<float>& x, const NormStatistics& statistics, const Affine& at, bool has_residual);
    void linear_backward(Linear& linear, const Affine& at, const std::vector<float>& x, const std::vector<float>& dy, std::vector<float>& dx);

    const EngineOptions options_;
    const ParameterList list_;
    const int rows_;        // of a micro-batch: B * T
    const int head_chunk_;  // rows whose logits exist at a time

    reference::ParameterStore store_;
    StepState state_{};
    std::deque<StepResult> finished_;

    std::vector<Block> blocks_;
    std::vector<float> x_final_, y_final_, branch_;       // (rows, C)
    NormStatistics norm_final_;
    std::vector<float> logits_, losses_;                  // (head_chunk, V), (rows)
    std::vector<float> dresidual_, dbranch_;              // (rows, C)
    std::vector<float> dqkv_, dhidden_;                   // (rows, 3C), (rows, F)
};

const EngineOptions& checked(const EngineOptions& o) {
    validate(o.model);
    REQUIRE(o.micro_batch >= 1 && o.micro_batches_per_step >= 1, "micro-batches of %d sequences, %d a step: must be at least 1",
            o.micro_batch, o.micro_batches_per_step);
    REQUIRE(o.seq_len >= 1 && o.seq_len <= o.model.seq_len, "sequences of %d tokens: the model takes 1 to %d", o.seq_len,
            o.model.seq_len);
    return o;
}

ReferenceEngine::ReferenceEngine(const EngineOptions& o)
    : options_(checked(o)), list_(make_parameters(o.model, o.parallel.group->size())), rows_(o.micro_batch * o.seq_len), head_chunk_(std::min(rows_, 512)),
      store_(list_, options_.recipe, options_.parallel), norm_final_(size_t(rows_)) {
    const size_t rows = size_t(rows_), C = size_t(o.model.dim);
    blocks_.reserve(size_t(o.model.n_layers));
    for (int layer = 0; layer < o.model.n_layers; ++layer) blocks_.emplace_back(o.model, o.recipe, rows);
    for (std::vector<float>* x : {&x_final_, &y_final_, &branch_, &dresidual_, &dbranch_}) x->resize(rows * C);
    logits_.resize(size_t(head_chunk_) * size_t(o.model.vocab_size));
    losses_.resize(rows);
    dqkv_.resize(3 * rows * C);
    dhidden_.resize(rows * size_t(o.model.ffn_dim));
}

// ---------------------------------------------------------------------------------------------------------------------
// State

void ReferenceEngine::load(const TrainState& state) {
    store_.load(state);
    state_ = {};
    state_.adam_t = state.adam_t;
    state_.skipped_steps = state.skipped_steps;
}

std::shared_future<void> ReferenceEngine::snapshot(TrainState& into) {
    store_.save(into);
    into.adam_t = state_.adam_t;
    into.skipped_steps = state_.skipped_steps;
    std::promise<void> copied;
    copied.set_value();
    return copied.get_future().share();
}

void ReferenceEngine::gather_block(int layer) {
    for (const int unit : list_.block_units[size_t(layer)]) store_.gather(unit);
}

void ReferenceEngine::use_block(Block& block, int layer) {
    const BlockParameters& p = list_.blocks[size_t(layer)];
    const std::pair<Linear*, Affine> linears[] = {{&block.qkv, {p.qkv_weight, p.qkv_bias}}, {&block.proj, {p.proj_weight, p.proj_bias}},
                                                  {&block.fc1, {p.fc1_weight, p.fc1_bias}}, {&block.fc2, {p.fc2_weight, p.fc2_bias}}};
    for (const auto& [linear, at] : linears) linear->use(store_.get(at.weight), store_.inv_scale(at.weight), store_.get(at.bias));
}

void ReferenceEngine::release_block(int layer) {
    for (const int unit : list_.block_units[size_t(layer)]) store_.release(unit);
}

std::vector<MemoryRow> ReferenceEngine::memory_table() const {
    const auto bytes = [](const auto&... x) { return double((x.size() + ...)) * sizeof(float); };
    double saved = 0;
    for (const Block& b : blocks_)
        saved += bytes(b.x1, b.y1, b.qkv_out, b.attention_out, b.lse, b.x2, b.y2, b.pre_activation, b.activation);
    const reference::ParameterStore::Bytes store = store_.bytes();
    return {{"parameters", store.masters},
            {"gradients", store.gradients},
            {"AdamW moments", store.moments},
            {"weights as multiplied", store.weights},
            {"saved activations", saved},
            {"logits of a chunk, losses", bytes(logits_, losses_)},
            {"scratch", bytes(x_final_, y_final_, branch_, dresidual_, dbranch_, dqkv_, dhidden_)}};
}

std::vector<LinearRow> ReferenceEngine::linear_table() const {
    const Recipe& recipe = options_.recipe;
    const std::string unquantized = recipe.rounds_to_bf16() ? "BF16" : "FP32";
    const auto row = [&](const std::string& name, const Linear& linear) -> LinearRow {
        const std::string size = message(" (%d x %d, %zu blocks)", linear.out(), linear.in(), blocks_.size());
        const std::string obstacle = fp8_obstacle(linear.out(), linear.in());
        return {name + size, linear.fp8() ? "FP8" : unquantized,
                recipe.quantizes() && !obstacle.empty() ? obstacle : "recipe " + recipe.name, int(blocks_.size())};
    };
    const Block& block = blocks_.front();  // the blocks are alike
    return {row("attn.c_attn", block.qkv), row("attn.c_proj", block.proj), row("mlp.c_fc", block.fc1), row("mlp.c_proj", block.fc2),
            {message("head, tied to wte (%d x %d)", options_.model.vocab_size, options_.model.dim), unquantized,
             recipe.quantizes() ? "the head is not quantized" : "recipe " + recipe.name}};
}

// ---------------------------------------------------------------------------------------------------------------------
// A step

void ReferenceEngine::check_tokens(std::span<const int> inputs, std::span<const int> targets, int micro_batches) const {
    const size_t expected = size_t(rows_) * size_t(micro_batches);
    REQUIRE(inputs.size() == expected && targets.size() == expected, "%zu input and %zu target tokens: expected %zu",
            inputs.size(), targets.size(), expected);
    const int V = options_.model.vocab_size;
    for (const int token : inputs) REQUIRE(token >= 0 && token < V, "input token %d: the vocabulary has %d", token, V);
    for (const int token : targets) REQUIRE(token < V, "target token %d: the vocabulary has %d", token, V);
}

void ReferenceEngine::enqueue_step(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) {
    const auto start = std::chrono::steady_clock::now();
    const Mark mark("step", int(in.step));
    state_.in = in;
    forward_backward(inputs, targets);
    const Mark optimizer_mark("optimizer");
    reference::optimizer_prepare(options_.adamw, store_.gradient_norm(), state_);
    store_.update(options_.adamw, state_);
    finished_.push_back({state_, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()});
}

StepResult ReferenceEngine::collect() {
    REQUIRE(!finished_.empty(), "collect: no step was enqueued");
    const StepResult result = finished_.front();
    finished_.pop_front();
    return result;
}

std::vector<float> ReferenceEngine::gradients(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) {
    state_.in = in;
    forward_backward(inputs, targets);  // what it leaves in state_, the next step overwrites
    return store_.all_gradients();
}

double ReferenceEngine::evaluate(std::span<const int> inputs, std::span<const int> targets) {
    check_tokens(inputs, targets, 1);
    forward(inputs.data());  // may raise the non-finite flag, which the next step clears
    const double loss = head(targets.data(), Gradient::no);
    store_.release(list_.embedding_unit);
    return loss;
}

void ReferenceEngine::token_losses(std::span<const int> inputs, std::span<const int> targets, std::span<float> losses) {
    REQUIRE(losses.size() == inputs.size(), "losses of %zu tokens: room for %zu", inputs.size(), losses.size());
    evaluate(inputs, targets);
    std::copy(losses_.begin(), losses_.end(), losses.begin());
}

void ReferenceEngine::logits(std::span<const int> inputs, std::span<const int> positions, std::span<float> logits) {
    const int V = options_.model.vocab_size, C = options_.model.dim;
    check_tokens(inputs, inputs, 1);
    REQUIRE(logits.size() == positions.size() * size_t(V), "%zu logits: %zu positions have %zu", logits.size(), positions.size(), positions.size() * size_t(V));
    for (const int position : positions) REQUIRE(position >= 0 && position < rows_, "logits after token %d of a micro-batch of %d", position, rows_);
    forward(inputs.data());
    std::vector<float> y;
    for (const int position : positions) y.insert(y.end(), y_final_.begin() + int64_t(position) * C, y_final_.begin() + int64_t(position + 1) * C);
    reference::matmul({.a = y.data(), .b = effective(list_.wte), .b_transposed = true, .d = logits.data(), .M = int(positions.size()), .N = V, .K = C});
    store(logits.data(), int64_t(logits.size()));
    store_.release(list_.embedding_unit);
}

void ReferenceEngine::forward_backward(std::span<const int> inputs, std::span<const int> targets) {
    check_tokens(inputs, targets, options_.micro_batches_per_step);
    state_.nonfinite = 0;
    double loss = 0;
    for (int i = 0; i < options_.micro_batches_per_step; ++i) {
        const Mark mark("micro-batch", i);
        const Position position = position_of(i, options_.micro_batches_per_step);
        const int* micro_inputs = inputs.data() + size_t(i) * size_t(rows_);
        store_.begin_micro_batch(position);
        forward(micro_inputs);
        loss += head(targets.data() + size_t(i) * size_t(rows_), Gradient::yes) * double(state_.in.inverse_valid_tokens);
        backward(micro_inputs, position);
        store_.end_micro_batch(position);
    }
    reduce_over_ranks(loss);
}

// Loss and flag of all ranks; sums in the order of ranks.
void ReferenceEngine::reduce_over_ranks(double loss) {
    Communicator& world = *options_.parallel.world;
    std::vector<double> losses(size_t(world.size()));
    losses[size_t(world.rank())] = loss;
    world.all_gather(losses.data(), sizeof(double));
    double sum = 0;
    for (const double l : losses) sum += l;
    state_.loss_sum = float(sum);
    world.all_reduce(&state_.nonfinite, 1, Element::u32, Reduction::max);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

void ReferenceEngine::norm_forward(const std::vector<float>& x, const Affine& at, NormStatistics& s, std::vector<float>& out) {
    reference::layernorm_forward({.x = x.data(), .weight = effective(at.weight), .bias = effective(at.bias), .out = out.data(),
                                  .mean = s.mean.data(), .rstd = s.rstd.data(), .rows = rows_, .C = options_.model.dim});
    store(out);
}

void ReferenceEngine::linear_forward(Linear& linear, const std::vector<float>& x, std::vector<float>& y) {
    linear.forward(x.data(), y.data(), rows_, &state_.nonfinite);
    store(y);
}

void ReferenceEngine::forward(const int* inputs) {
    const Mark mark("forward");
    const ModelSpec& m = options_.model;
    store_.gather(list_.embedding_unit);
    gather_block(0);
    reference::embedding_forward({.tokens = inputs, .wte = effective(list_.wte), .wpe = effective(list_.wpe),
                                  .out = blocks_.front().x1.data(), .B = options_.micro_batch, .T = options_.seq_len, .C = m.dim});
    store(blocks_.front().x1);
    for (int layer = 0; layer < m.n_layers; ++layer) {
        if (layer + 1 < m.n_layers) gather_block(layer + 1);
        use_block(blocks_[size_t(layer)], layer);
        forward_block(blocks_[size_t(layer)], layer);
        release_block(layer);
    }
    norm_forward(x_final_, {list_.lnf_weight, list_.lnf_bias}, norm_final_, y_final_);
}

// x1 -> x2 -> x1 of the block above, or x_final_.
void ReferenceEngine::forward_block(Block& b, int layer) {
    const Mark mark("layer", layer);
    const BlockParameters& p = list_.blocks[size_t(layer)];
    const ModelSpec& m = options_.model;
    norm_forward(b.x1, {p.ln1_weight, p.ln1_bias}, b.norm1, b.y1);
    linear_forward(b.qkv, b.y1, b.qkv_out);
    reference::attention_forward({.shape = {options_.micro_batch, options_.seq_len, m.n_heads, m.head_dim()},
                                  .qkv = b.qkv_out.data(), .out = b.attention_out.data(), .lse = b.lse.data()});
    store(b.attention_out);
    linear_forward(b.proj, b.attention_out, branch_);
    reference::add(b.x1.data(), branch_.data(), b.x2.data(), int64_t(b.x2.size()));
    store(b.x2);

    norm_forward(b.x2, {p.ln2_weight, p.ln2_bias}, b.norm2, b.y2);
    linear_forward(b.fc1, b.y2, b.pre_activation);
    reference::gelu_forward(b.pre_activation.data(), b.activation.data(), int64_t(b.activation.size()));
    store(b.activation);
    linear_forward(b.fc2, b.activation, branch_);
    std::vector<float>& next = size_t(layer) + 1 < blocks_.size() ? blocks_[size_t(layer) + 1].x1 : x_final_;
    reference::add(b.x2.data(), branch_.data(), next.data(), int64_t(next.size()));
    store(next);
}

// The head shares its weight with the token embedding: both add to one gradient. Rows of the padded vocabulary take no part.
double ReferenceEngine::head(const int* targets, Gradient gradient) {
    const Mark mark("head");
    const int V = options_.model.vocab_size, C = options_.model.dim;
    for (int row = 0; row < rows_; row += head_chunk_) {
        const int rows = std::min(head_chunk_, rows_ - row);
        const float* y = y_final_.data() + int64_t(row) * C;
        float* dy = dbranch_.data() + int64_t(row) * C;
        reference::matmul({.a = y, .b = effective(list_.wte), .b_transposed = true, .d = logits_.data(), .M = rows, .N = V, .K = C});
        store(logits_.data(), int64_t(rows) * V);
        reference::classifier({.logits = logits_.data(), .targets = targets + row, .losses = losses_.data() + row,
                               .with_gradient = gradient == Gradient::yes, .gradient_scale = state_.in.inverse_valid_tokens,
                               .rows = rows, .V = V});
        if (gradient == Gradient::no) continue;
        store(logits_.data(), int64_t(rows) * V);
        reference::matmul({.a = logits_.data(), .b = effective(list_.wte), .d = dy, .M = rows, .N = C, .K = V});
        store(dy, int64_t(rows) * C);
        reference::matmul({.a = logits_.data(), .a_transposed = true, .b = y, .d = grad(list_.wte), .accumulate = true,
                           .M = V, .N = C, .K = rows});
    }
    double sum = 0;
    for (const float loss : losses_) sum += loss;
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// The gradient of the norm's output is in dbranch_; that of its input is added to dresidual_, or starts it.
void ReferenceEngine::norm_backward(const std::vector<float>& x, const NormStatistics& s, const Affine& at, bool has_residual) {
    reference::layernorm_backward({.x = x.data(), .dout = dbranch_.data(), .weight = effective(at.weight), .mean = s.mean.data(),
                                   .rstd = s.rstd.data(), .dresidual_in = has_residual ? dresidual_.data() : nullptr,
                                   .dresidual_out = dresidual_.data(), .dweight = grad(at.weight), .dbias = grad(at.bias),
                                   .rows = rows_, .C = options_.model.dim});
    store(dresidual_);
}

void ReferenceEngine::linear_backward(Linear& linear, const Affine& at, const std::vector<float>& x,
                                      const std::vector<float>& dy, std::vector<float>& dx) {
    linear.backward({.x = x.data(), .dy = dy.data(), .dx = dx.data(), .dweight = grad(at.weight), .dbias = grad(at.bias),
                     .rows = rows_}, &state_.nonfinite);
    store(dx);
}

void ReferenceEngine::backward(const int* inputs, Position position) {
    const Mark mark("backward");
    norm_backward(x_final_, norm_final_, {list_.lnf_weight, list_.lnf_bias}, false);
    gather_block(options_.model.n_layers - 1);
    for (int layer = options_.model.n_layers - 1; layer >= 0; --layer) {
        if (layer > 0) gather_block(layer - 1);
        use_block(blocks_[size_t(layer)], layer);
        backward_block(blocks_[size_t(layer)], layer);
        release_block(layer);
        for (const int unit : list_.block_units[size_t(layer)]) store_.gradients_ready(unit, position);
    }
    reference::embedding_backward({.tokens = inputs, .dout = dresidual_.data(), .dwte = grad(list_.wte), .dwpe = grad(list_.wpe),
                                   .B = options_.micro_batch, .T = options_.seq_len, .C = options_.model.dim});
    store_.release(list_.embedding_unit);
    store_.gradients_ready(list_.embedding_unit, position);
}

// dresidual_: gradient of the block's output on entry, of its input on return.
void ReferenceEngine::backward_block(Block& b, int layer) {
    const Mark mark("layer", layer);
    const BlockParameters& p = list_.blocks[size_t(layer)];
    const ModelSpec& m = options_.model;
    linear_backward(b.fc2, {p.fc2_weight, p.fc2_bias}, b.activation, dresidual_, dhidden_);
    reference::gelu_backward(b.pre_activation.data(), dhidden_.data(), dhidden_.data(), int64_t(dhidden_.size()));
    store(dhidden_);
    linear_backward(b.fc1, {p.fc1_weight, p.fc1_bias}, b.y2, dhidden_, dbranch_);
    norm_backward(b.x2, b.norm2, {p.ln2_weight, p.ln2_bias}, true);

    linear_backward(b.proj, {p.proj_weight, p.proj_bias}, b.attention_out, dresidual_, dbranch_);
    reference::attention_backward({.shape = {options_.micro_batch, options_.seq_len, m.n_heads, m.head_dim()},
                                   .qkv = b.qkv_out.data(), .out = b.attention_out.data(), .dout = dbranch_.data(),
                                   .lse = b.lse.data(), .dqkv = dqkv_.data()});
    store(dqkv_);
    linear_backward(b.qkv, {p.qkv_weight, p.qkv_bias}, b.y1, dqkv_, dbranch_);
    norm_backward(b.x1, b.norm1, {p.ln1_weight, p.ln1_bias}, true);
}

}  // namespace

std::unique_ptr<Engine> make_reference_engine(const EngineOptions& options) {
    return std::make_unique<ReferenceEngine>(options);
}
