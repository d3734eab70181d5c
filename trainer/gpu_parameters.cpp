// Set-up: which arrays there are, where everything lies, the kernels' tables. What is done with them: gpu_parameters_step.cpp.
#include "trainer/gpu_parameters.h"

#include <algorithm>

#include "kernels/common/cuda_check.h"
#include "kernels/global_norm.h"

namespace {

std::vector<int> unit_of_parameter(const ParameterList& list) {
    std::vector<int> units(list.all.size(), -1);
    for (size_t u = 0; u < list.units.size(); ++u)
        for (const int p : list.units[u].parameters) units[size_t(p)] = int(u);
    return units;
}

std::vector<int> slot_of_parameter(const ParameterList& list, const Recipe& recipe) {
    std::vector<int> slots(list.all.size(), -1);
    int count = 0;
    for (const Unit& unit : list.units)
        if (unit.fits_fp8 && recipe.quantizes())
            for (const int p : unit.parameters) slots[size_t(p)] = count++;
    return slots;
}

// Of the rest, what BF16 matmuls, sums and lookups read; norms use the FP32 master.
std::vector<int> rounded_rest(const ParameterList& list) {
    std::vector<int> rounded{list.wpe};
    for (const BlockParameters& b : list.blocks) rounded.insert(rounded.end(), {b.qkv_bias, b.proj_bias, b.fc1_bias, b.fc2_bias});
    return rounded;
}

template <class T>
void upload(T* device, const std::vector<T>& host) {
    if (!host.empty()) CUDA_CHECK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
}

}  // namespace

