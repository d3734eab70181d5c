// trainer/gpu_parameters in every mode on 1 to 4 ranks, on a stand-in for the GPU (tests/fake_gpu): its pointers, tables, slices
// and the order of its two streams, without a kernel of the product. Each rank also keeps an unsharded copy that adds the gradients
// of all ranks itself. Gradients are small whole numbers, so sums are exact in any order, in BF16 too: everything must agree bit
// for bit. Buffers of several ranks start as NaN, and the streams run in an order drawn at random.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <utility>

#include "ranks.h"
#include "tests/fake_gpu/streams.h"
#include "trainer/gpu_parameters.h"

namespace {

constexpr int kSteps = 6;

struct Setting {
    std::string recipe = "tensorwise";
    int layers = 5, ffn_dim = 208;  // 200 is no multiple of 16: those matrices are a unit of their own, in BF16
    int ranks = 2;
    Shard shard = Shard::full;
    int replicate = 1;
    Element element = Element::f32;
    bool copies = true;  // slices of gradients travel as they are; otherwise the collective adds

    std::string text() const {
        return message("%s, %d layers, ffn %d, %d ranks, mode %d, %d groups, %s, %s", recipe.c_str(), layers, ffn_dim, ranks, int(shard), replicate, element == Element::f32 ? "f32" : "bf16",
                       copies ? "copies" : "NCCL adds");
    }
};

// Host collectives on the stand-in's streams.
class StreamCommunicator final : public Communicator {
  public:
    StreamCommunicator(std::shared_ptr<Communicator> host, bool copies) : Communicator(host->rank(), host->size(), true), host_(std::move(host)), copies_(copies) {}
    bool copies() const override { return copies_; }

  private:
    void do_all_reduce(void* data, int64_t count, Element element, Reduction reduction, CUstream_st* stream) override {
        fake_gpu::enqueue(stream, [=, this] { host_->all_reduce(data, count, element, reduction); });
    }
    void do_reduce_scatter(void* data, int64_t count, Element element, CUstream_st* stream) override {
        fake_gpu::enqueue(stream, [=, this] {
            const size_t bytes = size_t(count * bytes_of(element)), mine = bytes * size_t(rank());
            std::vector<char> copy(static_cast<char*>(data), static_cast<char*>(data) + bytes * size_t(size()));
            host_->reduce_scatter(copy.data(), count, element);
            std::memcpy(static_cast<char*>(data) + mine, copy.data() + mine, bytes);
        });
    }
    void do_all_gather(void* data, int64_t bytes, CUstream_st* stream) override {
        fake_gpu::enqueue(stream, [=, this] { host_->all_gather(data, bytes); });
    }
    void do_all_to_all(const void* from, void* to, int64_t bytes, CUstream_st* stream) override {
        fake_gpu::enqueue(stream, [=, this] {
            const size_t all = size_t(bytes) * size_t(size());
            std::vector<char> of_all(all * size_t(size()));
            std::memcpy(of_all.data() + all * size_t(rank()), from, all);
            host_->all_gather(of_all.data(), int64_t(all));
            for (int r = 0; r < size(); ++r) std::memcpy(static_cast<char*>(to) + bytes * r, of_all.data() + all * size_t(r) + bytes * rank(), size_t(bytes));
        });
    }
    void do_broadcast(void* data, int64_t bytes, int root, CUstream_st* stream) override {
        fake_gpu::enqueue(stream, [=, this] { host_->broadcast(data, bytes, root); });
    }
    std::shared_ptr<Communicator> host_;
    const bool copies_;
};

// As the program makes them; with one rank all parts are a communicator that is not silent, so that its slices are the whole.
Parallel parallel_of(World& world, const Setting& s) {
    Parallel p = make_parallel(world, {.shard = s.shard, .replicate = s.replicate, .gradient_element = s.element});
    const auto on_stream = [&](std::shared_ptr<Communicator>& c, bool always) {
        if (always || !c->silent()) c = std::make_shared<StreamCommunicator>(c, s.copies);
    };
    on_stream(p.world, s.ranks == 1);
    on_stream(p.group, s.ranks == 1 && s.shard != Shard::none);
    on_stream(p.replicas, s.ranks == 1);
    return p;
}

EngineOptions options_of(const Setting& s) {
    return {.model = {.name = "check", .n_layers = s.layers, .dim = 48, .n_heads = 3, .ffn_dim = s.ffn_dim, .vocab_size = 130, .seq_len = 16},
            .recipe = find_recipe(s.recipe), .micro_batch = 2, .seq_len = 16, .micro_batches_per_step = 1,
            .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-3f, .weight_decay = 0.1f, .max_grad_norm = 0}};
}

