#include "trainer/reference/parameter_store.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/common/check.h"
#include "kernels/common/mark.h"
#include "trainer/distributed/shard.h"
#include "trainer/reference/adamw.h"
#include "trainer/reference/quantizer.h"

namespace reference {
namespace {

std::vector<int> unit_of_parameter(const ParameterList& list) {
    std::vector<int> units(list.all.size(), -1);
    for (size_t u = 0; u < list.units.size(); ++u)
        for (const int p : list.units[u].parameters) units[size_t(p)] = int(u);
    return units;
}

size_t units_of_a_block(const ParameterList& list) { return list.block_units.front().size(); }  // the blocks are alike

}  // namespace

ParameterStore::ParameterStore(const ParameterList& list, const Recipe& recipe, const Parallel& parallel)
    : list_(list), recipe_(recipe), parallel_(parallel), held_(held_by(list, parallel.group->rank(), parallel.group->size())),
      gathers_(parallel.gathers_every_use() && parallel.group->size() > 1),
      partial_(parallel.reduces_every_micro_batch() && parallel.group->size() > 1), unit_of_(unit_of_parameter(list)) {
    for (std::vector<float>* held : {&params_, &m_, &v_}) held->resize(size_t(held_.elements));
    amaxes_.resize(list.all.size());
    scales_.assign(list.all.size(), 1.0f);
    inv_scales_.assign(list.all.size(), 1.0f);
    weights_.resize(size_t(list.flat_elements - (gathers_ ? list.cleared_from : 0)));
    grads_.resize(size_t(partial_ ? held_.elements : list.flat_elements));
    // One for the embedding, which is used at both ends of a pass, and two blocks' for the others.
    const size_t buffers = 1 + 2 * units_of_a_block(list);
    if (gathers_) {
        slices_.resize(list.units.size());
        gathered_.resize(buffers);
    }
    if (partial_) partials_.resize(buffers);
}

// ---------------------------------------------------------------------------------------------------------------------
// State

void ParameterStore::load(const TrainState& state) {
    const size_t n = size_t(held_.elements);
    REQUIRE(state.params.size() == n, "load: %zu parameters, this rank holds %zu", state.params.size(), n);
    for (const std::vector<float>* moment : {&state.m, &state.v})
        REQUIRE(moment->empty() || moment->size() == n, "load: %zu moments, this rank holds %zu", moment->size(), n);
    params_ = state.params;
    m_ = state.m.empty() ? std::vector<float>(n) : state.m;
    v_ = state.v.empty() ? std::vector<float>(n) : state.v;
    refresh();
}

void ParameterStore::save(TrainState& state) const {
    state.params = params_;
    state.m = m_;
    state.v = v_;
}

ParameterStore::Bytes ParameterStore::bytes() const {
    const auto floats = [](const auto&... x) { return double((x.size() + ...)) * sizeof(float); };
    Bytes b{floats(params_), floats(m_, v_), floats(grads_), floats(weights_)};
    for (const Partial& p : partials_) b.gradients += floats(p.values);
    for (const Gathered& g : gathered_) b.weights += floats(g.values) + double(g.wire.size());
    for (const auto& slice : slices_) b.weights += double(slice.size());
    return b;
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights as multiplied

void ParameterStore::refresh() {
    measure_scales();
    for (Gathered& g : gathered_) {
        REQUIRE(!g.used, "new weights while unit %d is in use", g.unit);
        g.unit = -1;
    }
    for (size_t unit = 0; unit < list_.units.size(); ++unit) cast_unit(int(unit));
    refresh_rest();
}

// Of each matrix the maximum over the ranks that hold a part of it; as bits, non-negative floats keep their order.
void ParameterStore::measure_scales() {
    if (!recipe_.quantizes()) return;
    std::fill(amaxes_.begin(), amaxes_.end(), 0);
    for (const HeldPiece& piece : held_.pieces) {
        const int unit = unit_of_[size_t(piece.parameter)];
        if (unit < 0 || !fp8(unit_at(unit))) continue;
        const float amax = amax_of({params_.data() + piece.offset, size_t(piece.count)});
        uint32_t& most = amaxes_[size_t(piece.parameter)];
        most = std::max(most, std::bit_cast<uint32_t>(amax));
    }
    parallel_.group->all_reduce(amaxes_.data(), int64_t(amaxes_.size()), Element::u32, Reduction::max);
    for (const Unit& unit : list_.units) {
        if (!fp8(unit)) continue;
        for (const int p : unit.parameters) {
            scales_[size_t(p)] = scale_from_amax(std::bit_cast<float>(amaxes_[size_t(p)]), recipe_.output.b.dtype);
            inv_scales_[size_t(p)] = 1.0f / scales_[size_t(p)];
        }
    }
}

int64_t ParameterStore::wire_bytes(const Unit& unit) const { return fp8(unit) ? 1 : recipe_.rounds_to_bf16() ? 2 : 4; }

void ParameterStore::cast_unit(int index) {
    const Unit& unit = unit_at(index);
    if (parallel_.group->size() == 1) {  // all of it is here: nothing needs to travel
        for (const int i : unit.parameters) {
            const Parameter& p = list_[i];
            const float* master = params_.data() + p.offset;
            float* out = weights_.data() + p.offset;
            if (fp8(unit)) round_to_fp8(master, scales_[size_t(i)], recipe_.output.b.dtype, out, p.padded_count());
            else if (recipe_.rounds_to_bf16()) round_to_bf16(master, out, p.padded_count());
            else std::copy_n(master, p.padded_count(), out);
        }
        return;
    }
    const int64_t bytes = slice(unit) * wire_bytes(unit);
    if (gathers_) {
        slices_[size_t(index)].resize(size_t(bytes));
        cast_slice(index, slices_[size_t(index)].data());
        return;
    }
    std::vector<uint8_t> wire(size_t(bytes) * size_t(parallel_.group->size()));
    cast_slice(index, wire.data() + bytes * parallel_.group->rank());
    parallel_.group->all_gather(wire.data(), bytes);
    decode(index, wire.data(), weights_.data() + unit.begin);
}

// This rank's slice of a unit, as it travels. Gaps between tensors are zeros.
void ParameterStore::cast_slice(int index, uint8_t* wire) const {
    const Unit& unit = unit_at(index);
    const int64_t width = wire_bytes(unit);
    std::memset(wire, 0, size_t(slice(unit) * width));
    for (const HeldPiece& piece : held_.pieces) {
        if (unit_of_[size_t(piece.parameter)] != index) continue;
        const float* master = params_.data() + piece.offset;
        uint8_t* out = wire + (piece.offset - held_.unit_offsets[size_t(index)]) * width;
        const float scale = scales_[size_t(piece.parameter)];
        for (int64_t i = 0; i < piece.count; ++i) {
            const uint16_t half = bf16_bits(master[i]);
            if (width == 1) out[i] = encode_fp8(master[i] * scale, recipe_.output.b.dtype);
            else std::memcpy(out + i * width, width == 2 ? static_cast<const void*>(&half) : &master[i], size_t(width));
        }
    }
}

// A whole unit that has travelled.
void ParameterStore::decode(int index, const uint8_t* wire, float* values) const {
    const Unit& unit = unit_at(index);
    const int64_t n = unit.elements;
    if (fp8(unit)) {
        std::array<float, 256> table;
        for (int code = 0; code < 256; ++code) table[size_t(code)] = decode_fp8(uint8_t(code), recipe_.output.b.dtype);
        for (int64_t i = 0; i < n; ++i) values[i] = table[wire[i]];
    } else if (recipe_.rounds_to_bf16()) {
        for (int64_t i = 0; i < n; ++i) {
            uint16_t half;
            std::memcpy(&half, wire + 2 * i, sizeof half);
            values[i] = bf16_value(half);
        }
    } else {
        std::memcpy(values, wire, size_t(n) * sizeof(float));
    }
}

// Norms are used as the float master; everything that a BF16 matmul, sum or lookup reads is rounded.
void ParameterStore::refresh_rest() {
    float* rest = weights_.data() + (gathers_ ? 0 : list_.cleared_from);
    std::copy_n(params_.data() + held_.rest_offset, list_.flat_elements - list_.cleared_from, rest);
    if (!recipe_.rounds_to_bf16()) return;
    const auto round = [&](int parameter) {
        float* values = rest + list_[parameter].offset - list_.cleared_from;
        round_to_bf16(values, values, list_[parameter].padded_count());
    };
    round(list_.wpe);
    for (const BlockParameters& b : list_.blocks)
        for (const int bias : {b.qkv_bias, b.proj_bias, b.fc1_bias, b.fc2_bias}) round(bias);
}

void ParameterStore::gather(int index) {
    if (!gathers_) return;
    for (Gathered& g : gathered_)
        if (g.unit == index) {
            g.used = true;
            return;
        }
    // The embedding's buffer is the first; of the others the one that was released longest ago.
    Gathered* to = nullptr;
    for (size_t i = index == list_.embedding_unit ? 0 : 1; i < (index == list_.embedding_unit ? 1 : gathered_.size()); ++i)
        if (!gathered_[i].used && (!to || gathered_[i].turn < to->turn)) to = &gathered_[i];
    REQUIRE(to, "gather: unit %d: all %zu buffers are in use", index, gathered_.size());
    const Unit& unit = unit_at(index);
    const int64_t bytes = slice(unit) * wire_bytes(unit);
    to->wire.resize(size_t(bytes) * size_t(parallel_.group->size()));
    std::memcpy(to->wire.data() + bytes * parallel_.group->rank(), slices_[size_t(index)].data(), size_t(bytes));
    parallel_.group->all_gather(to->wire.data(), bytes);
    to->values.resize(size_t(unit.elements));
    decode(index, to->wire.data(), to->values.data());
    to->unit = index;
    to->used = true;
}

void ParameterStore::release(int index) {
    for (Gathered& g : gathered_)
        if (g.unit == index) {
            g.used = false;
            g.turn = ++turns_;
        }
}

const float* ParameterStore::get(int parameter) const {
    const Parameter& p = list_[parameter];
    const int unit = unit_of_[size_t(parameter)];
    if (!gathers_) return weights_.data() + p.offset;
    if (unit < 0) return weights_.data() + p.offset - list_.cleared_from;
    for (const Gathered& g : gathered_)
        if (g.unit == unit && g.used) return g.values.data() + p.offset - unit_at(unit).begin;
    throw Error(message("get: %s is not gathered", p.name.c_str()));
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients

void ParameterStore::begin_micro_batch(Position position) {
    if (starts_gradients(position)) std::fill(grads_.begin(), grads_.end(), 0.0f);
}

float* ParameterStore::grad(int parameter) {
    const Parameter& p = list_[parameter];
    const int unit = unit_of_[size_t(parameter)];
    if (!partial_) return grads_.data() + p.offset;
    if (unit < 0) return grads_.data() + held_.rest_offset + p.offset - list_.cleared_from;
    return partial(unit) + p.offset - unit_at(unit).begin;
}

// The buffer of a unit's gradients of this micro-batch, cleared when it is first asked for.
float* ParameterStore::partial(int index) {
    for (Partial& p : partials_)
        if (p.unit == index) return p.values.data();
    for (Partial& p : partials_)
        if (p.unit < 0) {
            p.unit = index;
            p.values.assign(size_t(unit_at(index).elements), 0.0f);
            return p.values.data();
        }
    throw Error(message("gradients of unit %d: all %zu buffers are in use", index, partials_.size()));
}

const float* ParameterStore::own_gradients(int index) const {
    const Unit& unit = unit_at(index);
    if (partial_) return grads_.data() + held_.unit_offsets[size_t(index)];
    return grads_.data() + unit.begin + slice(unit) * parallel_.group->rank();
}

namespace {

// Runs a collective on BF16 copies of x, or on x itself.
template <typename Collective>
void with_element(Element element, float* x, int64_t n, std::vector<uint16_t>& halves, const Collective& collective) {
    if (element == Element::f32) return collective(static_cast<void*>(x));
    halves.resize(size_t(n));
    for (int64_t i = 0; i < n; ++i) halves[size_t(i)] = bf16_bits(x[i]);
    collective(static_cast<void*>(halves.data()));
    for (int64_t i = 0; i < n; ++i) x[i] = bf16_value(halves[size_t(i)]);
}

}  // namespace

void ParameterStore::reduce_over_group(float* gradients, int64_t slice) {
    if (parallel_.group->size() == 1) return;
    const Element element = parallel_.gradient_element;
    with_element(element, gradients, slice * parallel_.group->size(), bf16_, [&](void* x) { parallel_.group->reduce_scatter(x, slice, element); });
}

void ParameterStore::reduce_over_replicas(float* gradients, int64_t slice) {
    if (parallel_.replicas->size() == 1) return;
    const Element element = parallel_.gradient_element;
    with_element(element, gradients, slice, bf16_, [&](void* x) { parallel_.replicas->all_reduce(x, slice, element, Reduction::sum); });
}

void ParameterStore::gradients_ready(int index, Position position) {
    const Unit& unit = unit_at(index);
    if (partial_) {
        float* values = partial(index);
        reduce_over_group(values, slice(unit));
        const float* mine = values + slice(unit) * parallel_.group->rank();
        float* sum = own_gradients(index);
        for (int64_t i = 0; i < slice(unit); ++i) sum[i] += mine[i];
        for (Partial& p : partials_)
            if (p.unit == index) p.unit = -1;
    } else if (completes_gradients(position)) {
        reduce_over_group(grads_.data() + unit.begin, slice(unit));
    }
    if (completes_gradients(position)) reduce_over_replicas(own_gradients(index), slice(unit));
}

// The replicated gradients are few: always in FP32.
void ParameterStore::end_micro_batch(Position position) {
    if (!completes_gradients(position)) return;
    parallel_.world->all_reduce(const_cast<float*>(rest_gradients()), rest_elements(), Element::f32, Reduction::sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Optimizer

float ParameterStore::gradient_norm() const {
    const Mark mark("global_norm");
    std::vector<double> sums(size_t(parallel_.group->size()));
    double& mine = sums[size_t(parallel_.group->rank())];
    for (size_t unit = 0; unit < list_.units.size(); ++unit) mine += sum_of_squares(own_gradients(int(unit)), slice(list_.units[unit]));
    parallel_.group->all_gather(sums.data(), sizeof(double));
    double sum = sum_of_squares(rest_gradients(), rest_elements());
    for (const double s : sums) sum += s;
    return float(std::sqrt(sum));
}

void ParameterStore::update(const AdamWConfig& config, const StepState& state) {
    const Mark mark("adamw_update");
    if (state.skip_update) return;
    for (const HeldPiece& piece : held_.pieces) {
        const Parameter& p = list_[piece.parameter];
        const int unit = unit_of_[size_t(piece.parameter)];
        const float* grads = unit < 0 ? grad(piece.parameter) : own_gradients(unit) + piece.offset - held_.unit_offsets[size_t(unit)];
        adamw_update(config, state, {.params = params_.data() + piece.offset, .grads = grads, .m = m_.data() + piece.offset, .v = v_.data() + piece.offset,
                                     .count = piece.count, .weight_decay = p.decays ? config.weight_decay : 0.0f});
    }
    refresh();
}

// ---------------------------------------------------------------------------------------------------------------------
// For tests

std::vector<float> ParameterStore::all_gradients() {
    std::vector<float> all(size_t(list_.flat_elements));
    for (size_t i = 0; i < list_.units.size(); ++i) {
        const Unit& unit = list_.units[i];
        float* values = all.data() + unit.begin;
        std::copy_n(own_gradients(int(i)), slice(unit), values + slice(unit) * parallel_.group->rank());
        parallel_.group->all_gather(values, slice(unit) * int64_t(sizeof(float)));
    }
    std::copy_n(rest_gradients(), rest_elements(), all.data() + list_.cleared_from);
    return all;
}

uint64_t ParameterStore::weights_digest() {
    uint64_t hash = 0xcbf29ce484222325u;
    const auto add = [&](uint32_t word) { hash = (hash ^ word) * 0x100000001b3u; };
    for (size_t i = 0; i < list_.all.size(); ++i) {
        add(amaxes_[i]);
        add(std::bit_cast<uint32_t>(scales_[i]));
        if (unit_of_[i] >= 0) gather(unit_of_[i]);
        const float* values = get(int(i));
        for (int64_t k = 0; k < list_.all[i].padded_count(); ++k) add(std::bit_cast<uint32_t>(values[k]));
        if (unit_of_[i] >= 0) release(unit_of_[i]);
    }
    return hash;
}

}  // namespace reference
