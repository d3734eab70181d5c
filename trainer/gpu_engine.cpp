#include "trainer/gpu_engine.h"

#include <cstring>

#include "kernels/common/mark.h"
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
    return o;
}

// Of NCCL's own buffers in a process, measured with several communicators; it allocates them as it needs them.
constexpr double kNcclBytes = 1.0 * (1 << 30);

struct EnginePointers {
    StepState*& state;
    float*& evaluation_loss;
};

struct Arenas {
    Arena& own;
    Arena& communicating;
};

void request_all(const Arenas& arenas, const EnginePointers& p, GpuParameters& parameters, GpuModel& model, bool several_ranks) {
    (several_ranks ? arenas.communicating : arenas.own).request(p.state, 1, "step state, tables");
    arenas.own.request(p.evaluation_loss, 1, "step state, tables");
    parameters.request(arenas.own, arenas.communicating);
    model.request(arenas.own);
}

std::vector<MemoryRow> memory_rows(const Arena& own, const Arena& communicating, int ranks) {
    std::vector<MemoryRow> rows;
    for (const Arena* arena : {&own, &communicating})
        for (const Arena::Row& row : arena->table()) {
            size_t i = 0;
            while (i < rows.size() && rows[i].what != row.what) ++i;
            if (i == rows.size()) rows.push_back({row.what, 0});
            rows[i].bytes += double(row.bytes);
        }
    rows.push_back({"cuBLASLt workspace", double(Gemm::workspace_bytes())});
    if (ranks > 1) rows.push_back({"NCCL's buffers (assumed)", kNcclBytes});
    return rows;
}

// Both arenas, and what NCCL will still ask for.
void require_fits(const Arenas& arenas, int ranks) {
    size_t free_bytes = 0, device_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &device_bytes));
    const double total = double(arenas.own.total_bytes() + arenas.communicating.total_bytes()) + (ranks > 1 ? kNcclBytes : 0);
    REQUIRE(total <= double(free_bytes), "the run needs %.2f GiB of device memory but %.2f GiB of %.2f are free: lower --micro-batch%s or choose a smaller model",
            total / (1 << 30), double(free_bytes) / (1 << 30), double(device_bytes) / (1 << 30), ranks > 1 ? ", raise --shard" : "");
}

}  // namespace

std::unique_ptr<Engine> make_gpu_engine(const EngineOptions& options) { return std::make_unique<GpuEngine>(options); }

// ---------------------------------------------------------------------------------------------------------------------
// Set-up

GpuEngine::GpuEngine(const EngineOptions& options)
    : options_(checked(options)), list_(make_parameters(options.model, options.parallel.group->size())),
      gemm_({.cache_file = options.deterministic ? "" : options.gemm_cache, .autotune = !options.deterministic,
             .pinned = options.deterministic ? options.pinned_gemms : ""}),
      parameters_(options_, list_), model_(options_, list_, parameters_) {
    const int ranks = options_.parallel.world->size();
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    request_all({arena_, communicating_}, {state_, evaluation_loss_}, parameters_, model_, ranks > 1);
    require_fits({arena_, communicating_}, ranks);
    model_.plan(gemm_);  // before the arenas take the memory that tuning borrows
    gemm_.save_cache();
    const std::string unpinned = gemm_.pin_failure();
    if (!unpinned.empty()) std::fprintf(stderr, "note: --deterministic: %s: bits may differ from the run that saved the checkpoint\n", unpinned.c_str());
    arena_.allocate();
    {
        const Watch::Waiting waiting(options_.parallel.watch, "memory that ranks share");
        communicating_.allocate([&](size_t bytes) { return options_.parallel.group->memory(int64_t(bytes)); });
    }
    parameters_.bind(state_);
    model_.bind(state_);
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

EnginePlan plan_gpu_engine(const EngineOptions& options) {
    const ParameterList list = make_parameters(options.model, options.parallel.group->size());
    GpuParameters parameters(options, list);
    GpuModel model(options, list, parameters);
    Arena arena, communicating;
    StepState* state;
    float* evaluation_loss;
    const int ranks = options.parallel.world->size();
    request_all({arena, communicating}, {state, evaluation_loss}, parameters, model, ranks > 1);
    return {memory_rows(arena, communicating, ranks), model.linear_table()};
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
    const Watch::Waiting waiting(options_.parallel.watch, "a step");  // a graph's capture connects ranks, a snapshot waits for a step
    Staging& s = next_staging();
    s.follows = back_to_back_ ? &staging_[(enqueued_ - 1) % kStagings] : nullptr;
    if (s.follows == nullptr) CUDA_CHECK(cudaEventRecord(s.begin, stream_));
    enqueue_micro_batches(s, in, inputs, targets);
    snapshot_.wait();
    optimizer_graph_.run(options_.use_graphs, stream_, [&] { parameters_.update(stream_); });
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

std::vector<float> GpuEngine::gradients(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) {
    const Watch::Waiting waiting(options_.parallel.watch, "gradients");
    back_to_back_ = false;
    enqueue_micro_batches(next_staging(), in, inputs, targets);
    return parameters_.all_gradients(stream_);
}

double GpuEngine::evaluate(std::span<const int> inputs, std::span<const int> targets) {
    const Mark mark("evaluation");
    const Watch::Waiting waiting(options_.parallel.watch, "an evaluation");
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
    const Watch::Waiting waiting(options_.parallel.watch, "logits");
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
    const Watch::Waiting waiting(options_.parallel.watch, "weights");
    snapshot_.wait();
    back_to_back_ = false;
    parameters_.connect(stream_);
    const StepState fresh{.adam_t = state.adam_t, .skipped_steps = state.skipped_steps};
    CUDA_CHECK(cudaMemcpyAsync(state_, &fresh, sizeof fresh, cudaMemcpyHostToDevice, stream_));
    parameters_.load(state, stream_);
    CUDA_CHECK(cudaStreamSynchronize(stream_));
}

// Masters, moments and Adam's t change in the optimizer graph alone, so they can be read beside the micro-batches of the
// next step, whose optimizer graph is enqueued when all is read.
std::shared_future<void> GpuEngine::snapshot(TrainState& into) {
    const Watch::Waiting waiting(options_.parallel.watch, "a snapshot");
    std::vector<HostCopier::Range> ranges = parameters_.copies_to(into);
    ranges.insert(ranges.begin(), {&snapshot_state_, state_, sizeof(StepState)});
    const std::shared_future<void> copied = snapshot_.start(std::move(ranges), stream_);
    return std::async(std::launch::deferred, [this, copied, &into] {
               copied.get();
               into.adam_t = snapshot_state_.adam_t;
               into.skipped_steps = snapshot_state_.skipped_steps;
           }).share();
}

uint64_t GpuEngine::weights_digest() {
    const Watch::Waiting waiting(options_.parallel.watch, "weights");
    return parameters_.weights_digest(stream_);
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
    return memory_rows(arena_, communicating_, options_.parallel.world->size());
}

std::vector<LinearRow> GpuEngine::linear_table() const { return model_.linear_table(); }