// Parameters with what an engine and a model do to them.
class Side {
  public:
    Side(const EngineOptions& options, cudaStream_t stream)
        : options_(options), list_(make_parameters(options.model, options.parallel.group->size())), parameters_(options_, list_), stream_(stream) {
        arena_.request(state_, 1, "state");
        parameters_.request(arena_, communicating_);
        arena_.allocate();
        communicating_.allocate();
        parameters_.bind(state_);
    }
    GpuParameters& parameters() { return parameters_; }
    const ParameterList& list() const { return list_; }
    const StepState& state() const { return *state_; }

    void load(const TrainState& state) {
        parameters_.connect(stream_);
        fake_gpu::run_all();
        *state_ = StepState{};
        parameters_.load(state, stream_);
        fake_gpu::run_all();
    }
    struct Step {
        int number;
        float loss_limit;
        bool nonfinite = false;  // a micro-batch has met a value that is not
        int infinite = -1;       // the micro-batch of all ranks' with a gradient that is not
    };
    // Enqueues them. `expected`: a side whose weights these must be wherever they are used.
    void micro_batches(const Step& step, int first, int count, Side* expected) {
        fake_gpu::enqueue(stream_, [this, loss_limit = step.loss_limit, nonfinite = step.nonfinite] {
            StepState fresh{};
            fresh.loss_sum = 0.5f;
            fresh.nonfinite = nonfinite;
            fresh.in.loss_limit = loss_limit;
            std::memcpy(static_cast<void*>(state_), static_cast<const void*>(&fresh), offsetof(StepState, adam_t));
        });
        for (int i = 0; i < count; ++i) {
            const Position position = position_of(i, count);
            if (starts_gradients(position)) parameters_.clear_added_gradients(stream_);
            run(micro_batch_schedule(parameters_.shape(), position), {position, step.number, first + i, step.infinite == first + i, expected});
        }
    }
    void update() {
        parameters_.update(stream_);
        fake_gpu::run_all();
    }
    void forward(Side* expected) {
        run(forward_schedule(parameters_.shape()), {Position::only, 0, 0, false, expected});
        fake_gpu::run_all();
    }
    uint64_t digest() { return parameters_.weights_digest(stream_); }
    // Without gaps, which depend on the number of ranks.
    std::vector<float> gradients() {
        const std::vector<float> flat = parameters_.all_gradients(stream_);
        std::vector<float> all;
        for (const Parameter& p : list_.all) all.insert(all.end(), flat.begin() + p.offset, flat.begin() + p.offset + p.padded_count());
        return all;
    }
    TrainState saved() const {
        TrainState state;
        for (const HostCopier::Range& range : parameters_.copies_to(state)) std::memcpy(range.to, range.from, range.bytes);
        return state;
    }

  private:
    struct Pass {
        Position position;
        int step, micro_batch;
        bool infinite;
        Side* expected;
    };

