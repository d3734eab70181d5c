#include "trainer/gpu_model.h"

#include <algorithm>

#include "kernels/classifier.h"
#include "kernels/common/cuda_check.h"
#include "kernels/common/mark.h"
#include "kernels/embedding.h"
#include "kernels/layernorm.h"

namespace {
// Tokens of a head chunk: every chunk reads and writes the FP32 gradient of the embedding once, so fewer, larger chunks
// are faster; 16,384 x 50,304 BF16 logits are 1.6 GB.
constexpr int kHeadChunkTokens = 16384;

constexpr int kLinearsPerBlock = 4;
template <class BlockOrConst>
auto& linear_of(BlockOrConst& block, int i) {
    return i == 0 ? block.qkv : i == 1 ? block.proj : i == 2 ? block.fc1 : block.fc2;
}
struct LinearIndices {
    int weight, bias;
};
LinearIndices indices_of(const BlockParameters& p, int i) {
    const LinearIndices all[kLinearsPerBlock] = {{p.qkv_weight, p.qkv_bias}, {p.proj_weight, p.proj_bias},
                                                 {p.fc1_weight, p.fc1_bias}, {p.fc2_weight, p.fc2_bias}};
    return all[i];
}
}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Set-up

GpuModel::GpuModel(const EngineOptions& options, const ParameterList& list, GpuParameters& parameters)
    : options_(options), list_(list), parameters_(parameters), tokens_(options.micro_batch * options.seq_len), chunk_(std::min(tokens_, kHeadChunkTokens)) {
    const AttentionOptions attention{.backend = attention_backend(options.attention), .deterministic = options.deterministic};
    for (int layer = 0; layer < options.model.n_layers; ++layer)
        blocks_.emplace_back(options.model, options.recipe, attention, options.micro_batch, options.seq_len, layer);
}

void GpuModel::request(Arena& arena) {
    const ModelSpec& m = options_.model;
    const size_t n = size_t(tokens_), C = size_t(m.dim);
    arena.request(micro_slots_, 2 * blocks_.size() * kLinearsPerBlock, "scales");
    for (Block& block : blocks_) block.request(arena);

    arena.request(inputs_, n, "tokens, losses");
    arena.request(targets_, n, "tokens, losses");
    arena.request(losses_, n, "tokens, losses");
    arena.request(final_x_, n * C, "saved residual stream");
    arena.request(final_norm_out_, n * C, "saved residual stream");
    arena.request(final_mean_, n, "saved norm statistics, LSE");
    arena.request(final_rstd_, n, "saved norm statistics, LSE");
    arena.request(logit_inputs_, size_t(options_.logit_rows) * C, "saved residual stream");
    arena.request(logits_, size_t(chunk_) * size_t(m.padded_vocab()), "logits of a chunk");
    request_scratch(arena);
}

void GpuModel::request_scratch(Arena& arena) {
    const ModelSpec& m = options_.model;
    const size_t n = size_t(tokens_), C = size_t(m.dim), widest = size_t(std::max(3 * m.dim, m.ffn_dim));
    const auto bytes = [&](void*& pointer, size_t count) {
        arena.request(reinterpret_cast<char*&>(pointer), count, "scratch");
    };
    for (__nv_bfloat16** p : {&scratch_.norm_out, &scratch_.branch_out, &scratch_.dresidual, &scratch_.dbranch})
        arena.request(*p, n * C, "scratch");
    arena.request(scratch_.wide, n * widest, "scratch");
    bytes(scratch_.norm_workspace, layernorm_backward_workspace_bytes(m.dim));
    bytes(scratch_.attention_workspace, blocks_[0].attention_workspace_bytes());
    const size_t codes = options_.recipe.quantizes() ? n * widest : 0;
    arena.request(scratch_.linear.codes, codes, "scratch");
    arena.request(scratch_.linear.codes_transposed, codes, "scratch");
    bytes(scratch_.linear.workspace, std::max(quantize_workspace_bytes(tokens_, int(widest)), quantize_workspace_bytes(tokens_, m.dim)));
    bytes(embedding_workspace_, embedding_backward_workspace_bytes(options_.micro_batch, options_.seq_len, m.dim, m.padded_vocab()));
}

