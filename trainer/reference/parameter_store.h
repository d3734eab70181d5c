// The parameters of the reference device, on one rank or spread over many: masters, moments, gradients, and the weights as
// they are multiplied (the master, its BF16 copy, or the values of its FP8 codes).
//
// The model code speaks of units (a block's matrices, the embedding) in four verbs and knows no ranks:
//
//   gather(unit)            its weights will be used
//   get(parameter)          its values; the unit has been gathered
//   release(unit)           not any more, for now
//   gradients_ready(unit)   this micro-batch has added the last of the unit's gradients
//
// What travels is what would be multiplied: each rank casts its slice of the master with the scale of the whole (amaxes of
// all matrices reduced in one MAX), and one-byte codes, or BF16, are gathered.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/common/step_state.h"
#include "trainer/parallel.h"
#include "trainer/parameters.h"
#include "trainer/position.h"
#include "trainer/recipe.h"

namespace reference {

class ParameterStore {
  public:
    ParameterStore(const ParameterList& list, const Recipe& recipe, const Parallel& parallel);

    void load(const TrainState& state);
    void save(TrainState& state) const;

    void gather(int unit);
    const float* get(int parameter) const;
    float inv_scale(int parameter) const { return inv_scales_[size_t(parameter)]; }
    void release(int unit);

    void begin_micro_batch(Position position);
    float* grad(int parameter);  // this micro-batch adds to it
    void gradients_ready(int unit, Position position);
    void end_micro_batch(Position position);  // every unit is ready; the replicated gradients too

    float gradient_norm() const;  // of the whole model's, once a step's gradients are complete
    void update(const AdamWConfig& config, const StepState& state);

    // For tests; collective. All gradients in the order of `list`; a hash of all amaxes, scales and weights as multiplied.
    std::vector<float> all_gradients();
    uint64_t weights_digest();

    struct Bytes {
        double masters, moments, gradients, weights;
    };
    Bytes bytes() const;

  private:
    const Unit& unit_at(int unit) const { return list_.units[size_t(unit)]; }
    bool fp8(const Unit& unit) const { return unit.fits_fp8 && recipe_.quantizes(); }
    int64_t slice(const Unit& unit) const { return unit.elements / list_.ranks; }
    int64_t wire_bytes(const Unit& unit) const;  // of one element
    float* partial(int unit);
    const float* own_gradients(int unit) const;  // this rank's slice, where the optimizer reads it
    float* own_gradients(int unit) { return const_cast<float*>(std::as_const(*this).own_gradients(unit)); }
    const float* rest_gradients() const { return grads_.data() + (partial_ ? held_.rest_offset : list_.cleared_from); }
    int64_t rest_elements() const { return list_.flat_elements - list_.cleared_from; }
    void reduce_over_group(float* gradients, int64_t slice);
    void reduce_over_replicas(float* gradients, int64_t slice);

    void refresh();          // weights as multiplied, from the masters
    void measure_scales();
    void cast_unit(int unit);
    void cast_slice(int unit, uint8_t* wire) const;
    void decode(int unit, const uint8_t* wire, float* values) const;
    void refresh_rest();

    const ParameterList& list_;
    const Recipe& recipe_;
    const Parallel parallel_;
    const Held held_;
    const bool gathers_;  // units are gathered for every use
    const bool partial_;  // gradients are reduced every micro-batch
    const std::vector<int> unit_of_;  // by parameter; -1: replicated

    std::vector<float> params_, m_, v_;  // as held
    std::vector<uint32_t> amaxes_;       // bits, by parameter; of matrices that are multiplied in FP8
    std::vector<float> scales_, inv_scales_;

    std::vector<float> weights_;                // all, or with full sharding only the rest
    std::vector<std::vector<uint8_t>> slices_;  // full sharding: this rank's slice of every unit, as it travels
    // Full sharding: units that are gathered now. Two block buffers, so that a block is gathered while another is used.
    struct Gathered {
        std::vector<float> values;
        std::vector<uint8_t> wire;
        int unit = -1;
        bool used = false;
        int64_t turn = 0;  // when it was released
    };
    std::vector<Gathered> gathered_;
    int64_t turns_ = 0;

    std::vector<float> grads_;  // all, or as held when reduced every micro-batch
    // Reduced every micro-batch: gradients of the units that the backward pass is in.
    struct Partial {
        std::vector<float> values;
        int unit = -1;
    };
    std::vector<Partial> partials_;
    std::vector<uint16_t> bf16_;
};

}  // namespace reference