    void run(const Schedule& schedule, const Pass& pass) {
        parameters_.streams().run(schedule, stream_, [&](const Operation& operation, cudaStream_t stream) { enqueue(operation, pass, stream); });
    }
    void enqueue(const Operation& operation, const Pass& pass, cudaStream_t stream) {
        const int l = operation.layer;
        switch (operation.task) {
            case Task::embed: return expect_equal({list_.wte, list_.wpe}, false, pass.expected, stream);
            case Task::forward: return expect_equal(of_layer(l), false, pass.expected, stream);
            case Task::head:
                expect_equal({list_.wte}, false, pass.expected, stream);
                return add_gradients({list_.wte, list_.lnf_weight, list_.lnf_bias}, 0, pass, stream);
            case Task::backward:
                expect_equal(of_layer(l), true, pass.expected, stream);
                return add_gradients(of_layer(l), 0, pass, stream);
            case Task::embed_backward: return add_gradients({list_.wte, list_.wpe}, 1, pass, stream);
            default: parameters_.execute(operation, pass.position, stream);
        }
    }
    std::vector<int> of_layer(int layer) const {
        const BlockParameters& b = list_.blocks[size_t(layer)];
        return {b.ln1_weight, b.ln1_bias, b.qkv_weight, b.qkv_bias, b.proj_weight, b.proj_bias, b.ln2_weight, b.ln2_bias, b.fc1_weight, b.fc1_bias, b.fc2_weight, b.fc2_bias};
    }

    // When the stream comes to it, as a GEMM would read it then.
    void expect_equal(const std::vector<int>& parameters, bool transposed, Side* expected, cudaStream_t stream) {
        if (expected == nullptr) return;
        fake_gpu::enqueue(stream, [=, this] {
            for (const int i : parameters) {
                const GpuParameters &mine = parameters_, &its = expected->parameters_;
                const size_t n = size_t(list_[i].padded_count());
                same(i, "codes", mine.codes(i), its.codes(i), n);
                same(i, "scale", mine.slot(i), its.slot(i), sizeof(QuantSlot));
                same(i, "BF16", mine.bf16(i), its.bf16(i), 2 * n);
                if (transposed) same(i, "transposed codes", mine.codes_transposed(i), its.codes_transposed(i), n);
                if (list_[i].name.find("ln_") != std::string::npos) same(i, "master", mine.master(i), its.master(i), 4 * n);
            }
        });
    }
    void same(int parameter, const char* what, const void* mine, const void* its, size_t bytes) const {
        REQUIRE((mine == nullptr) == (its == nullptr), "%s: one side has no %s", list_[parameter].name.c_str(), what);
        REQUIRE(mine == nullptr || std::memcmp(mine, its, bytes) == 0, "%s: another %s than one rank's", list_[parameter].name.c_str(), what);
    }

    // Matrices are written by the first who touches them, if their gradients start anew; everything else is added to.
    void add_gradients(const std::vector<int>& parameters, int turn, const Pass& pass, cudaStream_t stream) {
        fake_gpu::enqueue(stream, [=, this] {
            for (const int i : parameters) {
                const bool writes = turn == 0 && list_[i].gemm_gradient && starts_gradients(parameters_.unit_position(pass.position));
                float* gradient = parameters_.gradient(i);
                for (int64_t k = 0; k < list_[i].padded_count(); ++k) {
                    uint32_t hash = uint32_t(((pass.step * 31 + pass.micro_batch) * 31 + i) * 2 + turn) * 2654435761u ^ uint32_t(k) * 2246822519u;
                    hash = (hash ^ hash >> 15) * 3266489917u;
                    const float x = float(int(hash >> 16) % 5 - 2);
                    gradient[k] = writes ? x : gradient[k] + x;
                }
                if (pass.infinite && i == list_.blocks[0].fc1_weight) gradient[list_[i].count() / 2] = INFINITY;  // in one rank's slice
            }
        });
    }

    const EngineOptions options_;
    const ParameterList list_;
    Arena arena_, communicating_;
    GpuParameters parameters_;
    const cudaStream_t stream_;
    StepState* state_ = nullptr;
};

void expect_same_state(Side& side, Side& one, const Held& held) {
    const TrainState mine = side.saved(), its = one.saved();
    for (const HeldPiece& piece : held.pieces)
        for (const auto& [a, b] : {std::pair{&mine.params, &its.params}, {&mine.m, &its.m}, {&mine.v, &its.v}})
            REQUIRE(std::memcmp(a->data() + piece.offset, b->data() + one.list()[piece.parameter].offset + piece.first, size_t(piece.count) * sizeof(float)) == 0,
                    "%s: other masters or moments than one rank's", one.list()[piece.parameter].name.c_str());
}

