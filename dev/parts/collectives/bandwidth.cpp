#include "dev/parts/collectives/bandwidth.h"

#include <algorithm>
#include <functional>
#include <map>
#include <memory>

#include "dev/parts/collectives/copy_engines.h"
#include "dev/parts/collectives/streams.h"
#include "kernels/gemm.h"
#include "trainer/cuda_graph.h"
#include "trainer/distributed/nccl_communicator.h"

namespace {

constexpr int kMostCtas[] = {0, 4, 16};                     // 0: NCCL's choice
constexpr int kMebibytes[] = {1, 4, 16, 32, 64, 128, 256};  // a block of 1558M: 29 as FP8, 59 as BF16, 117 as FP32 gradients
constexpr int kBesideMebibytes = 64;

std::string ctas_text(int most_ctas) { return most_ctas == 0 ? "NCCL" : message("NCCL, %d CTAs", most_ctas); }

// Ranks begin a measurement together: otherwise the first of them measures its wait for the last.
double timed(Report& report, World& world, const Report::Bench& what, const std::function<void(int, cudaStream_t)>& run) {
    world.all_texts("");
    return report.bench(what, run);
}

// Bytes that a rank sends at the least, of `bytes` in all.
double sent(const std::string& collective, double bytes, int ranks) { return (collective.starts_with("all_reduce") ? 2 : 1) * bytes * (ranks - 1) / ranks; }

class Table {
  public:
    explicit Table(int ranks) : ranks_(ranks) {}
    void add(const std::string& collective, const std::string& method, int mebibytes, double us) { rows_[collective][method][mebibytes] = us; }
    void print() const {
        for (const auto& [collective, methods] : rows_) {
            std::printf("\n%-20s", collective.c_str());
            for (const int size : kMebibytes) std::printf(" | %9d MiB", size);
            std::printf("     us, bus GB/s; %d ranks\n", ranks_);
            for (const auto& [method, figures] : methods) {
                std::printf("%-20s", method.c_str());
                for (const auto& [size, us] : figures) std::printf(" | %7.0f %5.0f", us, sent(collective, size * 0x1p20, ranks_) / us * 1e-3);
                std::printf("\n");
            }
        }
        std::fflush(stdout);
    }

