#include "dev/harness.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numbers>
#include <random>

#include "trainer/reference/quantizer.h"

// ---------------------------------------------------------------------------------------------------------------------
// Device memory between guards

GuardedBytes::GuardedBytes(size_t bytes) : bytes_(bytes) {
    // Negative NaNs as bf16 and as float, other than 0xffff (poison) and 0x7fff (what arithmetic makes), and another
    // one for the next buffer, so that a copy that runs over the end of both its buffers is noticed.
    static int buffers = 0;
    pattern_ = static_cast<uint16_t>(0xff81 + buffers++ % 126);
    CUDA_CHECK(cudaMalloc(&base_, bytes + 2 * kGuardBytes));
    const std::vector<uint8_t> zone = guard();
    CUDA_CHECK(cudaMemcpy(base_, zone.data(), kGuardBytes, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(base_ + kGuardBytes + bytes, zone.data(), kGuardBytes, cudaMemcpyHostToDevice));
    fill(0xff);
}

GuardedBytes::~GuardedBytes() {
    if (base_) cudaFree(base_);
}

GuardedBytes::GuardedBytes(GuardedBytes&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)), bytes_(other.bytes_), pattern_(other.pattern_) {}

std::vector<uint8_t> GuardedBytes::guard() const {
    std::vector<uint8_t> zone(kGuardBytes);
    for (size_t i = 0; i < kGuardBytes; i++) zone[i] = static_cast<uint8_t>(i % 2 ? pattern_ >> 8 : pattern_ & 0xff);
    return zone;
}

void GuardedBytes::fill(int byte) {
    CUDA_CHECK(cudaMemset(get(), byte, bytes_));
    CUDA_CHECK(cudaDeviceSynchronize());
}

void GuardedBytes::upload(const void* from, size_t bytes) {
    REQUIRE(bytes == bytes_, "upload of %zu bytes into a device buffer of %zu", bytes, bytes_);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(get(), from, bytes, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());
}

void GuardedBytes::download(void* to) const {
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(to, get(), bytes_, cudaMemcpyDeviceToHost));
}