bool unchanged(const TrainState& a, const TrainState& b) {
    const auto same = [](const auto& x, const auto& y) { return std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0; };
    return same(a.params, b.params) && same(a.m, b.m) && same(a.v, b.v);
}

// The norm over all ranks' slices; what is infinite on one is so on all.
void expect_same_norm(float mine, float its) {
    const bool good = std::isfinite(its) ? std::fabs(double(mine) / double(its) - 1) < 1e-6 : !std::isfinite(mine);
    REQUIRE(good, "gradient norm %g, one rank's %g", double(mine), double(its));
}

// Three micro-batches a rank and step, or one. The third step is skipped for its loss, the fourth for what the last rank alone has met,
// the fifth for a gradient of that rank's.
void train(World& world, const Setting& s) {
    fake_gpu::seed(uint32_t(world.rank() * 100 + int(s.shard)));
    EngineOptions options = options_of(s);
    Side one(options, reinterpret_cast<cudaStream_t>(uintptr_t(1) << 20));
    options.parallel = parallel_of(world, s);
    options.poison = true;
    Side side(options, nullptr);
    const Communicator& group = *options.parallel.group;
    const Held held = held_by(side.list(), group.rank(), group.size());
    one.load(initial_state(one.list(), options.model, 3));
    side.load(initial_state(side.list(), options.model, 3, held));
    REQUIRE(side.digest() == one.digest(), "other weights than one rank's after loading");
    for (int step = 0; step < kSteps; ++step) {
        const int own = step % 2 ? 1 : 3;
        const bool outlier = step == 2, nonfinite = step == 3, infinite = step == 4, last = world.rank() == world.size() - 1;
        const bool skipped = outlier || nonfinite || infinite;
        const Side::Step in{.number = step, .loss_limit = outlier ? 0 : INFINITY, .nonfinite = nonfinite, .infinite = infinite ? (world.size() - 1) * own : -1};
        const Side::Step of_rank{.number = step, .loss_limit = in.loss_limit, .nonfinite = nonfinite && last, .infinite = in.infinite};
        const TrainState before = side.saved();
        const int64_t skipped_before = side.state().skipped_steps;
        if (step == 0) {
            side.micro_batches(of_rank, world.rank() * own, own, &one);
            one.micro_batches(in, 0, own * world.size(), nullptr);
            REQUIRE(side.gradients() == one.gradients(), "other gradients than one rank's");
        }
        side.micro_batches(of_rank, world.rank() * own, own, &one);
        side.update();
        one.micro_batches(in, 0, own * world.size(), nullptr);
        one.update();
        expect_same_norm(side.state().grad_norm, one.state().grad_norm);
        REQUIRE(std::fabs(side.state().loss_sum - 0.5f * float(world.size())) < 1e-6f, "the sum of the ranks' losses is %g", double(side.state().loss_sum));
        REQUIRE((side.state().skip_update != 0) == skipped && side.state().adam_t == one.state().adam_t, "step %d: skipped %u", step, side.state().skip_update);
        REQUIRE(side.state().skipped_steps == skipped_before + skipped && (side.state().nonfinite != 0) == (nonfinite || infinite),
                "step %d: %lld skipped steps, nonfinite %u", step, (long long)side.state().skipped_steps, side.state().nonfinite);
        REQUIRE(unchanged(side.saved(), before) == skipped, "step %d: masters or moments %s", step, skipped ? "changed" : "stayed");
        expect_same_state(side, one, held);
        side.forward(&one);  // an evaluation
        REQUIRE(side.digest() == one.digest(), "step %d: other weights than one rank's", step);
    }
}

void expect_good(const Setting& s) {
    const Outcome outcome = run_ranks({.size = s.ranks, .timeout_s = 60}, [&](World& world) { train(world, s); });
    EXPECT_TRUE(outcome.all(0)) << s.text() << ": " << outcome.errors;
}

