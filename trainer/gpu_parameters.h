// The parameters on the GPU, on one rank or spread over many: masters, moments, gradients, the weights as they are multiplied
// and what the optimizer does with them. trainer/reference/parameter_store is the same on the reference device.
//
// A unit (parameters.h) is one flat buffer in the format of its GEMMs, FP8 codes or BF16, ready to be multiplied as gathered;
// a rank's part of it is a slice. Where everything lies is fixed for a run, so the model takes its pointers once:
//
//   --shard     unit's weights                                transposed FP8 copies       gradients that backward writes
//   none        all, cast with their transposes               all                         all
//   optimizer   all, slices cast here, the rest gathered      all, rebuilt with the       all
//                                                             first micro-batch
//   gradients   as optimizer                                  as optimizer                two blocks', and the embedding's
//   full        slices; two blocks' buffers in turn, and      of one block, rebuilt       two blocks', and the embedding's
//               the embedding's                               before its backward
//
// In what order units are gathered, used and reduced: sharding_schedule.h. Norms, biases and positions are the `rest`, which
// every rank holds. Gaps between tensors are zeros in all arrays of gradients, so that slices can be summed and squared whole:
// kernels write tensors, and sums of ranks' slices have gaps where those have. A run on one rank, and --shard none, have no slices and no such buffers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <vector>

#include "kernels/adamw.h"
#include "kernels/common/arena.h"
#include "kernels/quantize.h"
#include "trainer/engine.h"
#include "trainer/host_copier.h"
#include "trainer/sharding_schedule.h"
#include "trainer/two_streams.h"

class GpuParameters {
  public:
    // Both must outlive it. `list`: made for the ranks of the group.
    GpuParameters(const EngineOptions& options, const ParameterList& list);

    // Set-up: request memory (what ranks exchange lies in an arena of its own), allocate both arenas, then bind.
    void request(Arena& arena, Arena& communicating);
    void bind(StepState* state);

    const ShardingShape& shape() const { return shape_; }
    TwoStreams& streams() { return streams_; }

    // Where a parameter is, from bind() on. Weights of a block hold what they should between its gather and its release.
    const float* master(int parameter) const;               // of the rest
    const __nv_bfloat16* bf16(int parameter) const;         // null where there is none
    const uint8_t* codes(int parameter) const;              // null unless multiplied in FP8
    const uint8_t* codes_transposed(int parameter) const;   // the same
    QuantSlot* slot(int parameter) const;                   // the same
    float* gradient(int parameter) const;
    // How a micro-batch's GEMMs leave the gradients of units: as the first one does if they are reduced every time.
    Position unit_position(Position position) const { return shape_.partial ? Position::only : position; }
    // Of what is only ever added to; before a step's first micro-batch.
    void clear_added_gradients(cudaStream_t stream) const;

    // One of the schedule's tasks that are not the model's, with a micro-batch's position.
    void execute(const Operation& operation, Position position, cudaStream_t stream);

    // Lets ranks connect, before any collective is captured. Leaves anything in the gradients.
    void connect(cudaStream_t stream);
    // The optimizer, once the gradients are complete. Capturable.
    void update(cudaStream_t stream);
    // Of what this rank holds. Collective, like what follows: weights are gathered.
    void load(const TrainState& state, cudaStream_t stream);
    // Of masters and moments.
    std::vector<HostCopier::Range> copies_to(TrainState& state) const;

    // For tests, eager. All gradients in the order of the list; a hash of all weights as multiplied.
    std::vector<float> all_gradients(cudaStream_t stream);
    uint64_t weights_digest(cudaStream_t stream);

  private:
    struct Place {  // of a unit
        int layer = kEmbedding;
        bool fp8 = false;
        int64_t elements = 0, slice = 0;
        char* weights = nullptr;        // as multiplied, the whole unit
        char* own = nullptr;            // this rank's slice of it, where the optimizer puts it
        uint8_t* transposed = nullptr;  // FP8: of every matrix, at its place of the unit
        float* gradients = nullptr;     // the whole unit's, where backward puts them
        float* reduced = nullptr;       // this rank's slice, where the optimizer finds it
        char* arrived = nullptr;        // every rank's gradients of this rank's slice
        __nv_bfloat16* wire = nullptr;  // the whole unit's gradients, where they travel in BF16
        const TransposeCodes* transposes = nullptr;  // in device memory
        int matrices = 0;
        int64_t transposed_tiles = 0;