bool GuardedBytes::guards_intact() const {
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<uint8_t> expected = guard();
    std::vector<uint8_t> zone(kGuardBytes);
    for (const char* at : {base_, base_ + kGuardBytes + bytes_}) {
        CUDA_CHECK(cudaMemcpy(zone.data(), at, kGuardBytes, cudaMemcpyDeviceToHost));
        if (zone != expected) return false;
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Random inputs: number i of stream s is a hash of (seed, s, i), so any thread can make any part

namespace {
uint64_t random_seed = 0;

uint64_t mix(uint64_t x) {  // the finalizer of SplitMix64 (Steele, Lea, Flood 2014)
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

class RandomStream {
  public:
    RandomStream() : key_(mix(random_seed + mix(++streams_))) {}
    uint64_t bits(size_t i) const { return mix(key_ + (i + 1) * 0x9e3779b97f4a7c15u); }

  private:
    static inline uint64_t streams_ = 0;
    uint64_t key_;
};

float unit_from_24_bits(uint64_t bits) { return float(bits >> 40) * 0x1p-24f; }  // in [0, 1)
}  // namespace

std::vector<float> random_normal(size_t n, float stddev) {
    const RandomStream stream;
    std::vector<float> x(n);
    const size_t pairs = (n + 1) / 2;
#pragma omp parallel for
    for (size_t pair = 0; pair < pairs; pair++) {  // Box-Muller
        const uint64_t bits = stream.bits(pair);
        const float radius = stddev * std::sqrt(-2.0f * std::log((float(bits & 0xffffffffu) + 1.0f) * 0x1p-32f));
        const float angle = 2.0f * std::numbers::pi_v<float> * unit_from_24_bits(bits);
        x[2 * pair] = radius * std::cos(angle);
        if (2 * pair + 1 < n) x[2 * pair + 1] = radius * std::sin(angle);
    }
    return x;
}

std::vector<float> random_uniform(size_t n, float low, float high) {
    const RandomStream stream;
    std::vector<float> x(n);
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) x[i] = low + (high - low) * unit_from_24_bits(stream.bits(i));
    return x;
}

std::vector<int> random_ints(size_t n, int low, int high) {
    REQUIRE(low < high, "random_ints: nothing lies in [%d, %d)", low, high);
    const RandomStream stream;
    const uint64_t range = static_cast<uint64_t>(int64_t(high) - low);  // at most 2^32: the product below fits
    std::vector<int> x(n);
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) x[i] = static_cast<int>(low + int64_t(((stream.bits(i) >> 32) * range) >> 32));
    return x;
}

std::vector<__nv_bfloat16> to_bf16(const std::vector<float>& x) {
    std::vector<__nv_bfloat16> y(x.size());
#pragma omp parallel for
    for (size_t i = 0; i < x.size(); i++) y[i] = std::bit_cast<__nv_bfloat16>(bf16_bits(x[i]));
    return y;
}

std::vector<float> to_float(const std::vector<__nv_bfloat16>& x) {
    std::vector<float> y(x.size());
#pragma omp parallel for
    for (size_t i = 0; i < x.size(); i++) y[i] = bf16_value(std::bit_cast<uint16_t>(x[i]));
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Comparisons

namespace {
constexpr int64_t kTile = 128;

struct TileError {
    double relative = 0;                // ||out - ref|| / max(||ref||, floor)
    double element = 0;                 // worst |out - ref| / max(|ref|, rms of ref, floor)
    int64_t element_index = 0;          // of that element
    bool reference_finite = true;
};

// Is `a` worse than `b`? NaN is worse than any number.
bool worse(double a, double b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

TileError tile_error(const float* out, const double* reference, int64_t rows, int64_t cols, int64_t row0, int64_t col0,
                     double floor) {
    const int64_t row1 = std::min(rows, row0 + kTile), col1 = std::min(cols, col0 + kTile);
    double error2 = 0, reference2 = 0;
    for (int64_t r = row0; r < row1; r++)
        for (int64_t c = col0; c < col1; c++) {
            const double want = reference[r * cols + c], error = double(out[r * cols + c]) - want;
            error2 += error * error;
            reference2 += want * want;
        }
    const double count = double((row1 - row0) * (col1 - col0));
    const double rms = std::max(std::sqrt(reference2 / count), floor);
    TileError tile;
    tile.reference_finite = std::isfinite(reference2);
    tile.relative = std::sqrt(error2 / count) / rms;
    for (int64_t r = row0; r < row1; r++)
        for (int64_t c = col0; c < col1; c++) {
            const double want = reference[r * cols + c];
            const double error = std::fabs(double(out[r * cols + c]) - want) / std::max(rms, std::fabs(want));
            if (worse(error, tile.element)) tile.element = error, tile.element_index = r * cols + c;
        }
    return tile;
}

std::string hex(const void* bytes, size_t n) {  // most significant byte first, as a number is written
    std::string text = "0x";
    for (size_t i = n; i-- > 0;) text += message("%02x", static_cast<const uint8_t*>(bytes)[i]);
    return text;
}

std::string json_quote(const std::string& text) {
    std::string quoted = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') quoted += '\\';
        quoted += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
    return quoted + '"';
}
}  // namespace

void Report::record(const std::string& name, const std::string& shape, bool ok, const std::string& figure) {
    std::printf("%s %s | %s | %s\n", name.c_str(), shape.c_str(), figure.c_str(), ok ? "ok" : "FAIL");
    std::fflush(stdout);
    ++(ok ? passed_ : failures_);
    add_test(name, shape, ok ? "pass" : "fail", figure);
}

void Report::add_test(const std::string& name, const std::string& shape, const char* status, const std::string& figure) {
    json_tests_.push_back(message("{\"name\": %s, \"status\": \"%s\", \"figure\": %s}",
                                  json_quote(name + " " + shape).c_str(), status, json_quote(figure).c_str()));
}

void Report::expect(const std::string& name, const std::string& shape, bool ok, const std::string& figure) {
    record(name, shape, ok, figure);
}

void Report::skip(const std::string& name, const std::string& shape, const std::string& reason) {
    std::printf("%s %s | %s | skipped\n", name.c_str(), shape.c_str(), reason.c_str());
    ++skipped_;
    add_test(name, shape, "skip", reason);
}

void Report::compare(const std::string& name, const std::string& shape, const std::vector<float>& out,
                     const std::vector<double>& reference, int64_t rows, int64_t cols, Tolerance tolerance) {
    const Comparison comparison = compare_tiles(out, reference, rows, cols, tolerance);
    record(name, shape, comparison.ok, comparison.figure);
}

Comparison compare_tiles(const std::vector<float>& out, const std::vector<double>& reference, int64_t rows, int64_t cols,
                         Tolerance tolerance) {
    const size_t count = static_cast<size_t>(rows * cols);
    if (count == 0 || out.size() != count || reference.size() != count)
        return {false, NAN, message("%zu outputs and %zu references for a matrix of %lldx%lld", out.size(), reference.size(),
                                    (long long)rows, (long long)cols)};
    const int64_t tile_rows = (rows + kTile - 1) / kTile, tile_cols = (cols + kTile - 1) / kTile;
    std::vector<TileError> tiles(static_cast<size_t>(tile_rows * tile_cols));
#pragma omp parallel for schedule(dynamic)
    for (size_t t = 0; t < tiles.size(); t++)
        tiles[t] = tile_error(out.data(), reference.data(), rows, cols, int64_t(t) / tile_cols * kTile,
                              int64_t(t) % tile_cols * kTile, tolerance.absolute);

    size_t worst_tile = 0, worst_element = 0;
    bool reference_finite = true;
    for (size_t t = 0; t < tiles.size(); t++) {
        if (worse(tiles[t].relative, tiles[worst_tile].relative)) worst_tile = t;
        if (worse(tiles[t].element, tiles[worst_element].element)) worst_element = t;
        reference_finite &= tiles[t].reference_finite;
    }
    const bool tile_ok = tiles[worst_tile].relative <= tolerance.relative;  // false for NaN
    const bool element_ok = tiles[worst_element].element <= tolerance.element_factor * tolerance.relative;
    std::string figure = message("rel %.1e tile (%lld,%lld) tol %.1e", tiles[worst_tile].relative,
                                 (long long)(int64_t(worst_tile) / tile_cols),
                                 (long long)(int64_t(worst_tile) % tile_cols), tolerance.relative);
    if (!reference_finite) figure += ", reference not finite";
    if (!tile_ok || !element_ok) {
        const int64_t at = tiles[worst_element].element_index;
        figure += message(", element (%lld,%lld) is %g instead of %g, rel %.1e tol %.1e", (long long)(at / cols),
                          (long long)(at % cols), double(out[size_t(at)]), reference[size_t(at)],
                          tiles[worst_element].element, tolerance.element_factor * tolerance.relative);
    }
    return {tile_ok && element_ok && reference_finite, tiles[worst_tile].relative, figure};
}

void Report::compare_bytes(const std::string& name, const std::string& shape, const void* out, const void* reference,
                           size_t n_out, size_t n_reference, size_t element_bytes) {
    if (n_out != n_reference || n_out == 0) {
        record(name, shape, false, message("%zu elements against %zu", n_out, n_reference));
        return;
    }
    const auto *a = static_cast<const uint8_t*>(out), *b = static_cast<const uint8_t*>(reference);
    size_t differences = 0, first = 0;
    if (std::memcmp(a, b, n_out * element_bytes) != 0)
        for (size_t i = n_out; i-- > 0;)
            if (std::memcmp(a + i * element_bytes, b + i * element_bytes, element_bytes) != 0) differences++, first = i;
    const std::string figure =
        differences == 0 ? message("%zu equal bitwise", n_out)
                         : message("%zu of %zu differ, first [%zu] %s instead of %s", differences, n_out, first,
                                   hex(a + first * element_bytes, element_bytes).c_str(),
                                   hex(b + first * element_bytes, element_bytes).c_str());
    record(name, shape, differences == 0, figure);
}

// ---------------------------------------------------------------------------------------------------------------------
// Timing

namespace {
struct StreamDeleter {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
struct EventDeleter {
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
struct GraphDeleter {
    void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
struct GraphExecDeleter {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
template <class Handle, class Deleter>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Deleter>;
using Event = Owned<cudaEvent_t, EventDeleter>;

Event make_event() {
    cudaEvent_t event = nullptr;
    CUDA_CHECK(cudaEventCreate(&event));
    return Event(event);
}

// Seconds of each of `repeats` launches, enqueued back to back so that the host's launch time stays hidden.
std::vector<double> time_launches(int repeats, cudaStream_t stream, const std::function<void()>& launch) {
    std::vector<Event> events;
    for (int i = 0; i <= repeats; i++) events.push_back(make_event());
    CUDA_CHECK(cudaEventRecord(events[0].get(), stream));
    for (int i = 0; i < repeats; i++) {
        launch();
        CUDA_CHECK(cudaEventRecord(events[size_t(i) + 1].get(), stream));
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    std::vector<double> seconds;
    for (int i = 0; i < repeats; i++) {
        float ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, events[size_t(i)].get(), events[size_t(i) + 1].get()));
        seconds.push_back(ms * 1e-3);
    }
    return seconds;
}

// Median seconds of one call: a graph of about 5 ms, replayed for about 0.2 s including its warm-up, unless asked otherwise.
double median_seconds(const Report::Bench& what, const std::function<void(int, cudaStream_t)>& run) {
    const int sets = what.sets;
    constexpr double kGraphSeconds = 5e-3, kMeasuredSeconds = 0.13;
    constexpr int kMaxCalls = 512, kMinReplays = 3, kMaxReplays = 21;
    cudaStream_t raw_stream = nullptr;
    CUDA_CHECK(cudaStreamCreateWithFlags(&raw_stream, cudaStreamNonBlocking));
    const Owned<cudaStream_t, StreamDeleter> owned_stream(raw_stream);
    const cudaStream_t stream = raw_stream;

    for (int set = 0; set < sets; set++) run(set, stream);  // first calls load modules and set attributes
    CUDA_CHECK(cudaStreamSynchronize(stream));
    int next_set = 0;
    const std::vector<double> eager = time_launches(3, stream, [&] { run(next_set++ % sets, stream); });
    const double one_call = std::max(*std::min_element(eager.begin(), eager.end()), 1e-6);

    const int wanted = what.calls ? what.calls : std::clamp(static_cast<int>(kGraphSeconds / one_call), 1, kMaxCalls);
    const int calls = (wanted + sets - 1) / sets * sets;
    cudaGraph_t raw_graph = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
        for (int i = 0; i < calls; i++) run(i % sets, stream);
    } catch (const Error& error) {
        cudaStreamEndCapture(stream, &raw_graph);
        cudaGetLastError();
        throw Error(message("bench %s cannot be captured in a graph: %s", what.name.c_str(), error.what()));
    }
    CUDA_CHECK(cudaStreamEndCapture(stream, &raw_graph));
    const Owned<cudaGraph_t, GraphDeleter> graph(raw_graph);
    cudaGraphExec_t raw_exec = nullptr;
    CUDA_CHECK(cudaGraphInstantiate(&raw_exec, graph.get(), 0));
    const Owned<cudaGraphExec_t, GraphExecDeleter> exec(raw_exec);

    const int replays = what.samples ? what.samples : std::clamp(static_cast<int>(kMeasuredSeconds / (one_call * calls)), kMinReplays, kMaxReplays);
    const auto launch = [&] { CUDA_CHECK(cudaGraphLaunch(exec.get(), stream)); };
    time_launches(1 + replays / 3, stream, launch);
    std::vector<double> seconds = time_launches(replays, stream, launch);
    std::nth_element(seconds.begin(), seconds.begin() + replays / 2, seconds.end());
    return seconds[size_t(replays) / 2] / calls;
}
}  // namespace

double Report::copy_speed() {
    if (copy_bytes_per_s_ > 0) return copy_bytes_per_s_;
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    const size_t bytes = std::min(size_t(2) << 30, free_bytes / 4) / 512 * 512;
    DeviceBuffer<uint8_t> from(bytes), to(bytes);
    // Plain calls, not a graph: as a graph node the same copy ran at 2.8 TB/s on an H200, on a stream at 4.2, and the
    // ceiling should be the faster one.
    cudaStream_t raw_stream = nullptr;
    CUDA_CHECK(cudaStreamCreateWithFlags(&raw_stream, cudaStreamNonBlocking));
    const Owned<cudaStream_t, StreamDeleter> stream(raw_stream);
    const auto copy = [&] { CUDA_CHECK(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, stream.get())); };
    time_launches(3, stream.get(), copy);
    std::vector<double> times = time_launches(9, stream.get(), copy);
    std::nth_element(times.begin(), times.begin() + 4, times.end());
    const double seconds = times[4];
    copy_bytes_per_s_ = 2.0 * double(bytes) / seconds;
    std::printf("device copy of %.1f GB | %.2f TB/s read + written\n", double(bytes) * 1e-9, copy_bytes_per_s_ * 1e-12);
    return copy_bytes_per_s_;
}

double Report::bench(const Bench& what, const std::function<void(int set, cudaStream_t stream)>& run) {
    REQUIRE(what.sets >= 1, "bench %s: sets=%d must be at least 1", what.name.c_str(), what.sets);
    const double seconds = median_seconds(what, run);
    const double tb_per_s = what.bytes / seconds * 1e-12, tflops = what.flops / seconds * 1e-12;
    std::string line = message("%s %s | %.1f us", what.name.c_str(), what.shape.c_str(), seconds * 1e6);
    std::string json = message("{\"kind\": \"kernel\", \"name\": %s, \"case\": %s, \"us\": %.2f",
                               json_quote(what.name).c_str(), json_quote(what.shape).c_str(), seconds * 1e6);
    double of_ceiling = 0;  // of the nearer one, where both are known
    if (what.bytes > 0) {
        const double of_copy = what.bytes / seconds / copy_speed();
        line += message(" | %.2f TB/s | %.0f %% of copy", tb_per_s, 100 * of_copy);
        json += message(", \"tb_per_s\": %.3f", tb_per_s);
        of_ceiling = of_copy;
    }
    if (what.flops > 0) {
        line += message(" | %.0f TFLOP/s", tflops);
        json += message(", \"tflops\": %.1f", tflops);
    }
    if (what.flops > 0 && what.peak_tflops > 0) {
        const double of_peak = tflops / what.peak_tflops;
        line += message(" | %.0f %% of peak", 100 * of_peak);
        of_ceiling = std::max(of_ceiling, of_peak);
    }
    if (of_ceiling > 0) json += message(", \"of_ceiling\": %.3f", of_ceiling);
    if (what.versus_us > 0) {
        const double ratio = what.versus_us / (seconds * 1e6);
        line += message(" | %.2fx %s", ratio, what.versus.c_str());
        json += message(", \"versus\": %s, \"ratio\": %.3f", json_quote(what.versus).c_str(), ratio);
    }
    json += message(", \"command\": %s}", json_quote("make bench-" + program_).c_str());
    json_benches_.push_back(json);
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
    return seconds * 1e6;
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

void Report::write_json(const std::string& path) const {
    const auto list = [](const std::vector<std::string>& rows) {
        std::string text;
        for (const std::string& row : rows) text += (text.empty() ? "\n    " : ",\n    ") + row;
        return "[" + text + "\n  ]";
    };
    const std::string text = message("{\n  \"tests\": %s,\n  \"bench\": %s\n}\n", list(json_tests_).c_str(),
                                     list(json_benches_).c_str());
    const std::string temporary = path + ".tmp";
    std::FILE* file = std::fopen(temporary.c_str(), "w");
    REQUIRE(file, "%s: cannot be written: %s", temporary.c_str(), std::strerror(errno));
    const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
    const bool closed = std::fclose(file) == 0;
    REQUIRE(written && closed && std::rename(temporary.c_str(), path.c_str()) == 0, "%s: cannot be written: %s",
            path.c_str(), std::strerror(errno));
}

namespace {
struct Options {
    bool check = true, bench = true, small = false;
    std::string json_file;
};

Options parse(int argc, char** argv, const char* name) {
    const std::string usage = message("usage: %s [check | bench] [--small] [--seed N] [--json FILE]", name);
    Options options;
    random_seed = std::random_device{}();
    for (int i = 1; i < argc; i++) {
        const std::string argument = argv[i];
        const auto value = [&] {
            REQUIRE(i + 1 < argc, "%s needs a value; %s", argument.c_str(), usage.c_str());
            return std::string(argv[++i]);
        };
        if (argument == "check") {
            options.bench = false;
        } else if (argument == "bench") {
            options.check = false;
        } else if (argument == "--small") {
            options.small = true;
        } else if (argument == "--seed") {
            const std::string text = value();
            char* end = nullptr;
            random_seed = std::strtoull(text.c_str(), &end, 10);
            REQUIRE(!text.empty() && *end == '\0', "--seed %s is not a number", text.c_str());
        } else if (argument == "--json") {
            options.json_file = value();
        } else {
            throw Error(message("unknown argument %s; %s", argument.c_str(), usage.c_str()));
        }
    }
    REQUIRE(options.check || options.bench, "check and bench exclude each other; without either both run");
    return options;
}
}  // namespace

int run_dev_program(int argc, char** argv, const char* name, void (*checks)(Report&), void (*benches)(Report&)) try {
    const Options options = parse(argc, argv, name);
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("%s: skipped: no GPU\n", name);
        return 77;
    }
    cudaDeviceProp device{};
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    std::printf("%s on %s, --seed %llu\n", name, device.name, (unsigned long long)random_seed);

    Report report;
    report.small_only = options.small;
    report.program_ = name;
    const auto part = [&](const char* which, void (*function)(Report&)) {
        try {
            function(report);
            CUDA_CHECK(cudaDeviceSynchronize());
        } catch (const std::exception& error) {
            report.record(name, which, false, error.what());
        }
    };
    if (options.check) part("check", checks);
    if (options.bench) part("bench", benches);
    if (!options.json_file.empty()) report.write_json(options.json_file);
    std::printf("%s: %d passed, %d failed", name, report.passed(), report.failures());
    std::printf(report.skipped() ? ", %d skipped\n" : "\n", report.skipped());
    return report.failures() == 0 ? 0 : 1;
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
}
