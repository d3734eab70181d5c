// NCCL's collectives behind trainer/distributed/communicator.h: right, capturable, forked onto a second stream, and how fast.
//
//   collectives check                        one GPU: NCCL's own path for one rank, in graphs
//   mpirun -np N collectives check           N GPUs; every rank prints, and all must pass
//   mpirun -np N collectives bench           time by size and by what carries it, and what that takes from GEMMs; rank 0 prints
#include <cstdio>
#include <memory>

#include "dev/harness.h"
#include "dev/parts/collectives/bandwidth.h"
#include "dev/parts/collectives/streams.h"
#include "dev/ranks.h"
#include "trainer/cuda_graph.h"
#include "trainer/distributed/nccl_communicator.h"
#include "trainer/engine.h"

namespace {

std::unique_ptr<Communicator> make(int most_ctas) {
    take_a_gpu();
    return nccl_split(world(), 0, {.most_ctas = most_ctas}, true);
}

// Small whole numbers: their sums are exact in float and in BF16 (below 256), in any order.
float value_of(int rank, size_t i) { return float((rank * 3 + int(i % 7)) % 11); }

struct Case {
    std::string name;
    size_t elements;  // of a slice
};

struct Compared {
    size_t first, count;  // what the collective defines
};

// `run` enqueues one collective on what this rank has filled; what is `expected` must come, eagerly and from a graph that forks to
// the communication stream inside of its capture, launched three times.
template <typename T>
void check_both(Report& report, const Case& c, const std::vector<T>& filled, const std::vector<T>& expected, Compared where, const std::function<void(void*, cudaStream_t)>& run) {
    const Streams streams;
    const DeviceBuffer<T> source(filled), data(filled.size());
    const std::string shape = message("%zu x %d ranks", c.elements, world().size());
    const auto work = [&] {
        CUDA_CHECK(cudaMemcpyAsync(data.get(), source.get(), filled.size() * sizeof(T), cudaMemcpyDeviceToDevice, streams.compute));
        streams.fork();
        run(data.get(), streams.communication);
        streams.join();
    };
    const auto part = [&](const std::vector<T>& all) { return std::vector<T>(all.begin() + ptrdiff_t(where.first), all.begin() + ptrdiff_t(where.first + where.count)); };
    CudaGraph graph;
    for (int turn = 0; turn < 4; ++turn) {
        graph.run(turn > 0, streams.compute, work);
        CUDA_CHECK(cudaStreamSynchronize(streams.compute));
        report.compare_bits(c.name + (turn == 0 ? " eager" : message(" graph %d", turn)), shape, part(data.download()), part(expected));
    }
    report.expect(c.name + " guards", shape, data.guards_intact(), "intact");
}

void check_size(Report& report, Communicator& ranks, size_t n) {
    const int rank = ranks.rank(), size = ranks.size();
    const size_t slices = n * size_t(size), mine = n * size_t(rank);
    std::vector<float> values(n), sums(n), wide(slices), wide_sums(slices);
    for (size_t i = 0; i < n; ++i) {
        values[i] = value_of(rank, i);
        for (int r = 0; r < size; ++r) sums[i] += value_of(r, i);
    }
    for (size_t i = 0; i < slices; ++i) {
        wide[i] = value_of(rank, i);
        for (int r = 0; r < size; ++r) wide_sums[i] += value_of(r, i);
    }
    check_both<float>(report, {"all_reduce f32", n}, values, sums, {0, n}, [&](void* x, cudaStream_t s) { ranks.all_reduce(x, int64_t(n), Element::f32, Reduction::sum, s); });
    check_both<__nv_bfloat16>(report, {"all_reduce bf16", n}, to_bf16(values), to_bf16(sums), {0, n},
                              [&](void* x, cudaStream_t s) { ranks.all_reduce(x, int64_t(n), Element::bf16, Reduction::sum, s); });
    check_both<float>(report, {"reduce_scatter f32", n}, wide, wide_sums, {mine, n}, [&](void* x, cudaStream_t s) { ranks.reduce_scatter(x, int64_t(n), Element::f32, s); });
    check_both<__nv_bfloat16>(report, {"reduce_scatter bf16", n}, to_bf16(wide), to_bf16(wide_sums), {mine, n},
                              [&](void* x, cudaStream_t s) { ranks.reduce_scatter(x, int64_t(n), Element::bf16, s); });

    // Bytes that tell sender, receiver and place; behind what is sent, in the same buffer, what arrives.
    std::vector<uint8_t> sent(2 * slices, 0xee);
    for (size_t i = 0; i < slices; ++i) sent[i] = uint8_t(size_t(rank) * 101 + i / n * 17 + i % n * 31);
    std::vector<uint8_t> arrived = sent;
    for (size_t i = 0; i < slices; ++i) arrived[slices + i] = uint8_t(i / n * 101 + size_t(rank) * 17 + i % n * 31);
    check_both<uint8_t>(report, {"all_to_all bytes", n}, sent, arrived, {0, 2 * slices},
                        [&](void* x, cudaStream_t s) { ranks.all_to_all(x, static_cast<uint8_t*>(x) + slices, int64_t(n), s); });

    std::vector<uint32_t> bits(n), most(n);
    std::vector<uint8_t> codes(slices), all(slices);
    for (size_t i = 0; i < n; ++i) bits[i] = uint32_t(i * 77 + size_t(rank) * 13), most[i] = uint32_t(i * 77 + size_t(size - 1) * 13);
    for (size_t i = 0; i < slices; ++i) {
        all[i] = uint8_t(i * 31 + i / n);
        codes[i] = i / n == size_t(rank) ? all[i] : 0xee;
    }
    check_both<uint32_t>(report, {"all_reduce max u32", n}, bits, most, {0, n}, [&](void* x, cudaStream_t s) { ranks.all_reduce(x, int64_t(n), Element::u32, Reduction::max, s); });
    check_both<uint8_t>(report, {"all_gather bytes", n}, codes, all, {0, slices}, [&](void* x, cudaStream_t s) { ranks.all_gather(x, int64_t(n), s); });
    std::vector<uint8_t> last(n, uint8_t(rank == size - 1 ? 0x5a : 0)), everywhere(n, 0x5a);
    check_both<uint8_t>(report, {"broadcast", n}, last, everywhere, {0, n}, [&](void* x, cudaStream_t s) { ranks.broadcast(x, int64_t(n), size - 1, s); });
}

// An engine's step with NCCL in its optimizer graph, against the same engine without ranks: on one GPU the same bits.
void check_engine(Report& report, std::shared_ptr<Communicator> ranks, bool use_graphs) {
    EngineOptions o{.model = find_model("mini"), .recipe = find_recipe("tensorwise"), .micro_batch = 4, .seq_len = 256, .micro_batches_per_step = 3,
                    .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .max_grad_norm = 1.0f},
                    .use_graphs = use_graphs, .deterministic = true};
    const size_t tokens = size_t(o.micro_batch) * size_t(o.seq_len) * size_t(o.micro_batches_per_step);
    const TrainState state = initial_state(make_parameters(o.model), o.model, 5);
    const auto train = [&](std::vector<float>& losses) {
        const std::unique_ptr<Engine> engine = make_gpu_engine(o);
        engine->load(state);
        for (int step = 0; step < 4; ++step) {
            std::vector<int> inputs(tokens), targets(tokens);
            for (size_t i = 0; i < tokens; ++i) inputs[i] = int((i * 2654435761u + size_t(step)) % 50257), targets[i] = (inputs[i] * 7 + 1) % 50257;
            engine->enqueue_step({.step = step, .learning_rate = 1e-3f, .inverse_valid_tokens = 1.0f / float(tokens)}, inputs, targets);
            losses.push_back(engine->collect().loss_sum);
        }
        return engine->weights_digest();
    };
    std::vector<float> with, without;
    const uint64_t alone = train(without);
    o.parallel.world = o.parallel.replicas = ranks;
    const uint64_t together = train(with);
    report.expect("engine with NCCL in its graphs", use_graphs ? "graphs" : "eager", alone == together && with == without,
                  message("losses %.6f, %.6f; digests %016llx, %016llx; %lld collectives enqueued", double(with.back()), double(without.back()),
                          (unsigned long long)together, (unsigned long long)alone, (long long)ranks->traffic().calls));
}

void checks(Report& report) {
    const std::string obstacle = nccl_obstacle();
    if (!obstacle.empty()) return report.skip("collectives", "NCCL", obstacle);
    for (const int most_ctas : {0, 4}) {
        const std::unique_ptr<Communicator> ranks = make(most_ctas);
        for (const size_t n : {size_t(1), size_t(512), size_t(100'003), size_t(1) << 22}) check_size(report, *ranks, n);
    }
    if (world().size() > 1) return check_copy_gathers(report, world());
    const std::shared_ptr<Communicator> one = make(0);
    for (const bool use_graphs : {false, true}) check_engine(report, one, use_graphs);
}

void benches(Report& report) {
    if (world().rank() > 0 && !std::freopen("/dev/null", "w", stdout)) throw Error("cannot open /dev/null");  // one table is enough
    if (!nccl_obstacle().empty() || world().size() == 1) return report.skip("collectives", "bandwidth", "needs several GPUs");
    take_a_gpu();
    bench_bandwidth(report, world());
}

}  // namespace

int main(int argc, char** argv) { return run_dev_program_of_ranks<checks, benches>(argc, argv, "collectives"); }
