// The order of a step's work on two streams: when each kind of sharding gathers weights, uses them, reduces gradients, and
// what waits for what. No CUDA and no memory: trainer/two_streams runs a schedule, tests/host/test_sharding_schedule proves it.
//
// The compute stream and the communication stream are each in order; an operation may also wait for one of the other stream
// and with it for all that come before that one. Both streams start together and have ended when the schedule has. A schedule depends on nothing that
// differs between ranks, so all of them enqueue their collectives in one order.
//
// Weights that stay are gathered with the first micro-batch after an update, all one behind the other, so that they travel beside
// the forward pass; its backward pass transposes them. Every pass of an evaluation gathers them as well. The embedding's, which
// nothing could be beside there, follow its update and travel beside that of the others.
//
// With full sharding block l's weights are in buffer l % buffers while it is used, in forward and in backward. So the last
// blocks of the forward pass need not be gathered again, nor need the first ones, and the embedding, in the next micro-batch of
// a step. As soon as a buffer is free the next block's gather follows: ahead of the compute of the block before it. Gradients
// that are reduced every micro-batch take turns in the same way, and so does what arrives of them. What other ranks
// send is added by a kernel of the compute stream, two blocks later (one, where the buffer of the gradients is written again): there
// it has memory and multiprocessors to itself and hardly ever waits for other ranks. The communication stream has collectives, and
// beside them only what gradients in BF16 need (rounding, sums of replicas) and with full sharding the copy of a rank's own slice.
//
// What backward completes last, the gradients of the first block and of the embedding, is reduced beside what comes next: the
// next micro-batch's forward pass, or in the optimizer the norm of the other gradients. So are the replicated parameters'. Ranks that
// hold everything (none) have the norm of all behind their last reduction: the first block's runs beside the embedding's backward.
#pragma once
#include <cstdint>
#include <vector>

#include "trainer/parallel.h"
#include "trainer/position.h"

enum class Task : uint8_t {
    // The model, on the compute stream. `head`: from the final norm to the gradient of the last block's output.
    embed, forward, head, backward, embed_backward,
    // The parameters, on the compute stream.
    transpose,         // a block's FP8 weights, as its backward pass needs them
    sum,               // gradients of a block or of the embedding, from what ranks of the group sent
    measure_blocks,    // norm of the gradients of all blocks but the first, as held here
    measure_norm,      // of the others, or of all where ranks hold them whole
    prepare,           // the whole norm, how to clip, whether to skip
    update_embedding,  // AdamW; BF16 weights and amaxes follow
    update,            // of the others, or of all where nothing is gathered
    cast,              // FP8 weights
    // Collectives
    gather,       // weights of a block or of the embedding
    reduce,       // gradients of a block or of the embedding over the group, all but the sum
    replicate,    // the same over replicas
    reduce_rest,  // what is replicated: its gradients, the loss, the flag
    reduce_norm, reduce_amaxes,
};
constexpr bool communicates(Task task) { return task >= Task::gather; }

constexpr int kEmbedding = -1;  // in place of a layer
constexpr int kNothing = -1;    // in place of an operation to wait for
struct Operation {
    Task task;
    int layer = kEmbedding;
    int after = kNothing;  // an earlier operation of the schedule, of the other stream
};
using Schedule = std::vector<Operation>;

struct ShardingShape {
    int layers;
    bool sharded = false;          // masters, moments and the optimizer's gradients are slices
    bool gathers = false;          // weights are gathered whenever they are used; otherwise they stay
    bool partial = false;          // gradients are reduced every micro-batch
    bool sums = false;             // a group's collective leaves sums to do
    bool replicates = false;
    bool reduces_rest = false;
    bool transposes = false;       // weights are multiplied in FP8

    int buffers() const { return layers < 2 ? layers : 2; }  // of blocks' weights, and as many of their gradients and of what arrives
    int buffer_of(int layer) const { return layer % buffers(); }
};
ShardingShape sharding_shape(const Parallel& parallel, int layers, bool transposes);

Schedule forward_schedule(const ShardingShape& shape);
Schedule micro_batch_schedule(const ShardingShape& shape, Position position);
// This rank's part of the weights as multiplied, from new masters.
Schedule refresh_schedule(const ShardingShape& shape);
// What is left of a step's gradients to reduce, in the optimizer's beside the norm.
Schedule reduce_schedule(const ShardingShape& shape);
Schedule optimizer_schedule(const ShardingShape& shape);
