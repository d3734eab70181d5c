#include "trainer/gpu_engine.h"

#include <cstring>

#include "kernels/common/mark.h"
#include "kernels/global_norm.h"
#include "trainer/device_check.h"

namespace {

template <class T>
void pinned_alloc(T*& pointer, size_t count) {
    CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&pointer), count * sizeof(T)));
}

void check_device(const Recipe& recipe) {
    cudaDeviceProp device{};
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    const std::string obstacle = device_obstacle({.built_for = TRAIN_GPT_ARCH, .arch = device.major * 10 + device.minor, .name = device.name}, recipe);
    REQUIRE(obstacle.empty(), "%s", obstacle.c_str());
}

const EngineOptions& checked(const EngineOptions& o) {
    check_device(o.recipe);
    REQUIRE(!o.recipe.reference_device_only, "--recipe %s runs on the reference device only: add --device cpu", o.recipe.name.c_str());
    REQUIRE(o.seq_len <= o.model.seq_len, "sequence length %d is longer than the model's position embedding, %d", o.seq_len, o.model.seq_len);
    const int tokens = o.micro_batch * o.seq_len;
    REQUIRE(!o.recipe.quantizes() || tokens % 16 == 0,
            "--micro-batch %d x --seq-len %d = %d tokens: --recipe %s needs a multiple of 16 (FP8 weight gradients sum over tokens)",
            o.micro_batch, o.seq_len, tokens, o.recipe.name.c_str());
    REQUIRE(o.logit_rows >= 0 && o.logit_rows <= o.micro_batch, "logits of %d rows: must be 0 to the micro-batch, %d", o.logit_rows, o.micro_batch);
    if (o.parallel.world->size() > 1) require_gpu_mode(o.parallel);
    return o;
}

// Where AdamW puts what follows from a new master weight, in the order of ParameterList.
std::vector<AdamWTensor> adamw_tensors(const ParameterList& list, const GpuModel& model, float weight_decay) {
    std::vector<AdamWTensor> tensors;
    for (size_t i = 0; i < list.all.size(); ++i) {
        const Parameter& p = list.all[i];
        tensors.push_back({.offset = p.offset, .grad_offset = p.offset, .count = p.padded_count(), .bf16_copy = model.bf16_copy(int(i)),
                           .slot = model.weight_slot(int(i)), .weight_decay = p.decays ? weight_decay : 0.0f, .first_block = 0});
    }
    return tensors;
}

}  // namespace

std::unique_ptr<Engine> make_gpu_engine(const EngineOptions& options) { return std::make_unique<GpuEngine>(options); }

// ---------------------------------------------------------------------------------------------------------------------
// Set-up

GpuEngine::GpuEngine(const EngineOptions& options)
    : options_(checked(options)), list_(make_parameters(options.model)),
      gemm_({.cache_file = options.deterministic ? "" : options.gemm_cache, .autotune = !options.deterministic,
             .pinned = options.deterministic ? options.pinned_gemms : ""}),
      model_(options_, list_), weight_format_(options.recipe.output.b.dtype) {
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    request_memory();
    arena_.require_fits();
    model_.plan(gemm_);  // before the arena takes the memory that tuning borrows
    gemm_.save_cache();
    const std::string unpinned = gemm_.pin_failure();
    if (!unpinned.empty()) std::fprintf(stderr, "note: --deterministic: %s: bits may differ from the run that saved the checkpoint\n", unpinned.c_str());
    arena_.allocate();
    model_.bind(arrays_, state_);
    build_tensor_tables();
    for (Staging& s : staging_) {
        const size_t tokens = size_t(options_.micro_batch) * options_.seq_len * options_.micro_batches_per_step;
        pinned_alloc(s.inputs, tokens);
        pinned_alloc(s.targets, tokens);
        pinned_alloc(s.state, 1);
        CUDA_CHECK(cudaEventCreate(&s.begin));
        CUDA_CHECK(cudaEventCreate(&s.done));
    }
    CUDA_CHECK(cudaDeviceSynchronize());  // the arena's zeroing ran on the default stream
}

