// The GPU's side of Engine: parameter and optimizer arrays, the step as graphs, staging of tokens and results.
//
// A step is: new inputs, then for every micro-batch the tokens and the graph of its position, then the optimizer graph,
// then a copy of StepState to the host. Everything is enqueued on one stream without waiting.
#pragma once
#include <deque>

#include "kernels/adamw.h"
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
    std::shared_ptr<void> pin(TrainState& into) override { return snapshot_.pin({into.params, into.m, into.v}); }
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

    void request_memory();
    void build_tensor_tables();
    void enqueue_micro_batches(Staging& staging, const StepInputs& in, std::span<const int> inputs, std::span<const int> targets);
    void enqueue_reduction();  // over the ranks
    void enqueue_optimizer();
    void enqueue_weight_quantization(const uint32_t* skip);
    Staging& next_staging();

    EngineOptions options_;
    ParameterList list_;
    cudaStream_t stream_ = nullptr;
    Arena arena_;
    Gemm gemm_;
    GpuModel model_;
    CudaGraph micro_batch_graphs_[kPositions], optimizer_graph_, evaluation_graph_, hidden_graph_;

    ParameterArrays arrays_;
    float* m_ = nullptr;
    float* v_ = nullptr;
    StepState* state_ = nullptr;
    float* norm_partials_ = nullptr;
    float* evaluation_loss_ = nullptr;
    AdamWTensor* adamw_tensors_ = nullptr;
    int adamw_blocks_ = 0;
    QuantizeWeight* quantized_ = nullptr;
    int quantized_count_ = 0;
    int64_t quantized_tiles_ = 0;
    Dtype weight_format_;

    Staging staging_[kStagings];
    int64_t enqueued_ = 0, collected_ = 0;
    HostCopier snapshot_;
    StepState snapshot_state_{};
    bool back_to_back_ = false;  // nothing but the step enqueued last has used the stream since
};