constexpr Shard kModes[] = {Shard::none, Shard::optimizer, Shard::gradients, Shard::full};

TEST(GpuParameters, EveryModeAndNumberOfRanks) {
    for (const char* recipe : {"bf16", "tensorwise"})
        for (const int ranks : {1, 2, 3, 4})
            for (const Shard shard : kModes)
                for (const bool copies : {false, true})
                    if (!copies || (ranks > 1 && shard != Shard::none)) expect_good({.recipe = recipe, .ranks = ranks, .shard = shard, .copies = copies});
}

TEST(GpuParameters, Bf16Gradients) {
    for (const Shard shard : kModes)
        for (const int ranks : {1, 3}) expect_good({.ranks = ranks, .shard = shard, .element = Element::bf16, .copies = ranks == 3});
    expect_good({.ranks = 3, .shard = Shard::full, .element = Element::bf16, .copies = false});
}

TEST(GpuParameters, Replicas) {
    for (const Shard shard : {Shard::optimizer, Shard::gradients, Shard::full})
        for (const Element element : {Element::f32, Element::bf16}) {
            expect_good({.ranks = 4, .shard = shard, .replicate = 2, .element = element});
            expect_good({.ranks = 2, .shard = shard, .replicate = 2, .element = element});
        }
}

// As between machines. Also few layers, matrices of their own unit, and replicas: what is sent then stays until it is added.
TEST(GpuParameters, GroupsWhoseCollectiveAdds) {
    for (const Shard shard : {Shard::optimizer, Shard::gradients, Shard::full})
        for (const Element element : {Element::f32, Element::bf16}) {
            expect_good({.ranks = 3, .shard = shard, .element = element, .copies = false});
            expect_good({.ranks = 4, .shard = shard, .replicate = 2, .element = element, .copies = false});
            expect_good({.layers = 1, .ffn_dim = 200, .ranks = 2, .shard = shard, .element = element, .copies = false});
            expect_good({.layers = 2, .ffn_dim = 200, .ranks = 4, .shard = shard, .replicate = 2, .element = element, .copies = false});
            expect_good({.layers = 1, .ranks = 4, .shard = shard, .replicate = 2, .element = element, .copies = true});
        }
}

// One and two layers have fewer blocks than a pass has turns; matrices that FP8 refuses are a unit of their own.
TEST(GpuParameters, FewLayersAndMixedBlocks) {
    for (const Shard shard : kModes)
        for (const int layers : {1, 2, 3}) expect_good({.layers = layers, .ffn_dim = 200, .ranks = 2, .shard = shard});
}

// The stand-in can tell: work that waits for nothing runs before, after and between other work.
TEST(FakeGpu, StreamsRunInAnyOrderThatEventsAllow) {
    cudaStream_t a, b;
    cudaEvent_t event;
    cudaStreamCreateWithPriority(&a, 0, 0), cudaStreamCreateWithPriority(&b, 0, 0);
    cudaEventCreateWithFlags(&event, 0);
    std::set<std::string> free_orders, bound_orders;
    for (uint32_t seed = 0; seed < 200; ++seed) {
        fake_gpu::seed(seed);
        std::string order;
        for (int i = 0; i < 3; ++i) {
            fake_gpu::enqueue(a, [&] { order += 'a'; });
            fake_gpu::enqueue(b, [&] { order += 'b'; });
        }
        fake_gpu::run_all();
        free_orders.insert(std::exchange(order, ""));
        fake_gpu::enqueue(a, [&] { order += 'a'; });
        cudaEventRecord(event, a);
        fake_gpu::enqueue(a, [&] { order += 'A'; });
        cudaStreamWaitEvent(b, event, 0);
        fake_gpu::enqueue(b, [&] { order += 'b'; });
        fake_gpu::run_all();
        bound_orders.insert(order);
    }
    EXPECT_GE(free_orders.size(), 8u);
    EXPECT_EQ(bound_orders, (std::set<std::string>{"abA", "aAb"}));
    cudaStreamDestroy(a), cudaStreamDestroy(b);
    cudaEventDestroy(event);
}

}  // namespace
