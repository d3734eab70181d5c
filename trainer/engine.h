// What the program asks of a device: the GPU (trainer/gpu_engine) and the reference device (trainer/reference) both
// implement it, so the loop, checkpoints, logs and tests are written once.
#pragma once
#include <cstdint>
#include <future>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/common/step_state.h"
#include "trainer/model_spec.h"
#include "trainer/parallel.h"
#include "trainer/parameters.h"
#include "trainer/recipe.h"

struct EngineOptions {
    ModelSpec model;
    Recipe recipe;
    int micro_batch;             // B: sequences of a micro-batch
    int seq_len;                 // T <= model.seq_len
    int micro_batches_per_step;  // of this rank
    AdamWConfig adamw;
    bool use_graphs = true;      // GPU only: false launches every kernel eagerly, with the same bits
    bool deterministic = false;  // GPU only: GEMM algorithms pinned to the heuristic's first choice, not tuned
    std::string attention = "auto";  // GPU only: backend, a name of kernels/attention.h
    std::string gemm_cache;      // GPU only: file of tuned GEMM algorithms, "" for none
    std::string pinned_gemms;    // GPU, deterministic: what gemm_choices() of the run that is resumed returned
    int logit_rows = 0;          // most rows of a call of logits(), at most micro_batch
    Parallel parallel = {};
    bool poison = false;         // GPU only, for tests: buffers of several ranks start as NaN, not as zeros
};

struct StepResult : StepState {
    double seconds = 0;  // from the end of the device work before this step to the end of the step
};

struct MemoryRow {
    std::string what;
    double bytes;
};

// One row of the precision table: a kind of linear or attention, what it runs in and why so.
struct LinearRow {
    std::string name, precision, reason;
    int count = 1;  // linears of the model that the row stands for
};

// What an engine would be, without making it.
struct EnginePlan {
    std::vector<MemoryRow> memory;
    std::vector<LinearRow> linears;
};

class Engine {
  public:
    virtual ~Engine() = default;

    // Every rank of a run makes the same calls in the same order; states are what the rank holds (held_by in parameters.h).
    virtual void load(const TrainState& state) = 0;  // empty moments mean zeros
    // Starts to copy the state as it is after the steps enqueued so far into `into`, all but `step` and `recent`. Further
    // steps can be enqueued meanwhile: the one that would change the state waits. `into` must stay until the future is ready.
    virtual std::shared_future<void> snapshot(TrainState& into) = 0;
    void save(TrainState& state) { snapshot(state).get(); }

    // One optimizer step on this rank's micro_batches_per_step * micro_batch sequences of seq_len tokens. A negative target
    // is masked. Only enqueues the work on a GPU: call collect() once for every enqueued step, in order, at most two behind.
    virtual void enqueue_step(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) = 0;
    virtual StepResult collect() = 0;
    // Steps to keep enqueued behind the one being collected, so that the device never waits for the host.
    virtual int steps_ahead() const { return 0; }

    // Gradients of the same loss, of all ranks' tokens, with no clipping and no update; for tests. Flat, in the order of
    // ParameterList.
    virtual std::vector<float> gradients(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) = 0;

    // Sum of the losses of one micro-batch's unmasked tokens; touches no training state.
    virtual double evaluate(std::span<const int> inputs, std::span<const int> targets) = 0;
    // The same losses one by one, 0 for a masked token.
    virtual void token_losses(std::span<const int> inputs, std::span<const int> targets, std::span<float> losses) = 0;
    // What the model expects after some tokens of a micro-batch: `positions` are indices into `inputs`, `logits` is
    // (positions, vocabulary). Touches no training state.
    virtual void logits(std::span<const int> inputs, std::span<const int> positions, std::span<float> logits) = 0;

    // A hash of every weight as it is multiplied, with its amax and scale: the same for the same masters on any number of
    // ranks, on one kind of device. For tests.
    virtual uint64_t weights_digest() = 0;

    virtual std::string device_name() const = 0;
    virtual std::vector<MemoryRow> memory_table() const = 0;
    virtual std::vector<LinearRow> linear_table() const = 0;
    virtual std::string gemm_choices() const { return ""; }  // one line a shape, for the checkpoint
};

std::unique_ptr<Engine> make_gpu_engine(const EngineOptions& options);
EnginePlan plan_gpu_engine(const EngineOptions& options);  // without a GPU: for an H100
std::unique_ptr<Engine> make_reference_engine(const EngineOptions& options);