GpuParameters::GpuParameters(const EngineOptions& options, const ParameterList& list)
    : options_(options), list_(list), held_(held_by(list, options.parallel.group->rank(), options.parallel.group->size())),
      unit_of_(unit_of_parameter(list)), slot_index_(slot_of_parameter(list, options.recipe)), embedding_units_{list.embedding_unit},
      slot_count_(1 + *std::max_element(slot_index_.begin(), slot_index_.end())),
      shape_(sharding_shape(options.parallel, int(list.blocks.size()), slot_count_ > 0)), rest_bf16_(list.all.size(), nullptr),
      places_(list.units.size()), unit_weights_(list.units.size(), nullptr), unit_transposed_(list.units.size(), nullptr) {
    for (size_t layer = 0; layer < list.block_units.size(); ++layer)
        for (const int unit : list.block_units[layer]) places_[size_t(unit)].layer = int(layer);
    for (size_t u = 0; u < places_.size(); ++u) {
        Place& place = places_[u];
        place.fp8 = list.units[u].fits_fp8 && options.recipe.quantizes();
        place.elements = list.units[u].elements;
        place.slice = place.elements / list.ranks;
    }
    const BlockBuffer block(list.block_units.front().size(), nullptr), embedding(1, nullptr);  // the blocks are alike
    const auto in_turn = [&](std::vector<BlockBuffer>& buffers, bool wanted) {
        if (!wanted) return;
        buffers.assign(size_t(buffer_count()), block);
        buffers.push_back(embedding);
    };
    in_turn(gathered_, shape_.gathers);
    if (shape_.gathers) transposed_ = block;
    in_turn(partials_, shape_.partial);
    in_turn(arrived_, shape_.sharded && group().copies());
    in_turn(wires_, travels_narrow() && (shape_.sharded || shape_.replicates));
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

void GpuParameters::request(Arena& arena, Arena& communicating) {
    const size_t n = size_t(held_.elements);
    Arena& shared = shape_.sharded || shape_.replicates || shape_.reduces_rest ? communicating : arena;
    arena.request(params_, n, "master weights (FP32)");
    request_gradients(shared);
    arena.request(m_, n, "Adam moments (FP32)");
    arena.request(v_, n, "Adam moments (FP32)");
    request_tables(arena, shared);
    request_weights(arena, shared);
}

void GpuParameters::request_gradients(Arena& shared) {
    shared.request(grads_, size_t(shape_.partial ? held_.elements : list_.flat_elements), "gradients (FP32)");
    const auto request_in_turn = [&](std::vector<BlockBuffer>& buffers, int64_t bytes, const std::string& row) {
        for (size_t b = 0; b < buffers.size(); ++b) {
            const std::vector<int>& units = units_of(b + 1 == buffers.size() ? kEmbedding : 0);
            for (size_t k = 0; k < units.size(); ++k) shared.request(buffers[b][k], size_t(unit_at(units[k]).elements * bytes), row);
        }
    };
    const int64_t width = bytes_of(options_.parallel.gradient_element);
    const std::string on_their_way = message("gradients on their way (%s)", travels_narrow() ? "BF16" : "FP32");
    request_in_turn(partials_, int64_t(sizeof(float)), "gradients of a micro-batch (FP32)");
    request_in_turn(arrived_, width, on_their_way);
    request_in_turn(wires_, width, on_their_way);
}

void GpuParameters::request_tables(Arena& arena, Arena& shared) {
    const size_t parameters = list_.all.size(), slots = size_t(slot_count_);
    shared.request(norm_partials_, size_t(norm_partials()), "step state, tables");
    arena.request(slice_partials_, shape_.sharded ? list_.units.size() * size_t(global_norm_partials()) : 0, "step state, tables");
    arena.request(adamw_tensors_, held_.pieces.size(), "step state, tables");
    arena.request(quantized_, shape_.sharded ? 0 : parameters, "step state, tables");
    arena.request(slot_tensors_, shape_.sharded ? slots : 0, "step state, tables");
    arena.request(pieces_, shape_.sharded ? held_.pieces.size() : 0, "step state, tables");
    arena.request(transposes_, shape_.sharded ? slots : 0, "step state, tables");
}

void GpuParameters::request_weights(Arena& arena, Arena& shared) {
    const char* const kFp8 = "FP8 weights and their transposes";
    const char* const kBf16 = "BF16 weight copies";
    for (const int i : rounded_rest(list_)) arena.request(rest_bf16_[size_t(i)], size_t(list_[i].padded_count()), kBf16);
    for (size_t u = 0; u < places_.size(); ++u) {
        const Place& place = places_[u];
        if (shape_.gathers && place.layer == kEmbedding) continue;  // its slice is where it is gathered
        const size_t elements = size_t(shape_.gathers ? place.slice : place.elements);
        (shape_.gathers ? arena : shared).request(unit_weights_[u], elements * size_t(place.width()), place.fp8 ? kFp8 : kBf16);
        if (place.fp8 && !shape_.gathers) arena.request(unit_transposed_[u], elements, kFp8);
    }
    for (size_t b = 0; b < gathered_.size(); ++b) {
        const std::vector<int>& units = units_of(b + 1 == gathered_.size() ? kEmbedding : 0);
        for (size_t k = 0; k < units.size(); ++k) {
            const Place& place = places_[size_t(units[k])];
            shared.request(gathered_[b][k], size_t(place.elements * place.width()), "gathered weights");
            if (b == 0 && place.fp8) arena.request(transposed_[k], size_t(place.elements), "gathered weights");
        }
    }
    shared.request(slots_, size_t(slot_count_), "scales");
}

int GpuParameters::norm_partials() const { return (shape_.sharded ? group().size() * kFoldedPartials : 0) + global_norm_partials(); }
float* GpuParameters::folded_norm() const { return norm_partials_ + group().rank() * kFoldedPartials; }

// ---------------------------------------------------------------------------------------------------------------------
// Places and tables

void GpuParameters::bind(StepState* state) {
    state_ = state;
    place_units();
    upload_adamw_tables();
    upload_quantize_tables();
    upload_transposes();
    for (const Position position : {Position::only, Position::first, Position::middle, Position::last}) streams_.prepare(micro_batch_schedule(shape_, position));
    streams_.prepare(optimizer_schedule(shape_));
    if (options_.poison) poison();
}

void GpuParameters::place_units() {
    const int rank = group().rank();
    for (size_t u = 0; u < places_.size(); ++u) {
        Place& place = places_[u];
        const std::vector<int>& siblings = units_of(place.layer);
        const size_t k = size_t(std::find(siblings.begin(), siblings.end(), int(u)) - siblings.begin());
        const auto turn = [&](const std::vector<BlockBuffer>& buffers) { return (place.layer == kEmbedding ? buffers.back() : buffers[size_t(shape_.buffer_of(place.layer))])[k]; };

        place.weights = shape_.gathers ? turn(gathered_) : unit_weights_[u];
        const bool in_place = !shape_.gathers || place.layer == kEmbedding;
        place.own = in_place ? place.weights + place.slice_bytes() * rank : unit_weights_[u];
        if (place.fp8) place.transposed = reinterpret_cast<uint8_t*>(shape_.gathers ? transposed_[k] : unit_transposed_[u]);
        if (shape_.partial) {
            place.gradients = reinterpret_cast<float*>(turn(partials_));
            place.reduced = grads_ + held_.unit_offsets[u];
        } else {
            place.gradients = grads_ + unit_at(int(u)).begin;
            place.reduced = place.gradients + place.slice * rank;
        }
        if (!arrived_.empty()) place.arrived = turn(arrived_);
        if (!wires_.empty()) place.wire = reinterpret_cast<__nv_bfloat16*>(turn(wires_));
    }
}

// Where AdamW puts what follows from new masters, a piece each. Units are in the order of the flat arrays, so the embedding's
// pieces come first.
void GpuParameters::upload_adamw_tables() {
    std::vector<AdamWTensor> tensors;
    for (const HeldPiece& piece : held_.pieces) {
        const Parameter& p = list_[piece.parameter];
        AdamWTensor t{.offset = piece.offset, .grad_offset = 0, .count = piece.count, .bf16_copy = nullptr, .slot = slot(piece.parameter),
                      .weight_decay = p.decays ? options_.adamw.weight_decay : 0.0f, .first_block = 0};
        const int unit = unit_of_[size_t(piece.parameter)];
        if (unit < 0) {
            t.grad_offset = gradient(piece.parameter) - grads_;
            t.bf16_copy = rest_bf16_[size_t(piece.parameter)];
        } else {
            const Place& place = places_[size_t(unit)];
            const int64_t at = piece.offset - held_.unit_offsets[size_t(unit)];  // in the slice
            t.grad_offset = place.reduced - grads_ + at;
            if (!place.fp8) t.bf16_copy = reinterpret_cast<__nv_bfloat16*>(place.own) + at;
        }
        tensors.push_back(t);
    }
    if (shape_.sharded) {
        const auto of_embedding = [&](const HeldPiece& piece) { return unit_of_[size_t(piece.parameter)] == list_.embedding_unit; };
        adamw_embedding_.count = int(std::count_if(held_.pieces.begin(), held_.pieces.end(), of_embedding));
        REQUIRE(std::all_of(held_.pieces.begin(), held_.pieces.begin() + adamw_embedding_.count, of_embedding), "the embedding's %d pieces do not come first", adamw_embedding_.count);
    }
    adamw_others_ = {.first = adamw_embedding_.count, .count = int(tensors.size()) - adamw_embedding_.count};
    for (AdamWPart* part : {&adamw_embedding_, &adamw_others_}) part->blocks = adamw_plan(tensors.data() + part->first, part->count);
    upload(adamw_tensors_, tensors);
    if (!shape_.sharded) return;
    std::vector<AdamWTensor> slots;
    for (int i = 0; i < slot_count_; ++i)
        slots.push_back({.offset = 0, .grad_offset = 0, .count = 0, .bf16_copy = nullptr, .slot = slots_ + i, .weight_decay = 0, .first_block = 0});
    upload(slot_tensors_, slots);
}

// On one rank the masters of a matrix are cast with its transpose; otherwise the pieces of a slice, in place of the unit.
void GpuParameters::upload_quantize_tables() {
    std::vector<QuantizeWeight> weights;
    std::vector<QuantizePiece> pieces;
    for (const HeldPiece& piece : held_.pieces) {
        if (slot(piece.parameter) == nullptr) continue;
        const Parameter& p = list_[piece.parameter];
        const int unit = unit_of_[size_t(piece.parameter)];
        const Place& place = places_[size_t(unit)];
        const int64_t at = piece.offset - held_.unit_offsets[size_t(unit)];
        uint8_t* const codes = reinterpret_cast<uint8_t*>(place.own) + at;
        if (shape_.sharded)
            pieces.push_back({.master = params_ + piece.offset, .q = codes, .slot = slot(piece.parameter), .count = piece.count, .first_tile = 0});
        else
            weights.push_back({.master = params_ + piece.offset, .q = codes, .qt = place.transposed + at, .slot = slot(piece.parameter),
                               .N = p.rows, .K = p.cols, .first_tile = 0});
    }
    quantized_count_ = int(weights.size() + pieces.size());
    if (quantized_count_ == 0) return;
    quantized_tiles_ = shape_.sharded ? quantize_pieces_plan(pieces.data(), quantized_count_) : quantize_weights_plan(weights.data(), quantized_count_);
    upload(quantized_, weights);
    upload(pieces_, pieces);
}

// A unit's matrices are planned together: one launch.
void GpuParameters::upload_transposes() {
    if (!shape_.sharded) return;
    std::vector<TransposeCodes> all;
    for (size_t u = 0; u < places_.size(); ++u) {
        Place& place = places_[u];
        if (!place.fp8) continue;
        std::vector<TransposeCodes> matrices;
        for (const int i : list_.units[u].parameters)
            matrices.push_back({.q = codes(i), .qt = const_cast<uint8_t*>(codes_transposed(i)), .N = list_[i].rows, .K = list_[i].cols, .first_tile = 0});
        place.transposes = transposes_ + all.size();
        place.matrices = int(matrices.size());
        place.transposed_tiles = transpose_codes_plan(matrices.data(), place.matrices);
        all.insert(all.end(), matrices.begin(), matrices.end());
    }
    upload(transposes_, all);
}

// For tests: NaN wherever something must have been written before it is read. Gaps between tensors stay zero, as they are summed.
void GpuParameters::poison() const {
    constexpr int kNan = 0xff;
    if (!shape_.sharded) return;
    CUDA_CHECK(cudaMemset(grads_, kNan, size_t(shape_.partial ? held_.rest_offset : list_.cleared_from) * sizeof(float)));
    for (size_t u = 0; u < places_.size(); ++u) {
        const Place& place = places_[u];
        CUDA_CHECK(cudaMemset(place.weights, kNan, size_t(place.elements * place.width())));
        if (place.fp8) CUDA_CHECK(cudaMemset(place.transposed, kNan, size_t(place.elements)));
        if (shape_.partial) CUDA_CHECK(cudaMemset(place.gradients, kNan, size_t(place.elements) * sizeof(float)));
        int64_t end = 0;
        const auto clear_gap_before = [&](int64_t begin) { CUDA_CHECK(cudaMemset(place.gradients + end, 0, size_t(begin - end) * sizeof(float))); };
        for (const int i : list_.units[u].parameters) {
            clear_gap_before(list_[i].offset - list_.units[u].begin);
            end = list_[i].offset - list_.units[u].begin + list_[i].padded_count();
        }
        clear_gap_before(place.elements);
    }
    for (const Place& place : places_)
        if (place.wire != nullptr) CUDA_CHECK(cudaMemset(place.wire, kNan, size_t(place.elements) * sizeof(__nv_bfloat16)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Where a parameter is

const float* GpuParameters::master(int parameter) const {
    REQUIRE(unit_of_[size_t(parameter)] < 0, "%s: its master is cut over ranks", list_[parameter].name.c_str());
    return params_ + held_.rest_offset + list_[parameter].offset - list_.cleared_from;
}

const __nv_bfloat16* GpuParameters::bf16(int parameter) const {
    const int unit = unit_of_[size_t(parameter)];
    if (unit < 0) return rest_bf16_[size_t(parameter)];
    const Place& place = places_[size_t(unit)];
    return place.fp8 ? nullptr : reinterpret_cast<const __nv_bfloat16*>(place.weights) + list_[parameter].offset - unit_at(unit).begin;
}

const uint8_t* GpuParameters::codes(int parameter) const {
    if (slot(parameter) == nullptr) return nullptr;
    const int unit = unit_of_[size_t(parameter)];
    return reinterpret_cast<const uint8_t*>(places_[size_t(unit)].weights) + list_[parameter].offset - unit_at(unit).begin;
}

const uint8_t* GpuParameters::codes_transposed(int parameter) const {
    if (slot(parameter) == nullptr) return nullptr;
    const int unit = unit_of_[size_t(parameter)];
    return places_[size_t(unit)].transposed + list_[parameter].offset - unit_at(unit).begin;
}

QuantSlot* GpuParameters::slot(int parameter) const {
    const int index = slot_index_[size_t(parameter)];
    return index < 0 ? nullptr : slots_ + index;
}

float* GpuParameters::gradient(int parameter) const {
    const int unit = unit_of_[size_t(parameter)];
    const int64_t offset = list_[parameter].offset;
    return unit < 0 ? rest_gradients() + offset - list_.cleared_from : places_[size_t(unit)].gradients + offset - unit_at(unit).begin;
}