        int64_t width() const { return fp8 ? 1 : 2; }  // bytes of a weight
        int64_t slice_bytes() const { return slice * width(); }
    };
    // One block's worth of a kind of buffer, one array a unit of it; the embedding's has one.
    using BlockBuffer = std::vector<char*>;

    int buffer_count() const { return shape_.buffers(); }
    const std::vector<int>& units_of(int layer) const { return layer == kEmbedding ? embedding_units_ : list_.block_units[size_t(layer)]; }
    const Unit& unit_at(int unit) const { return list_.units[size_t(unit)]; }
    Communicator& group() const { return *options_.parallel.group; }
    int64_t rest_elements() const { return list_.flat_elements - list_.cleared_from; }
    float* rest_gradients() const { return grads_ + (shape_.partial ? held_.rest_offset : list_.cleared_from); }
    int norm_partials() const;
    float* folded_norm() const;  // this rank's part of what ranks exchange

    void request_weights(Arena& arena, Arena& shared);
    void request_gradients(Arena& shared);
    void request_tables(Arena& arena, Arena& shared);
    void place_units();
    void upload_adamw_tables();
    void upload_quantize_tables();
    void upload_transposes();
    void poison() const;

    void gather(int unit, cudaStream_t stream) const;
    void transpose(int unit, cudaStream_t stream) const;
    bool travels_narrow() const { return options_.parallel.gradient_element == Element::bf16; }
    void* sent(const Place& place) const { return travels_narrow() ? static_cast<void*>(place.wire) : place.gradients; }
    void reduce_over_group(const Place& place, cudaStream_t stream) const;
    void sum(const Place& place, Position position, cudaStream_t stream) const;
    void reduce_over_replicas(const Place& place, cudaStream_t stream) const;
    void reduce_rest(cudaStream_t stream) const;
    void reduce_norm(cudaStream_t stream) const;
    void reduce_amaxes(cudaStream_t stream) const;
    void measure_blocks(cudaStream_t stream) const;
    void measure_norm(cudaStream_t stream) const;
    void prepare(cudaStream_t stream) const;
    void cast(cudaStream_t stream) const;
    // The embedding's pieces, which are updated first if they are then gathered, and the others.
    struct AdamWPart {
        int first = 0, count = 0, blocks = 0;
    };
    AdamWUpdate adamw(const AdamWPart& part) const;

    const EngineOptions& options_;
    const ParameterList& list_;
    const Held held_;
    const std::vector<int> unit_of_;       // by parameter; -1: of the rest
    const std::vector<int> slot_index_;    // by parameter; -1: not multiplied in FP8
    const std::vector<int> embedding_units_;
    const int slot_count_;
    const ShardingShape shape_;
    TwoStreams streams_;
    StepState* state_ = nullptr;
    const uint32_t* skip_ = nullptr;  // device flag of the update being enqueued: leave the weights; null: do not ask

    float* params_ = nullptr;  // as held
    float* m_ = nullptr;
    float* v_ = nullptr;
    float* grads_ = nullptr;   // in the order of the list, or as held when they are reduced every micro-batch
    QuantSlot* slots_ = nullptr;
    std::vector<__nv_bfloat16*> rest_bf16_;  // by parameter

    std::vector<Place> places_;             // by unit
    std::vector<char*> unit_weights_;       // by unit: the whole, or with full sharding the slice
    std::vector<char*> unit_transposed_;    // by unit, unless gathered for every use
    std::vector<BlockBuffer> gathered_;     // full sharding: by buffer; the last one is the embedding's
    BlockBuffer transposed_;                // full sharding: of one block
    std::vector<BlockBuffer> partials_;     // reduced every micro-batch: by buffer; the last one is the embedding's
    std::vector<BlockBuffer> arrived_;      // slices travel as they are: the same
    std::vector<BlockBuffer> wires_;        // gradients travel in BF16: the same

    AdamWTensor* adamw_tensors_ = nullptr;  // a piece each
    AdamWPart adamw_embedding_, adamw_others_;
    AdamWTensor* slot_tensors_ = nullptr;   // sharded: every slot, also of matrices that this rank has no piece of
    QuantizeWeight* quantized_ = nullptr;   // not sharded
    QuantizePiece* pieces_ = nullptr;       // sharded
    int quantized_count_ = 0;
    int64_t quantized_tiles_ = 0;
    TransposeCodes* transposes_ = nullptr;  // sharded: every FP8 matrix
    float* norm_partials_ = nullptr;        // what optimizer_prepare adds: sharded: every rank's slices, folded; then the rest or all
    float* slice_partials_ = nullptr;       // sharded: of every unit's slice
};
