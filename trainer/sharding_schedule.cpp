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
        if (shape_.partial && continues)
            for (const int layer : kCompletedLast) earlier_reduced_ = add(Task::reduce_earlier, layer);
        add(Task::embed, kEmbedding);
        for (int layer = 0; layer < shape_.layers; ++layer) {
            const int used = add(Task::forward, layer, gathered_[size_t(layer)]);
            if (shape_.gathers && layer + buffers < shape_.layers) gather(layer + buffers, used);
        }
    }

    // The blocks gathered last are still there: what has gathered them was waited for in the forward pass.
    void backward(Position position) {
        const int buffers = shape_.buffers();
        const bool completes = completes_gradients(position), reduces = shape_.partial || (shape_.reduces_units && completes);
        const bool transposes = shape_.transposes && (shape_.gathers || (shape_.sharded && starts_gradients(position)));
        std::fill(gathered_.begin(), gathered_.end(), kNothing);
        add(Task::head, kEmbedding, earlier_reduced_);
        for (int layer = shape_.layers - 1; layer >= 0; --layer) {
            const int gathered = gathered_[size_t(layer)];
            if (transposes) add(Task::transpose, layer, gathered);
            const int buffer_free = shape_.partial && layer + buffers < shape_.layers ? reduced_[size_t(layer + buffers)] : kNothing;
            const int used = add(Task::backward, layer, std::max(gathered, buffer_free));
            if (shape_.gathers && layer - buffers >= 0) gather(layer - buffers, used);
            if (reduces && layer > 0) reduced_[size_t(layer)] = add(Task::reduce, layer, used);
        }
        add(Task::embed_backward, kEmbedding);
    }

    void reduce_last() {
        if (shape_.reduces_units)
            for (const int layer : kCompletedLast) all_reduced_ = add(Task::reduce_last, layer);
        if (shape_.reduces_rest) all_reduced_ = add(Task::reduce_rest, kEmbedding);
    }

    void update() {
        if (shape_.sharded && shape_.layers > 1) add(Task::measure_blocks, kEmbedding);
        const int measured = add(Task::measure_norm, kEmbedding, all_reduced_);
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
        schedule_.push_back({.task = task, .layer = layer, .after = after > waited ? after : kNothing});
        waited = std::max(waited, after);
        return int(schedule_.size()) - 1;
    }
    void gather(int layer, int after) { gathered_[size_t(layer)] = add(Task::gather, layer, after); }

    const ShardingShape shape_;
    Schedule schedule_;
    int waited_[2] = {kNothing, kNothing};  // by stream
    int earlier_reduced_ = kNothing, all_reduced_ = kNothing, embedding_updated_ = kNothing, updated_ = kNothing;
    std::vector<int> gathered_, reduced_;  // by layer, the operation that did it
};

}  // namespace

ShardingShape sharding_shape(const Parallel& parallel, int layers, bool transposes) {
    const bool sharded = parallel.shard != Shard::none && !parallel.group->silent();
    return {.layers = layers, .sharded = sharded, .gathers = sharded && parallel.gathers_every_use(),
            .partial = sharded && parallel.reduces_every_micro_batch(), .reduces_units = sharded || !parallel.replicas->silent(),
            .reduces_rest = !parallel.world->silent(), .transposes = transposes};
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
    builder.reduce_last();
    return builder.take();
}

Schedule optimizer_schedule(const ShardingShape& shape) {
    Builder builder(shape);
    builder.reduce_last();
    builder.update();
    builder.refresh();
    return builder.take();
}