GpuEngine::~GpuEngine() {
    snapshot_.wait();
    cudaStreamSynchronize(stream_);
    for (Staging& s : staging_) {
        cudaFreeHost(s.inputs);
        cudaFreeHost(s.targets);
        cudaFreeHost(s.state);
        cudaEventDestroy(s.begin);
        cudaEventDestroy(s.done);
    }
    cudaStreamDestroy(stream_);
}

namespace {

// The engine's own pointers, apart from the model's.
struct EnginePointers {
    ParameterArrays& arrays;
    float*& m;
    float*& v;
    StepState*& state;
    float*& norm_partials;
    float*& evaluation_loss;
    AdamWTensor*& adamw_tensors;
    QuantizeWeight*& quantized;
};

void request_all(Arena& arena, const ParameterList& list, const EnginePointers& p, GpuModel& model) {
    const size_t n = size_t(list.flat_elements);
    arena.request(p.arrays.params, n, "master weights (FP32)");
    arena.request(p.arrays.grads, n, "gradients (FP32)");
    arena.request(p.m, n, "Adam moments (FP32)");
    arena.request(p.v, n, "Adam moments (FP32)");
    arena.request(p.state, 1, "step state, tables");
    arena.request(p.norm_partials, size_t(global_norm_partials()), "step state, tables");
    arena.request(p.evaluation_loss, 1, "step state, tables");
    arena.request(p.adamw_tensors, list.all.size(), "step state, tables");
    arena.request(p.quantized, list.all.size(), "step state, tables");
    model.request(arena);
}

std::vector<MemoryRow> memory_rows(const Arena& arena) {
    std::vector<MemoryRow> rows;
    for (const Arena::Row& row : arena.table()) rows.push_back({row.what, double(row.bytes)});
    rows.push_back({"cuBLASLt workspace", double(Gemm::workspace_bytes())});
    return rows;
}

}  // namespace

EnginePlan plan_gpu_engine(const EngineOptions& options) {
    const ParameterList list = make_parameters(options.model);
    GpuModel model(options, list);
    Arena arena;
    ParameterArrays arrays;
    float *m, *v, *norm_partials, *evaluation_loss;
    StepState* state;
    AdamWTensor* adamw_tensors;
    QuantizeWeight* quantized;
    request_all(arena, list, {arrays, m, v, state, norm_partials, evaluation_loss, adamw_tensors, quantized}, model);
    return {memory_rows(arena), model.linear_table()};
}

void GpuEngine::request_memory() {
    request_all(arena_, list_, {arrays_, m_, v_, state_, norm_partials_, evaluation_loss_, adamw_tensors_, quantized_}, model_);
}

void GpuEngine::build_tensor_tables() {
    std::vector<AdamWTensor> tensors = adamw_tensors(list_, model_, options_.adamw.weight_decay);
    adamw_blocks_ = adamw_plan(tensors.data(), int(tensors.size()));
    CUDA_CHECK(cudaMemcpy(adamw_tensors_, tensors.data(), tensors.size() * sizeof(AdamWTensor), cudaMemcpyHostToDevice));

    std::vector<QuantizeWeight> quantized = model_.quantized_weights(arrays_.params);
    quantized_count_ = int(quantized.size());
    if (quantized.empty()) return;
    quantized_tiles_ = quantize_weights_plan(quantized.data(), quantized_count_);
    CUDA_CHECK(cudaMemcpy(quantized_, quantized.data(), quantized.size() * sizeof(QuantizeWeight), cudaMemcpyHostToDevice));
}

// ---------------------------------------------------------------------------------------------------------------------
// The step

GpuEngine::Staging& GpuEngine::next_staging() {
    Staging& s = staging_[enqueued_ % kStagings];
    REQUIRE(enqueued_ - collected_ < kStepsInFlight, "enqueue_step: %d steps are in flight; collect() one first", kStepsInFlight);
    return s;
}