void GpuModel::bind(StepState* state) {
    state_ = state;
    scratch_.linear.nonfinite = &state->nonfinite;
    const auto norm = [&](int weight, int bias) {
        return NormParameters{.weight = parameters_.master(weight), .bias = parameters_.master(bias),
                              .dweight = parameters_.gradient(weight), .dbias = parameters_.gradient(bias)};
    };
    final_norm_ = norm(list_.lnf_weight, list_.lnf_bias);
    QuantSlot* micro_slot = micro_slots_;
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
        Block& block = blocks_[layer];
        const BlockParameters& p = list_.blocks[layer];
        block.norm1 = norm(p.ln1_weight, p.ln1_bias);
        block.norm2 = norm(p.ln2_weight, p.ln2_bias);
        for (int i = 0; i < kLinearsPerBlock; ++i) {
            Linear& linear = linear_of(block, i);
            const auto [weight, bias] = indices_of(p, i);
            linear.bias = parameters_.bf16(bias);
            linear.weight_bf16 = parameters_.bf16(weight);
            linear.weight_codes = parameters_.codes(weight);
            linear.weight_codes_transposed = parameters_.codes_transposed(weight);
            linear.weight_slot = parameters_.slot(weight);
            linear.dweight = parameters_.gradient(weight);
            linear.dbias = parameters_.gradient(bias);
            REQUIRE(linear.fp8() == (linear.weight_slot != nullptr), "%s: FP8 or not, its weights are the other", linear.spec().name.c_str());
            if (!linear.fp8()) continue;
            linear.input_slot = micro_slot++;
            linear.grad_slot = micro_slot++;
        }
    }
}

std::vector<LinearRow> GpuModel::linear_table() const {
    std::vector<LinearRow> rows;
    for (int i = 0; i < kLinearsPerBlock; ++i) {  // the blocks are alike
        const Linear& linear = linear_of(blocks_[0], i);
        const std::string size = message("%d x %d, %zu blocks", linear.spec().out, linear.spec().in, blocks_.size());
        rows.push_back({linear.kind() + (" (" + size + ")"), linear.fp8() ? "FP8" : "BF16", linear.fp8() ? "recipe " + options_.recipe.name : linear.obstacle(), int(blocks_.size())});
    }
    const AttentionChoice attention = blocks_[0].attention_backends();
    rows.push_back({message("attention (forward %s, backward %s)", attention.forward.c_str(), attention.backward.c_str()), "BF16",
                    attention.reason.empty() ? "--attention " + options_.attention : attention.reason, 0});
    rows.push_back({message("head, tied to wte (%d x %d)", options_.model.vocab_size, options_.model.dim), "BF16", "the head always runs in BF16"});
    return rows;
}

void GpuModel::plan(Gemm& gemm) const {
    if (options_.logit_rows > 0) gemm.plan(logits_shape(options_.logit_rows));
    blocks_[0].plan(gemm);  // all blocks have the same shapes
    gemm.plan(head_grad_weight_shape(chunk_, false));
    for (const int rows : {chunk_, tokens_ % chunk_})
        if (rows > 0)
            for (const GemmShape& shape : {logits_shape(rows), head_grad_input_shape(rows), head_grad_weight_shape(rows, true)}) gemm.plan(shape);
}

// ---------------------------------------------------------------------------------------------------------------------
// The head: always BF16, weights tied to the token embedding

