#include "trainer/sharding_schedule.h"

#include <algorithm>

namespace {

class Builder {
  public:
    explicit Builder(const ShardingShape& shape)
        : shape_(shape), gathered_(size_t(shape.layers), kNothing), reduced_(size_t(shape.layers), kNothing) {}

    // `continues`: a micro-batch of the same step came before.
    void forward(bool continues) {
        const int buffers = shape_.buffers();
        if (shape_.sharded && !continues)
            for (int layer = 0; layer < (shape_.gathers ? buffers : shape_.layers); ++layer) gather(layer, kNothing);
        if (shape_.partial && continues) reduce_last();
        add(Task::embed, kEmbedding);
        for (int layer = 0; layer < shape_.layers; ++layer) {
            const int used = add(Task::forward, layer, gathered_[size_t(layer)]);
            if (shape_.gathers && layer + buffers < shape_.layers) gather(layer + buffers, used);
        }
        if (shape_.partial && continues) settle_last(false);
    }

    // The blocks gathered last are still there: what has gathered them was waited for in the forward pass.
    void backward(Position position) {
        const int buffers = shape_.buffers();
        const bool completes = completes_gradients(position), replicates = shape_.replicates && completes;
        const bool transposes = shape_.transposes && (shape_.gathers || (shape_.sharded && starts_gradients(position)));
        std::fill(gathered_.begin(), gathered_.end(), kNothing);
        add(Task::head, kEmbedding);
        for (int layer = shape_.layers - 1; layer >= 0; --layer) {
            const int gathered = gathered_[size_t(layer)];
            if (transposes) add(Task::transpose, layer, gathered);
            if (shape_.partial) settle(layer + buffers, replicates);
            const int used = add(Task::backward, layer, gathered);
            const int free = shape_.partial ? kNothing : settle(layer + buffers, replicates);
            if (shape_.gathers && layer - buffers >= 0) gather(layer - buffers, used);
            if (layer > 0 && shape_.sharded && (shape_.partial || completes)) reduced_[size_t(layer)] = add(Task::reduce, layer, std::max(used, free));
            if (!shape_.sharded && replicates) add(Task::replicate, layer, used);
        }
        add(Task::embed_backward, kEmbedding);
        for (int layer = buffers - 1; layer > 0; --layer) settle(layer, replicates);
    }

    void complete_gradients(bool measures) {
        if (shape_.sharded) reduce_last();
        if (shape_.reduces_rest) add(Task::reduce_rest, kEmbedding);
        if (measures && shape_.sharded && shape_.layers > 1) add(Task::measure_blocks, kEmbedding);
        settle_last(shape_.replicates);
    }

    void update() {
        const int measured = add(Task::measure_norm, kEmbedding, last_communication_);
        add(Task::prepare, kEmbedding, shape_.sharded ? add(Task::reduce_norm, kEmbedding, measured) : kNothing);
        if (shape_.sharded) embedding_updated_ = add(Task::update_embedding, kEmbedding);
        updated_ = add(Task::update, kEmbedding);
    }

    void refresh() {
        if (shape_.sharded) add(Task::gather, kEmbedding, embedding_updated_);
        add(Task::cast, kEmbedding, shape_.sharded ? add(Task::reduce_amaxes, kEmbedding, updated_) : kNothing);
    }

    Schedule take() { return std::move(schedule_); }

  private:
    static constexpr int kCompletedLast[] = {0, kEmbedding};

    // A stream that has waited for an operation has waited for those before it on the other stream.
    int add(Task task, int layer, int after = kNothing) {
        int& waited = waited_[communicates(task)];
        const int index = int(schedule_.size());
        schedule_.push_back({.task = task, .layer = layer, .after = after > waited ? after : kNothing});
        waited = std::max(waited, after);
        if (communicates(task)) last_communication_ = index;
        return index;
    }
    void gather(int layer, int after) { gathered_[size_t(layer)] = add(Task::gather, layer, after); }

    // After a block's reduction, if there was one. Returns the sum.
    int settle(int layer, bool replicates) {
        if (layer >= shape_.layers || reduced_[size_t(layer)] == kNothing) return kNothing;
        const int summed = shape_.sums ? add(Task::sum, layer, reduced_[size_t(layer)]) : kNothing;
        if (replicates) add(Task::replicate, layer, summed);
        return summed;
    }

    void reduce_last() {
        for (size_t i = 0; i < 2; ++i) last_reduced_[i] = add(Task::reduce, kCompletedLast[i]);
    }
    void settle_last(bool replicates) {
        for (size_t i = 0; i < 2; ++i) {
            const int summed = shape_.sums ? add(Task::sum, kCompletedLast[i], last_reduced_[i]) : kNothing;
            const bool is_left = shape_.sharded || kCompletedLast[i] == kEmbedding;
            if (replicates && is_left) add(Task::replicate, kCompletedLast[i], summed);
        }
    }

    const ShardingShape shape_;
    Schedule schedule_;
    int waited_[2] = {kNothing, kNothing};  // by stream
    int last_communication_ = kNothing, embedding_updated_ = kNothing, updated_ = kNothing;
    int last_reduced_[2] = {kNothing, kNothing};
    std::vector<int> gathered_, reduced_;  // by layer, the operation that did it
};

}  // namespace

ShardingShape sharding_shape(const Parallel& parallel, int layers, bool transposes) {
    const bool sharded = parallel.shard != Shard::none && !parallel.group->silent();
    return {.layers = layers, .sharded = sharded, .gathers = sharded && parallel.gathers_every_use(),
            .partial = sharded && parallel.reduces_every_micro_batch(),
            .sums = sharded && (parallel.group->copies() || parallel.reduces_every_micro_batch() || parallel.gradient_element != Element::f32),
            .replicates = !parallel.replicas->silent(), .reduces_rest = !parallel.world->silent(), .transposes = transposes};
}

Schedule forward_schedule(const ShardingShape& shape) {
    Builder builder(shape);
    builder.forward(false);
    return builder.take();
}

Schedule micro_batch_schedule(const ShardingShape& shape, Position position) {
    Builder builder(shape);
    builder.forward(!starts_gradients(position));
    builder.backward(position);
    return builder.take();
}

Schedule refresh_schedule(const ShardingShape& shape) {
    Builder builder(shape);
    builder.refresh();
    return builder.take();
}

Schedule reduce_schedule(const ShardingShape& shape) {
    Builder builder(shape);
    builder.complete_gradients(false);
    return builder.take();
}

Schedule optimizer_schedule(const ShardingShape& shape) {
    Builder builder(shape);
    builder.complete_gradients(true);
    builder.update();
    builder.refresh();
    return builder.take();
}