void GpuEngine::enqueue_step(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) {
    const Mark mark("step", int(in.step));
    Staging& s = next_staging();
    s.follows = back_to_back_ ? &staging_[(enqueued_ - 1) % kStagings] : nullptr;
    if (s.follows == nullptr) CUDA_CHECK(cudaEventRecord(s.begin, stream_));
    enqueue_micro_batches(s, in, inputs, targets);
    snapshot_.wait();
    optimizer_graph_.run(options_.use_graphs, stream_, [&] { enqueue_optimizer(); });
    CUDA_CHECK(cudaMemcpyAsync(s.state, state_, sizeof(StepState), cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaEventRecord(s.done, stream_));
    back_to_back_ = true;
    ++enqueued_;
}

StepResult GpuEngine::collect() {
    Staging& s = staging_[collected_ % kStagings];
    REQUIRE(collected_ < enqueued_, "collect: no step is in flight (%lld enqueued, %lld collected)", (long long)enqueued_, (long long)collected_);
    CUDA_CHECK(cudaEventSynchronize(s.done));
    ++collected_;
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, s.follows ? s.follows->done : s.begin, s.done));
    return {*s.state, ms * 1e-3};
}

void GpuEngine::enqueue_micro_batches(Staging& s, const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) {
    const size_t tokens = size_t(options_.micro_batch) * options_.seq_len;
    const size_t expected = tokens * size_t(options_.micro_batches_per_step);
    REQUIRE(inputs.size() == expected && targets.size() == expected, "a step takes %zu tokens, got %zu inputs and %zu targets",
            expected, inputs.size(), targets.size());
    std::memcpy(s.inputs, inputs.data(), inputs.size_bytes());
    std::memcpy(s.targets, targets.data(), targets.size_bytes());
    *s.state = StepState{.in = in};
    // Everything before adam_t belongs to one step and starts from zero; adam_t and skipped_steps live on the device.
    CUDA_CHECK(cudaMemcpyAsync(state_, s.state, offsetof(StepState, adam_t), cudaMemcpyHostToDevice, stream_));
    for (int i = 0; i < options_.micro_batches_per_step; ++i) {
        const Mark mark("micro-batch", i);
        const Position position = position_of(i, options_.micro_batches_per_step);
        CUDA_CHECK(cudaMemcpyAsync(model_.inputs(), s.inputs + size_t(i) * tokens, tokens * sizeof(int), cudaMemcpyHostToDevice, stream_));
        CUDA_CHECK(cudaMemcpyAsync(model_.targets(), s.targets + size_t(i) * tokens, tokens * sizeof(int), cudaMemcpyHostToDevice, stream_));
        micro_batch_graphs_[int(position)].run(options_.use_graphs, stream_, [&] { model_.forward_backward(position, gemm_, stream_); });
    }
}

// Every rank then takes the same step: gradients, loss and flag are the same bits on all of them.
void GpuEngine::enqueue_reduction() {
    Communicator& world = *options_.parallel.world;
    world.all_reduce(arrays_.grads, list_.flat_elements, Element::f32, Reduction::sum, stream_);
    world.all_reduce(&state_->loss_sum, 1, Element::f32, Reduction::sum, stream_);
    world.all_reduce(&state_->nonfinite, 1, Element::u32, Reduction::max, stream_);
}

void GpuEngine::enqueue_optimizer() {
    enqueue_reduction();
    const Mark mark("optimizer");
    sum_of_squares(arrays_.grads, list_.flat_elements, norm_partials_, stream_);
    optimizer_prepare({.state = state_, .norm_partials = norm_partials_, .n_partials = global_norm_partials(),
                       .tensors = adamw_tensors_, .n_tensors = int(list_.all.size()), .config = options_.adamw}, stream_);
    adamw_update({.tensors = adamw_tensors_, .n_tensors = int(list_.all.size()), .blocks = adamw_blocks_,
                  .params = arrays_.params, .grads = arrays_.grads, .m = m_, .v = v_, .state = state_,
                  .config = options_.adamw}, stream_);
    enqueue_weight_quantization(&state_->skip_update);
}