  private:
    int ranks_;
    std::map<std::string, std::map<std::string, std::map<int, double>>> rows_;
};

struct Collective {
    const char* name;
    std::function<void(Communicator&, void*, int64_t bytes, cudaStream_t)> run;  // bytes in all
};
const Collective kCollectives[] = {
    {"all_gather", [](Communicator& c, void* x, int64_t bytes, cudaStream_t s) { c.all_gather(x, bytes / c.size(), s); }},
    {"reduce_scatter f32", [](Communicator& c, void* x, int64_t bytes, cudaStream_t s) { c.reduce_scatter(x, bytes / c.size() / 4, Element::f32, s); }},
    {"reduce_scatter bf16", [](Communicator& c, void* x, int64_t bytes, cudaStream_t s) { c.reduce_scatter(x, bytes / c.size() / 2, Element::bf16, s); }},
    {"all_reduce f32", [](Communicator& c, void* x, int64_t bytes, cudaStream_t s) { c.all_reduce(x, bytes / 4, Element::f32, Reduction::sum, s); }},
};

Report::Bench row(const std::string& collective, const std::string& method, int mebibytes, int ranks) {
    return {.name = collective, .shape = message("%d MiB, %d ranks, %s", mebibytes, ranks, method.c_str()), .calls = 10, .samples = 11};
}

void bench_nccl(Report& report, World& world, Table& table) {
    const DeviceBuffer<uint8_t> data(size_t(kMebibytes[std::size(kMebibytes) - 1]) << 20);
    CUDA_CHECK(cudaMemset(data.get(), 0, data.size()));  // sums stay zero
    for (const int most_ctas : kMostCtas) {
        const std::unique_ptr<Communicator> ranks = nccl_split(world, 0, {.most_ctas = most_ctas}, true);
        for (const Collective& c : kCollectives)
            for (const int size : kMebibytes)
                table.add(c.name, ctas_text(most_ctas), size, timed(report, world, row(c.name, ctas_text(most_ctas), size, world.size()), [&](int, cudaStream_t s) {
                    c.run(*ranks, data.get(), int64_t(size) << 20, s);
                }));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Copy engines

using Make = std::unique_ptr<CopyGather> (*)(World&, int64_t, std::string&);
constexpr Make kCopyGathers[] = {nccl_copy_gather, peer_copy_gather, flagged_copy_gather};
constexpr const char* kCopyNames[] = {"NCCL, zero CTAs", "peer copies", "peer copies, flags"};

// On streams, call after call, for what a graph does not hold.
double microseconds_on_stream(World& world, CopyGather& gather, int64_t slice) {
    constexpr int kCalls = 30;
    const Streams streams;
    cudaEvent_t begin = nullptr, end = nullptr;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int turn = 0; turn < 7; ++turn) {
        CUDA_CHECK(cudaStreamSynchronize(streams.compute));
        world.all_texts("");
        CUDA_CHECK(cudaEventRecord(begin, streams.compute));
        for (int i = 0; i < kCalls; ++i) gather.run(slice, streams.compute);
        CUDA_CHECK(cudaEventRecord(end, streams.compute));
        CUDA_CHECK(cudaEventSynchronize(end));
        times.emplace_back();
        CUDA_CHECK(cudaEventElapsedTime(&times.back(), begin, end));
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    std::nth_element(times.begin(), times.begin() + 3, times.end());
    return double(times[3]) * 1e3 / kCalls;
}

// What a graph cannot hold is no reason to end: the rest is measured all the same.
void bench_graph(Report& report, World& world, Table& table, const Report::Bench& what, CopyGather& gather, int64_t slice, int mebibytes) {
    try {
        table.add("all_gather", gather.name(), mebibytes, timed(report, world, what, [&](int, cudaStream_t s) { gather.run(slice, s); }));
    } catch (const Error& error) {
        report.skip("all_gather in a graph", gather.name(), error.what());
    }
}

void bench_copies(Report& report, World& world, Table& table) {
    for (size_t i = 0; i < std::size(kCopyGathers); ++i) {
        std::string obstacle;
        const std::unique_ptr<CopyGather> gather = kCopyGathers[i](world, int64_t(kMebibytes[std::size(kMebibytes) - 1]) << 20, obstacle);
        if (!gather) {
            report.skip("all_gather", kCopyNames[i], obstacle);
            continue;
        }
        for (const int size : kMebibytes) {
            const int64_t slice = (int64_t(size) << 20) / world.size();
            const Report::Bench what = row("all_gather", gather->name(), size, world.size());
            const double on_stream = microseconds_on_stream(world, *gather, slice);
            table.add("all_gather", message("%s, eager", gather->name()), size, on_stream);
            report.expect("all_gather eager", what.shape, on_stream > 0, message("%.1f us", on_stream));
            if (kCopyGathers[i] != flagged_copy_gather) bench_graph(report, world, table, what, *gather, slice, size);
        }
    }
}

// What carries gradients to their slices in the trainer, by NCCL's kernels and by copy engines.
class Exchange {
  public:
    Exchange(World& world, bool copy_engines, int64_t most_bytes)
        : name_(copy_engines ? "NCCL, zero CTAs" : "NCCL"), ranks_(nccl_split(world, 0, {.copy_engines = copy_engines}, true)), memory_(copy_engines ? ranks_->memory(2 * most_bytes) : nullptr),
          plain_(memory_ ? 1 : size_t(2 * most_bytes)), from_(memory_ ? static_cast<uint8_t*>(memory_.get()) : plain_.get()), to_(from_ + most_bytes) {
        CUDA_CHECK(cudaMemset(from_, 0, size_t(2 * most_bytes)));
    }
    const char* name() const { return name_; }
    void run(int64_t bytes, cudaStream_t stream) const { ranks_->all_to_all(from_, to_, bytes / ranks_->size(), stream); }  // bytes in all

  private:
    const char* const name_;
    const std::unique_ptr<Communicator> ranks_;
    const std::shared_ptr<void> memory_;
    const DeviceBuffer<uint8_t> plain_;
    uint8_t* const from_;
    uint8_t* const to_;
};

void bench_exchanges(Report& report, World& world, Table& table) {
    for (const bool copy_engines : {false, true}) {
        const Exchange exchange(world, copy_engines, int64_t(kMebibytes[std::size(kMebibytes) - 1]) << 20);
        for (const int size : kMebibytes)
            table.add("all_to_all", exchange.name(), size,
                      timed(report, world, row("all_to_all", exchange.name(), size, world.size()), [&](int, cudaStream_t s) { exchange.run(int64_t(size) << 20, s); }));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Beside compute

// GEMMs of 1558M's MLP for longer than the collectives beside them take; by how much of the collectives' time the GEMMs become slower.
class Beside {
  public:
    Beside(Report& report, World& world) : report_(report), world_(world), gemm_({.cache_file = "", .autotune = true, .pinned = ""}) {
        gemm_.plan(kShape);
        fill(a_), fill(b_), scale_.upload({1.0f, 0, 0, 0});
        gemms_us_ = timed(report, world, {.name = "GEMMs alone", .shape = kShape.key(), .calls = 1, .samples = 11}, [&](int, cudaStream_t s) { gemms(s); });
    }

    void measure(const std::string& collective, const std::string& method, const std::function<void(cudaStream_t)>& run) {
        const double one_us = timed(report_, world_, {.name = collective + " alone", .shape = method, .calls = 10, .samples = 5}, [&](int, cudaStream_t s) { run(s); });
        const int count = std::max(1, int(0.5 * gemms_us_ / one_us));
        const Streams streams;
        const double both_us = timed(report_, world_, {.name = "GEMMs beside " + collective, .shape = method, .calls = 1, .samples = 11}, [&](int, cudaStream_t s) {
            streams.fork_from(s);
            for (int i = 0; i < count; ++i) run(streams.communication);
            gemms(s);
            streams.join_to(s);
        });
        const double slower_us = both_us - gemms_us_, communication_us = count * one_us;
        report_.expect("compute taken by " + collective, method, both_us > 0,
                       message("%d in %.0f us beside GEMMs of %.0f us: together %.0f us, %.0f %% of the communication's time is lost", count, communication_us, gemms_us_, both_us,
                               100 * slower_us / communication_us));
    }

  private:
    static constexpr int kGemms = 30;
    const GemmShape kShape{.M = 16384, .N = 6400, .K = 1600, .a = Dtype::e4m3, .b = Dtype::e4m3, .d = Dtype::bf16, .fast_accumulation = true};

    // Random codes that are no NaN: zeros would let the clock rise.
    static void fill(const DeviceBuffer<uint8_t>& codes) {
        const std::vector<int> values = random_ints(1 << 20, 0, 256);
        std::vector<uint8_t> pool(values.size());
        std::transform(values.begin(), values.end(), pool.begin(), [](int v) { return uint8_t((v & 0x7f) == 0x7f ? 0 : v); });
        for (size_t at = 0; at < codes.size(); at += pool.size())
            CUDA_CHECK(cudaMemcpy(codes.get() + at, pool.data(), std::min(pool.size(), codes.size() - at), cudaMemcpyHostToDevice));
    }
    void gemms(cudaStream_t s) {
        for (int i = 0; i < kGemms; ++i) gemm_.run(kShape, {.a = a_.get(), .b = b_.get(), .d = d_.get(), .a_scale = scale_.get(), .b_scale = scale_.get()}, s);
    }

    Report& report_;
    World& world_;
    Gemm gemm_;
    DeviceBuffer<uint8_t> a_{size_t(kShape.M) * size_t(kShape.K)}, b_{size_t(kShape.N) * size_t(kShape.K)};
    DeviceBuffer<float> scale_{4};
    DeviceBuffer<__nv_bfloat16> d_{size_t(kShape.M) * size_t(kShape.N)};
    double gemms_us_ = 0;
};

void bench_beside(Report& report, World& world) {
    Beside beside(report, world);
    const int64_t bytes = int64_t(kBesideMebibytes) << 20;
    const DeviceBuffer<uint8_t> data{size_t(bytes)};
    CUDA_CHECK(cudaMemset(data.get(), 0, data.size()));
    for (const int most_ctas : kMostCtas) {
        const std::unique_ptr<Communicator> ranks = nccl_split(world, 0, {.most_ctas = most_ctas}, true);
        for (const Collective& c : kCollectives) beside.measure(c.name, ctas_text(most_ctas), [&](cudaStream_t s) { c.run(*ranks, data.get(), bytes, s); });
    }
    for (const bool copy_engines : {false, true}) {
        const Exchange exchange(world, copy_engines, bytes);
        beside.measure("all_to_all", exchange.name(), [&](cudaStream_t s) { exchange.run(bytes, s); });
    }
    for (const Make make : {nccl_copy_gather, peer_copy_gather}) {
        std::string obstacle;
        const std::unique_ptr<CopyGather> gather = make(world, bytes, obstacle);
        if (!gather) continue;  // bench_copies has said why
        try {
            beside.measure("all_gather", gather->name(), [&](cudaStream_t s) { gather->run(bytes / world.size(), s); });
        } catch (const Error& error) {
            report.skip("compute taken by all_gather", gather->name(), error.what());
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks

constexpr int64_t kCheckedBytes = 1 << 24;

// Eagerly, or from a graph.
void check_copy_gather(Report& report, World& world, CopyGather& gather, int turn, CudaGraph* graph, const Streams& streams) {
    const int64_t slice = kCheckedBytes / world.size() / 512 * 512, mine_at = slice * world.rank();
    std::vector<uint8_t> all(size_t(slice * world.size())), mine(all.size(), 0xee), got(all.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = uint8_t(i * 31 + i / size_t(slice) + size_t(turn));
    std::copy_n(all.begin() + mine_at, slice, mine.begin() + mine_at);
    CUDA_CHECK(cudaMemcpy(gather.data(), mine.data(), mine.size(), cudaMemcpyHostToDevice));
    world.all_texts("");  // nobody's slice arrives before this
    const auto run = [&] { gather.run(slice, streams.compute); };
    graph ? graph->run(true, streams.compute, run) : run();
    CUDA_CHECK(cudaStreamSynchronize(streams.compute));
    if (!gather.gathers()) world.all_texts("");
    CUDA_CHECK(cudaMemcpy(got.data(), gather.data(), got.size(), cudaMemcpyDeviceToHost));
    report.compare_bits(message("all_gather, %s, turn %d%s", gather.name(), turn, graph ? ", graph" : ""), message("%lld x %d ranks", (long long)slice, world.size()), got, all);
    world.all_texts("");  // nor is anybody's overwritten before it was compared
}

}  // namespace

void check_copy_gathers(Report& report, World& world) {
    for (size_t k = 0; k < std::size(kCopyGathers); ++k) {
        std::string obstacle;
        const std::unique_ptr<CopyGather> gather = kCopyGathers[k](world, kCheckedBytes, obstacle);
        if (!gather) {
            report.skip("all_gather", kCopyNames[k], obstacle);
            continue;
        }
        const Streams streams;
        CudaGraph graph;
        try {
            for (int turn = 0; turn < 4; ++turn) check_copy_gather(report, world, *gather, turn, turn > 1 && kCopyGathers[k] != flagged_copy_gather ? &graph : nullptr, streams);
        } catch (const Error& error) {  // on every rank, as all did the same
            report.skip("all_gather in a graph", gather->name(), error.what());
        }
    }
}

void bench_bandwidth(Report& report, World& world) {
    Table table(world.size());
    bench_nccl(report, world, table);
    bench_copies(report, world, table);
    bench_exchanges(report, world, table);
    table.print();
    bench_beside(report, world);
}
