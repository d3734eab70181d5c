// What a step does with the parameters: the schedule's tasks, the optimizer, state in and out.
#include <optional>

#include "kernels/accumulate.h"
#include "kernels/common/cuda_check.h"
#include "kernels/common/mark.h"
#include "kernels/global_norm.h"
#include "trainer/gpu_parameters.h"

void GpuParameters::clear_added_gradients(cudaStream_t stream) const {
    CUDA_CHECK(cudaMemsetAsync(rest_gradients(), 0, size_t(rest_elements()) * sizeof(float), stream));
    if (!shape_.partial) return;
    // Their sums, which come later, add: a graph serves every micro-batch but the first.
    for (const int layer : {0, kEmbedding})
        for (const int unit : units_of(layer)) {
            const Place& place = places_[size_t(unit)];
            CUDA_CHECK(cudaMemsetAsync(place.reduced, 0, size_t(place.slice) * sizeof(float), stream));
        }
}

void GpuParameters::execute(const Operation& operation, Position position, cudaStream_t stream) {
    std::optional<Mark> layer;
    if (operation.layer != kEmbedding) layer.emplace("layer", operation.layer);
    switch (operation.task) {
        case Task::gather:
            for (const int unit : units_of(operation.layer)) gather(unit, stream);
            return;
        case Task::transpose:
            for (const int unit : units_of(operation.layer)) transpose(unit, stream);
            return;
        case Task::reduce:
            for (const int unit : units_of(operation.layer)) reduce_over_group(places_[size_t(unit)], stream);
            return;
        case Task::sum:
            for (const int unit : units_of(operation.layer)) sum(places_[size_t(unit)], position, stream);
            return;
        case Task::replicate:
            for (const int unit : units_of(operation.layer)) reduce_over_replicas(places_[size_t(unit)], stream);
            return;
        case Task::reduce_rest: return reduce_rest(stream);
        case Task::reduce_norm: return reduce_norm(stream);
        case Task::reduce_amaxes: return reduce_amaxes(stream);
        case Task::measure_blocks: return measure_blocks(stream);
        case Task::measure_norm: return measure_norm(stream);
        case Task::prepare: return prepare(stream);
        case Task::update_embedding: return adamw_update(adamw(adamw_embedding_), stream);
        case Task::update: return adamw_update(adamw(adamw_others_), stream);
        case Task::cast: return cast(stream);
        default: throw Error(message("task %d is the model's", int(operation.task)));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights

void GpuParameters::gather(int unit, cudaStream_t stream) const {
    const Place& place = places_[size_t(unit)];
    const Mark mark("all_gather");
    char* const mine = place.weights + place.slice_bytes() * group().rank();
    if (place.own != mine) CUDA_CHECK(cudaMemcpyAsync(mine, place.own, size_t(place.slice_bytes()), cudaMemcpyDeviceToDevice, stream));
    group().all_gather(place.weights, place.slice_bytes(), stream);
}

void GpuParameters::transpose(int unit, cudaStream_t stream) const {
    const Place& place = places_[size_t(unit)];
    if (place.fp8) transpose_codes(place.transposes, place.matrices, place.transposed_tiles, nullptr, stream);
}

void GpuParameters::cast(cudaStream_t stream) const {
    if (slot_count_ == 0) return;
    const Dtype format = options_.recipe.output.b.dtype;
    if (!shape_.sharded) return quantize_weights(quantized_, quantized_count_, quantized_tiles_, format, skip_, &state_->nonfinite, stream);
    quantize_scales(slots_, slot_count_, format, skip_, &state_->nonfinite, stream);
    quantize_pieces(pieces_, quantized_count_, quantized_tiles_, format, skip_, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients

void GpuParameters::reduce_over_group(const Place& place, cudaStream_t stream) const {
    const Mark mark("reduce_scatter");
    const Element element = options_.parallel.gradient_element;
    if (travels_narrow()) round_to_bf16(place.gradients, place.wire, place.elements, stream);
    // Slices travel as they are: NCCL's sums would take SMs from the GEMMs beside them. Between machines its sums on the way save
    // the network most of the bytes.
    if (group().copies()) group().all_to_all(sent(place), place.arrived, place.slice * bytes_of(element), stream);
    else group().reduce_scatter(sent(place), place.slice, element, stream);
}

// Of this rank's slice, alone or added to what earlier micro-batches left (or to zeros, see clear_added_gradients). In FP32 in the
// order of the ranks, so with BF16 every rank's gradient is rounded once, however many ranks there are.
void GpuParameters::sum(const Place& place, Position position, cudaStream_t stream) const {
    const Mark mark("sum_of_ranks");
    const bool completed_last = place.layer <= 0, adds = shape_.partial && (completed_last || !starts_gradients(position));
    Accumulate sum{.sum = place.reduced, .add = place.arrived, .dtype = travels_narrow() ? Dtype::bf16 : Dtype::f32, .add_to_sum = adds, .n = place.slice};
    if (group().copies()) sum.parts = group().size(), sum.stride = place.slice;
    else sum.add = static_cast<char*>(sent(place)) + place.slice * bytes_of(options_.parallel.gradient_element) * group().rank();
    if (sum.add != sum.sum) accumulate(sum, stream);
}

void GpuParameters::reduce_over_replicas(const Place& place, cudaStream_t stream) const {
    Communicator& replicas = *options_.parallel.replicas;
    if (replicas.silent()) return;
    const Mark mark("all_reduce");
    if (options_.parallel.gradient_element == Element::f32) return replicas.all_reduce(place.reduced, place.slice, Element::f32, Reduction::sum, stream);
    round_to_bf16(place.reduced, place.wire, place.slice, stream);
    replicas.all_reduce(place.wire, place.slice, Element::bf16, Reduction::sum, stream);
    accumulate({.sum = place.reduced, .add = place.wire, .dtype = Dtype::bf16, .add_to_sum = false, .n = place.slice}, stream);
}

// Few, and always in FP32. Every rank then takes the same step: loss and flag are the same bits on all of them.
void GpuParameters::reduce_rest(cudaStream_t stream) const {
    const Mark mark("all_reduce");
    Communicator& world = *options_.parallel.world;
    world.all_reduce(rest_gradients(), rest_elements(), Element::f32, Reduction::sum, stream);
    world.all_reduce(&state_->loss_sum, 1, Element::f32, Reduction::sum, stream);
    world.all_reduce(&state_->nonfinite, 1, Element::u32, Reduction::max, stream);
}

// NCCL connects ranks, and takes memory for it, at the first collective of a kind: here, rather than while a graph is captured.
// Its copy engines' flags count eager calls and say 1 in graphs: more than one eager call must come before the first graph.
void GpuParameters::connect(cudaStream_t stream) {
    if (shape_.sharded) {
        gather(list_.embedding_unit, stream);
        reduce_norm(stream);
    }
    for (const Operation& operation : reduce_schedule(shape_)) execute(operation, Position::only, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// The optimizer

void GpuParameters::update(cudaStream_t stream) {
    skip_ = &state_->skip_update;
    streams_.run(optimizer_schedule(shape_), stream, [&](const Operation& operation, cudaStream_t on) {
        const Mark phase(communicates(operation.task) ? "communication" : "optimizer");
        execute(operation, Position::only, on);
    });
    skip_ = nullptr;
}

// Of the slices; their gaps are zeros.
void GpuParameters::measure_blocks(cudaStream_t stream) const {
    for (size_t u = 0; u < places_.size(); ++u)
        if (places_[u].layer > 0) sum_of_squares(places_[u].reduced, places_[u].slice, slice_partials_ + u * size_t(global_norm_partials()), stream);
}

void GpuParameters::measure_norm(cudaStream_t stream) const {
    if (!shape_.sharded) return sum_of_squares(grads_, list_.flat_elements, norm_partials_, stream);
    for (const int layer : {0, kEmbedding})
        for (const int unit : units_of(layer)) {
            const Place& place = places_[size_t(unit)];
            sum_of_squares(place.reduced, place.slice, slice_partials_ + unit * global_norm_partials(), stream);
        }
    fold_partials(slice_partials_, int(places_.size()) * global_norm_partials(), folded_norm(), stream);
    sum_of_squares(rest_gradients(), rest_elements(), norm_partials_ + group().size() * kFoldedPartials, stream);
}

// Gathered, and added by every rank in the same order, so that replicas of a slice, whose groups might add in orders of their
// own, do not part by a last bit of the norm.
void GpuParameters::reduce_norm(cudaStream_t stream) const {
    const Mark mark("all_gather");
    group().all_gather(norm_partials_, kFoldedPartials * int64_t(sizeof(float)), stream);
}

// Slots differ in their amaxes alone, so all their words can take part; non-negative floats keep their order as bits.
void GpuParameters::reduce_amaxes(cudaStream_t stream) const {
    const Mark mark("all_reduce");
    group().all_reduce(slots_, slot_count_ * int64_t(sizeof(QuantSlot) / sizeof(uint32_t)), Element::u32, Reduction::max, stream);
}

void GpuParameters::prepare(cudaStream_t stream) const {
    optimizer_prepare({.state = state_, .norm_partials = norm_partials_, .n_partials = norm_partials(),
                       .tensors = shape_.sharded ? slot_tensors_ : adamw_tensors_, .n_tensors = shape_.sharded ? slot_count_ : adamw_others_.count,
                       .config = options_.adamw}, stream);
}

AdamWUpdate GpuParameters::adamw(const AdamWPart& part) const {
    return {.tensors = adamw_tensors_ + part.first, .n_tensors = part.count, .blocks = part.blocks, .params = params_, .grads = grads_,
            .m = m_, .v = v_, .state = state_, .config = options_.adamw};
}

// ---------------------------------------------------------------------------------------------------------------------
// State in and out

void GpuParameters::load(const TrainState& state, cudaStream_t stream) {
    const size_t n = size_t(held_.elements), bytes = n * sizeof(float);
    REQUIRE(state.params.size() == n, "load: %zu parameters, this rank holds %zu", state.params.size(), n);
    CUDA_CHECK(cudaMemcpyAsync(params_, state.params.data(), bytes, cudaMemcpyHostToDevice, stream));
    const auto upload_or_zero = [&](float* device, const std::vector<float>& host) {
        REQUIRE(host.empty() || host.size() == n, "load: %zu moments, this rank holds %zu", host.size(), n);
        if (host.empty()) CUDA_CHECK(cudaMemsetAsync(device, 0, bytes, stream));
        else CUDA_CHECK(cudaMemcpyAsync(device, host.data(), bytes, cudaMemcpyHostToDevice, stream));
    };
    upload_or_zero(m_, state.m);
    upload_or_zero(v_, state.v);
    if (slot_count_ > 0) CUDA_CHECK(cudaMemsetAsync(slots_, 0, size_t(slot_count_) * sizeof(QuantSlot), stream));
    for (const AdamWPart& part : {adamw_embedding_, adamw_others_}) adamw_refresh_copies(adamw(part), stream);
    streams_.run(refresh_schedule(shape_), stream, [&](const Operation& operation, cudaStream_t on) { execute(operation, Position::only, on); });
}

std::vector<HostCopier::Range> GpuParameters::copies_to(TrainState& state) const {
    const size_t n = size_t(held_.elements), bytes = n * sizeof(float);
    for (std::vector<float>* flat : {&state.params, &state.m, &state.v}) flat->resize(n);
    return {{state.params.data(), params_, bytes}, {state.m.data(), m_, bytes}, {state.v.data(), v_, bytes}};
}

// ---------------------------------------------------------------------------------------------------------------------
// For tests

// Of a step's micro-batches. Slices go to their places in the buffers that backward fills, which the next step fills anew.
std::vector<float> GpuParameters::all_gradients(cudaStream_t stream) {
    for (const Operation& operation : reduce_schedule(shape_)) execute(operation, Position::only, stream);
    std::vector<float> all(size_t(list_.flat_elements));
    const auto download = [&](int64_t offset, const float* device, int64_t n) {
        CUDA_CHECK(cudaMemcpyAsync(all.data() + offset, device, size_t(n) * sizeof(float), cudaMemcpyDeviceToHost, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
    };
    for (size_t u = 0; u < places_.size(); ++u) {
        const Place& place = places_[u];
        const int64_t bytes = place.slice * int64_t(sizeof(float));
        if (shape_.partial)
            CUDA_CHECK(cudaMemcpyAsync(place.gradients + place.slice * group().rank(), place.reduced, size_t(bytes), cudaMemcpyDeviceToDevice, stream));
        group().all_gather(place.gradients, bytes, stream);
        download(unit_at(int(u)).begin, place.gradients, place.elements);
    }
    download(list_.cleared_from, rest_gradients(), rest_elements());
    return all;
}

uint64_t GpuParameters::weights_digest(cudaStream_t stream) {
    uint64_t hash = 0xcbf29ce484222325u;
    std::vector<uint8_t> host;
    const auto add = [&](const void* device, size_t bytes) {
        if (device == nullptr) return;
        host.resize(bytes);
        CUDA_CHECK(cudaMemcpyAsync(host.data(), device, bytes, cudaMemcpyDeviceToHost, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        for (const uint8_t byte : host) hash = (hash ^ byte) * 0x100000001b3u;
    };
    const auto bring = [&](int unit) {
        if (unit < 0 || !shape_.sharded) return;
        gather(unit, stream);
        transpose(unit, stream);
    };
    for (size_t i = 0; i < list_.all.size(); ++i) {
        if (slot_index_[i] >= 0) continue;
        bring(unit_of_[i]);
        add(bf16(int(i)), size_t(list_.all[i].padded_count()) * sizeof(__nv_bfloat16));
    }
    for (size_t i = 0; i < list_.all.size(); ++i) {
        if (slot_index_[i] < 0) continue;
        bring(unit_of_[i]);
        const size_t count = size_t(list_.all[i].padded_count());
        add(slots_ + slot_index_[i], sizeof(QuantSlot));
        add(codes(int(i)), count);
        add(codes_transposed(int(i)), count);
    }
    return hash;
}