GemmShape GpuModel::logits_shape(int rows) const {
    return {.M = rows, .N = options_.model.padded_vocab(), .K = options_.model.dim, .a = Dtype::bf16, .b = Dtype::bf16, .d = Dtype::bf16};
}
GemmShape GpuModel::head_grad_input_shape(int rows) const {
    return {.M = rows, .N = options_.model.dim, .K = options_.model.padded_vocab(), .a = Dtype::bf16, .b = Dtype::bf16,
            .d = Dtype::bf16, .layout_b = Layout::col_k};
}
GemmShape GpuModel::head_grad_weight_shape(int rows, bool accumulate) const {
    return {.M = options_.model.padded_vocab(), .N = options_.model.dim, .K = rows, .a = Dtype::bf16, .b = Dtype::bf16,
            .d = Dtype::f32, .layout_a = Layout::col_k, .layout_b = Layout::col_k, .accumulate = accumulate};
}

// Reads final_norm_out_, writes losses_; with gradients also scratch.dbranch (gradient of final_norm_out_) and dwte.
void GpuModel::head(std::optional<Position> position, Gemm& gemm, cudaStream_t stream) const {
    const ModelSpec& m = options_.model;
    const __nv_bfloat16* wte = parameters_.bf16(list_.wte);
    const Mark mark("head");
    for (int first = 0; first < tokens_; first += chunk_) {
        const int rows = std::min(chunk_, tokens_ - first);
        const __nv_bfloat16* x = final_norm_out_ + int64_t(first) * m.dim;
        gemm.run(logits_shape(rows), {.a = x, .b = wte, .d = logits_}, stream);
        classifier({.logits = logits_, .targets = targets_ + first, .losses = losses_ + first,
                    .gradient_scale = position ? &state_->in.inverse_valid_tokens : nullptr, .rows = rows,
                    .V = m.vocab_size, .Vp = m.padded_vocab()}, stream);
        if (!position) continue;
        // The first to touch the tied gradient; the embedding's backward adds to it at the end of the micro-batch.
        const bool accumulate = first > 0 || !starts_gradients(parameters_.unit_position(*position));
        gemm.run(head_grad_weight_shape(rows, accumulate), {.a = logits_, .b = x, .d = parameters_.gradient(list_.wte)}, stream);
        gemm.run(head_grad_input_shape(rows), {.a = logits_, .b = wte, .d = scratch_.dbranch + int64_t(first) * m.dim}, stream);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// One micro-batch

void GpuModel::forward_backward(Position position, Gemm& gemm, cudaStream_t stream) const {
    if (starts_gradients(position)) parameters_.clear_added_gradients(stream);
    Pass pass{.position = position, .gemm = gemm};
    parameters_.streams().run(micro_batch_schedule(parameters_.shape(), position), stream, [&](const Operation& o, cudaStream_t on) { enqueue(o, pass, on); });
}

void GpuModel::hidden(Gemm& gemm, cudaStream_t stream) const {
    Pass pass{.position = std::nullopt, .gemm = gemm};
    parameters_.streams().run(forward_schedule(parameters_.shape()), stream, [&](const Operation& o, cudaStream_t on) { enqueue(o, pass, on); });
    final_norm(pass, stream);
}

void GpuModel::evaluate(float* loss_sum, Gemm& gemm, cudaStream_t stream) const {
    hidden(gemm, stream);
    head(std::nullopt, gemm, stream);
    accumulate_loss(losses_, tokens_, nullptr, loss_sum, nullptr, stream);
}

void GpuModel::enqueue(const Operation& operation, Pass& pass, cudaStream_t stream) const {
    const int layer = operation.layer;
    switch (operation.task) {
        case Task::embed: return embed(pass, stream);
        case Task::forward: return forward(layer, pass, stream);
        case Task::head: return head_with_gradients(pass, stream);
        case Task::backward: return backward(layer, pass, stream);
        case Task::embed_backward: return embed_backward(stream);
        default: break;
    }
    const Mark mark(communicates(operation.task) ? "communication" : "backward");
    parameters_.execute(operation, pass.position.value_or(Position::only), stream);
}

void GpuModel::embed(Pass& pass, cudaStream_t stream) const {
    const Mark mark("forward");
    CUDA_CHECK(cudaMemsetAsync(micro_slots_, 0, blocks_.size() * kLinearsPerBlock * 2 * sizeof(QuantSlot), stream));
    embedding_forward({.tokens = inputs_, .wte = parameters_.bf16(list_.wte), .wpe = parameters_.bf16(list_.wpe), .out = blocks_[0].x1(),
                       .B = options_.micro_batch, .T = options_.seq_len, .C = options_.model.dim}, stream);
    pass.residual = {.residual = blocks_[0].x1(), .delta = nullptr};
}

void GpuModel::forward(int layer, Pass& pass, cudaStream_t stream) const {
    const Mark mark("forward"), layer_mark("layer", layer);
    pass.residual = blocks_[size_t(layer)].forward(pass.residual, pass.position.has_value(), pass.gemm, scratch_, stream);
}

void GpuModel::final_norm(const Pass& pass, cudaStream_t stream) const {
    const Mark mark("forward");
    layernorm_forward({.residual = pass.residual.residual, .delta = pass.residual.delta, .residual_out = final_x_,
                       .weight = final_norm_.weight, .bias = final_norm_.bias, .out = final_norm_out_, .mean = final_mean_,
                       .rstd = final_rstd_, .amax = nullptr, .rows = tokens_, .C = options_.model.dim}, stream);
}

// From the end of the last block to the gradient of its output.
void GpuModel::head_with_gradients(const Pass& pass, cudaStream_t stream) const {
    final_norm(pass, stream);
    head(pass.position, pass.gemm, stream);
    {
        const Mark mark("head");
        accumulate_loss(losses_, tokens_, &state_->in.inverse_valid_tokens, &state_->loss_sum, &state_->nonfinite, stream);
    }
    const Mark mark("backward");
    layernorm_backward({.x = final_x_, .dout = scratch_.dbranch, .weight = final_norm_.weight, .mean = final_mean_,
                        .rstd = final_rstd_, .dresidual_in = nullptr, .dresidual_out = scratch_.dresidual,
                        .dweight = final_norm_.dweight, .dbias = final_norm_.dbias, .amax = blocks_.back().fc2.grad_slot,
                        .workspace = scratch_.norm_workspace, .rows = tokens_, .C = options_.model.dim}, stream);
}

void GpuModel::backward(int layer, const Pass& pass, cudaStream_t stream) const {
    const Mark mark("backward"), layer_mark("layer", layer);
    QuantSlot* const amax_below = layer > 0 ? blocks_[size_t(layer) - 1].fc2.grad_slot : nullptr;
    blocks_[size_t(layer)].backward(parameters_.unit_position(*pass.position), amax_below, pass.gemm, scratch_, stream);
}

void GpuModel::embed_backward(cudaStream_t stream) const {
    const Mark mark("backward");
    embedding_backward({.tokens = inputs_, .dout = scratch_.dresidual, .dwte = parameters_.gradient(list_.wte), .dwpe = parameters_.gradient(list_.wpe),
                        .workspace = embedding_workspace_, .B = options_.micro_batch, .T = options_.seq_len, .C = options_.model.dim,
                        .V = options_.model.padded_vocab()}, stream);
}

const __nv_bfloat16* GpuModel::logits(std::span<const int> positions, Gemm& gemm, cudaStream_t stream) const {
    REQUIRE(positions.size() <= size_t(options_.logit_rows), "logits of %zu positions: the engine was made for %d", positions.size(), options_.logit_rows);
    const size_t C = size_t(options_.model.dim);
    for (size_t i = 0; i < positions.size(); ++i)
        CUDA_CHECK(cudaMemcpyAsync(logit_inputs_ + i * C, final_norm_out_ + size_t(positions[i]) * C, C * sizeof(__nv_bfloat16), cudaMemcpyDeviceToDevice, stream));
    // Always the planned shape; rows behind the positions are of an earlier call, or zero.
    gemm.run(logits_shape(options_.logit_rows), {.a = logit_inputs_, .b = parameters_.bf16(list_.wte), .d = logits_}, stream);
    return logits_;
}
