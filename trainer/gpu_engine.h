// The GPU's side of Engine: the step as graphs, staging of tokens and results. The parameters are GpuParameters'.
//
// A step is: new inputs, then for every micro-batch the tokens and the graph of its position, then the optimizer graph,
// then a copy of StepState to the host. Everything is enqueued on one stream without waiting.
#pragma once
#include <deque>

#include "trainer/cuda_graph.h"
#include "trainer/engine.h"
#include "trainer/gpu_model.h"
#include "trainer/host_copier.h"

class GpuEngine final : public Engine {
  public:
    explicit GpuEngine(const EngineOptions& options);
    ~GpuEngine() override;

    void load(const TrainState& state) override;
    std::shared_future<void> snapshot(TrainState& into) override;
    void enqueue_step(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) override;
    StepResult collect() override;
    int steps_ahead() const override { return 1; }
    std::vector<float> gradients(const StepInputs& in, std::span<const int> inputs, std::span<const int> targets) override;
    double evaluate(std::span<const int> inputs, std::span<const int> targets) override;
    void token_losses(std::span<const int> inputs, std::span<const int> targets, std::span<float> losses) override;
    void logits(std::span<const int> inputs, std::span<const int> positions, std::span<float> logits) override;
    uint64_t weights_digest() override;
    std::string device_name() const override;
    std::vector<MemoryRow> memory_table() const override;
    std::vector<LinearRow> linear_table() const override;
    std::string gemm_choices() const override { return gemm_.record(); }

  private:
    // Host memory that the GPU copies from and to while the host goes on; one for every step in flight.
    struct Staging {
        int* inputs = nullptr;
        int* targets = nullptr;
        StepState* state = nullptr;
        cudaEvent_t begin = nullptr;  // recorded before the step when it does not follow another one
        const Staging* follows = nullptr;  // the step that it began at the end of
        cudaEvent_t done = nullptr;
    };
    static constexpr int kStepsInFlight = 3;
    static constexpr int kStagings = kStepsInFlight + 1;  // one more: a step's time starts at the event of the one before

    void enqueue_micro_batches(Staging& staging, const StepInputs& in, std::span<const int> inputs, std::span<const int> targets);
    Staging& next_staging();

    EngineOptions options_;
    ParameterList list_;
    cudaStream_t stream_ = nullptr;
    Arena arena_, communicating_;  // what ranks exchange lies in an arena of its own
    Gemm gemm_;
    GpuParameters parameters_;
    GpuModel model_;
    CudaGraph micro_batch_graphs_[kPositions], optimizer_graph_, evaluation_graph_, hidden_graph_;

    StepState* state_ = nullptr;
    float* evaluation_loss_ = nullptr;

    Staging staging_[kStagings];
    int64_t enqueued_ = 0, collected_ = 0;
    HostCopier snapshot_;
    StepState snapshot_state_{};
    bool back_to_back_ = false;  // nothing but the step enqueued last has used the stream since
};