void GpuEngine::enqueue_weight_quantization(const uint32_t* skip) {
    if (quantized_count_ == 0) return;
    quantize_weights(quantized_, quantized_count_, quantized_tiles_, weight_format_, skip, &state_->nonfinite, stream_);
}

std::vector<float> GpuEngine::gradients(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) {
    back_to_back_ = false;
    enqueue_micro_batches(next_staging(), in, inputs, targets);
    enqueue_reduction();
    std::vector<float> host(size_t(list_.flat_elements));
    CUDA_CHECK(cudaMemcpyAsync(host.data(), arrays_.grads, host.size() * sizeof(float), cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    return host;
}

double GpuEngine::evaluate(std::span<const int> inputs, std::span<const int> targets) {
    const Mark mark("evaluation");
    const size_t tokens = size_t(options_.micro_batch) * options_.seq_len;
    REQUIRE(inputs.size() == tokens && targets.size() == tokens, "evaluate takes one micro-batch of %zu tokens, got %zu", tokens, inputs.size());
    back_to_back_ = false;
    CUDA_CHECK(cudaMemsetAsync(evaluation_loss_, 0, sizeof(float), stream_));
    // Pageable sources: each copy has left the host's memory when the call returns.
    CUDA_CHECK(cudaMemcpyAsync(model_.inputs(), inputs.data(), inputs.size_bytes(), cudaMemcpyHostToDevice, stream_));
    CUDA_CHECK(cudaMemcpyAsync(model_.targets(), targets.data(), targets.size_bytes(), cudaMemcpyHostToDevice, stream_));
    evaluation_graph_.run(options_.use_graphs, stream_, [&] { model_.evaluate(evaluation_loss_, gemm_, stream_); });
    float sum = 0;
    CUDA_CHECK(cudaMemcpyAsync(&sum, evaluation_loss_, sizeof(float), cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    return sum;
}

void GpuEngine::token_losses(std::span<const int> inputs, std::span<const int> targets, std::span<float> losses) {
    REQUIRE(losses.size() == inputs.size(), "losses of %zu tokens: room for %zu", inputs.size(), losses.size());
    evaluate(inputs, targets);
    CUDA_CHECK(cudaMemcpyAsync(losses.data(), model_.losses(), losses.size_bytes(), cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
}

void GpuEngine::logits(std::span<const int> inputs, std::span<const int> positions, std::span<float> logits) {
    const Mark mark("logits");
    const size_t tokens = size_t(options_.micro_batch) * options_.seq_len;
    const size_t V = size_t(options_.model.vocab_size), Vp = size_t(options_.model.padded_vocab());
    REQUIRE(inputs.size() == tokens && logits.size() == positions.size() * V, "logits takes one micro-batch of %zu tokens, got %zu, and %zu logits a position, got %zu of %zu",
            tokens, inputs.size(), V, logits.size(), positions.size());
    for (const int position : positions) REQUIRE(position >= 0 && size_t(position) < tokens, "logits after token %d of a micro-batch of %zu", position, tokens);
    back_to_back_ = false;
    CUDA_CHECK(cudaMemcpyAsync(model_.inputs(), inputs.data(), inputs.size_bytes(), cudaMemcpyHostToDevice, stream_));
    hidden_graph_.run(options_.use_graphs, stream_, [&] { model_.hidden(gemm_, stream_); });
    const __nv_bfloat16* device = model_.logits(positions, gemm_, stream_);
    std::vector<__nv_bfloat16> host(positions.size() * Vp);
    CUDA_CHECK(cudaMemcpyAsync(host.data(), device, host.size() * sizeof host[0], cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    for (size_t row = 0; row < positions.size(); ++row)
        for (size_t i = 0; i < V; ++i) logits[row * V + i] = __bfloat162float(host[row * Vp + i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// State in and out

void GpuEngine::load(const TrainState& state) {
    snapshot_.wait();
    back_to_back_ = false;
    const size_t bytes = size_t(list_.flat_elements) * sizeof(float);
    REQUIRE(state.params.size() * sizeof(float) == bytes, "load: %zu parameters, the model has %lld", state.params.size(), (long long)list_.flat_elements);
    CUDA_CHECK(cudaMemcpyAsync(arrays_.params, state.params.data(), bytes, cudaMemcpyHostToDevice, stream_));
    const auto upload_or_zero = [&](float* device, const std::vector<float>& host) {
        if (host.empty()) CUDA_CHECK(cudaMemsetAsync(device, 0, bytes, stream_));
        else CUDA_CHECK(cudaMemcpyAsync(device, host.data(), bytes, cudaMemcpyHostToDevice, stream_));
    };
    upload_or_zero(m_, state.m);
    upload_or_zero(v_, state.v);
    const StepState fresh{.adam_t = state.adam_t, .skipped_steps = state.skipped_steps};
    CUDA_CHECK(cudaMemcpyAsync(state_, &fresh, sizeof fresh, cudaMemcpyHostToDevice, stream_));
    model_.zero_weight_amaxes(stream_);
    adamw_refresh_copies({.tensors = adamw_tensors_, .n_tensors = int(list_.all.size()), .blocks = adamw_blocks_,
                          .params = arrays_.params, .grads = nullptr, .m = nullptr, .v = nullptr, .state = nullptr,
                          .config = options_.adamw}, stream_);
    enqueue_weight_quantization(nullptr);
    CUDA_CHECK(cudaStreamSynchronize(stream_));
}

// Masters, moments and Adam's t change in the optimizer graph alone, so they can be read beside the micro-batches of the
// next step, whose optimizer graph is enqueued when all is read.
std::shared_future<void> GpuEngine::snapshot(TrainState& into) {
    const size_t n = size_t(list_.flat_elements), bytes = n * sizeof(float);
    for (std::vector<float>* flat : {&into.params, &into.m, &into.v}) flat->resize(n);
    const std::shared_future<void> copied = snapshot_.start({{&snapshot_state_, state_, sizeof(StepState)}, {into.params.data(), arrays_.params, bytes},
                                                             {into.m.data(), m_, bytes}, {into.v.data(), v_, bytes}}, stream_);
    return std::async(std::launch::deferred, [this, copied, &into] {
               copied.get();
               into.adam_t = snapshot_state_.adam_t;
               into.skipped_steps = snapshot_state_.skipped_steps;
           }).share();
}

uint64_t GpuEngine::weights_digest() {
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    uint64_t hash = 0xcbf29ce484222325u;
    std::vector<uint8_t> host;
    const auto add = [&](const void* device, size_t bytes) {
        if (device == nullptr) return;
        host.resize(bytes);
        CUDA_CHECK(cudaMemcpy(host.data(), device, bytes, cudaMemcpyDeviceToHost));
        for (const uint8_t byte : host) hash = (hash ^ byte) * 0x100000001b3u;
    };
    for (size_t i = 0; i < list_.all.size(); ++i) add(model_.bf16_copy(int(i)), size_t(list_.all[i].padded_count()) * sizeof(__nv_bfloat16));
    for (const QuantizeWeight& w : model_.quantized_weights(arrays_.params)) {
        add(w.slot, sizeof(QuantSlot));
        add(w.q, size_t(w.N) * size_t(w.K));
        add(w.qt, size_t(w.N) * size_t(w.K));
    }
    return hash;
}

// ---------------------------------------------------------------------------------------------------------------------
// What start-up prints

std::string GpuEngine::device_name() const {
    int device = 0;
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    return properties.name;
}

std::vector<MemoryRow> GpuEngine::memory_table() const {
    return memory_rows(arena_);
}

std::vector<LinearRow> GpuEngine::linear_table() const { return model_.linear_table(); }
