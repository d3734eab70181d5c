// What every dev program shares: device buffers with guards, comparison per tile, timing, one line a case.
//
// A dev program is dev/NAME.cu:
//     int main(int argc, char** argv) { return run_dev_program(argc, argv, "NAME", checks, benches); }
// with  void checks(Report&)  comparing every kernel with a float64 reference on fresh random data, odd shapes too,
// and   void benches(Report&)  timing them. `NAME check` and `NAME bench` run one, `NAME` both; `--json FILE` writes
// the results for tests/gpu_report; `--small` restricts checks to small shapes (for compute-sanitizer); `--seed N`.
// The exit status is 0 only if every case passed; without a GPU it is 77 and says "skipped: no GPU".
#pragma once
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/common/cuda_check.h"

// Device memory between two guard zones, without a type: the part of DeviceBuffer that needs no template.
// Every call has finished on the device when it returns, whatever stream the kernels use.
class GuardedBytes {
  public:
    explicit GuardedBytes(size_t bytes);
    ~GuardedBytes();
    GuardedBytes(GuardedBytes&& other) noexcept;
    GuardedBytes& operator=(GuardedBytes&&) = delete;

    void* get() const { return base_ + kGuardBytes; }
    void fill(int byte);
    void upload(const void* from, size_t bytes);
    void download(void* to) const;
    bool guards_intact() const;

  private:
    static constexpr size_t kGuardBytes = 4096;
    std::vector<uint8_t> guard() const;
    char* base_ = nullptr;
    size_t bytes_ = 0;
    uint16_t pattern_ = 0;
};

// Device memory of n elements between two guard zones; filled with NaN bytes (0xff) at creation, so that an element a
// kernel forgets to write fails its comparison. guards_intact() tells whether anything wrote outside. The guards are
// NaN too (as float and as bf16), so that an element read from outside shows in the result.
template <class T>
class DeviceBuffer {
  public:
    explicit DeviceBuffer(size_t n) : bytes_(n * sizeof(T)), n_(n) {}
    explicit DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(values.size()) { upload(values); }

    T* get() const { return static_cast<T*>(bytes_.get()); }
    size_t size() const { return n_; }
    void poison() { bytes_.fill(0xff); }
    void zero() { bytes_.fill(0); }
    void upload(const std::vector<T>& values) { bytes_.upload(values.data(), values.size() * sizeof(T)); }
    std::vector<T> download() const {
        std::vector<T> values(n_);
        bytes_.download(values.data());
        return values;
    }
    bool guards_intact() const { return bytes_.guards_intact(); }

  private:
    GuardedBytes bytes_;
    size_t n_;
};

// Random numbers for inputs, different for every call and reproducible from --seed.
std::vector<float> random_normal(size_t n, float stddev = 1.0f);
std::vector<float> random_uniform(size_t n, float low, float high);
std::vector<int> random_ints(size_t n, int low, int high);  // low <= x < high

std::vector<__nv_bfloat16> to_bf16(const std::vector<float>& x);  // round to nearest even
std::vector<float> to_float(const std::vector<__nv_bfloat16>& x);

struct Tolerance {
    double relative;         // bound on ||out - ref|| / ||ref|| of every 128x128 tile
    double absolute = 1e-6;  // floor of the denominator, as root mean square of a tile: for near-zero references
    // No single element may be off by more than element_factor * relative * max(|its reference|, tile's root mean
    // square): one wrong element among 16384 hardly moves the norm. Rounding errors stay below about 6 times theirs.
    double element_factor = 32;
};

struct Comparison {
    bool ok;
    double relative;     // of the worst tile
    std::string figure;  // one line
};
// A (rows, cols) matrix against its reference, per 128x128 tile; the worst tile decides. A NaN anywhere fails, and so does
// a reference that is not finite.
Comparison compare_tiles(const std::vector<float>& out, const std::vector<double>& reference, int64_t rows, int64_t cols,
                         Tolerance tolerance);

class Report {
  public:
    bool small_only = false;

    // compare_tiles as a test of its own.
    void compare(const std::string& name, const std::string& shape, const std::vector<float>& out,
                 const std::vector<double>& reference, int64_t rows, int64_t cols, Tolerance tolerance);
    // Bit-for-bit; names the first difference.
    template <class T>
    void compare_bits(const std::string& name, const std::string& shape, const std::vector<T>& out,
                      const std::vector<T>& reference) {
        compare_bytes(name, shape, out.data(), reference.data(), out.size(), reference.size(), sizeof(T));
    }
    // Any other condition, with a figure to print.
    void expect(const std::string& name, const std::string& shape, bool ok, const std::string& figure);
    // What this machine cannot run: counted apart, neither passed nor failed.
    void skip(const std::string& name, const std::string& shape, const std::string& reason);

    // Median time of one call, in microseconds. `run(i)` must enqueue the work on `stream` using input set i % sets
    // (rotate enough sets that the caches stay cold; `sets` = 1 for GEMM-bound work). Times a CUDA graph of the calls;
    // work that cannot be captured is an Error.
    struct Bench {
        std::string name, shape;
        double bytes = 0;   // fewest bytes through device memory: prints TB/s and % of the measured copy speed
        double flops = 0;   // prints TFLOP/s
        double peak_tflops = 0;  // prints % of it
        int sets = 1;
        int calls = 0;      // in the graph; 0: as many as make it about 5 ms
        int samples = 0;    // replays of it; 0: as many as make about 0.13 s
        std::string versus; // what else was timed in this run, and its microseconds: prints and records the ratio to it
        double versus_us = 0;
    };
    double bench(const Bench& what, const std::function<void(int set, cudaStream_t stream)>& run);

    int failures() const { return failures_; }
    int passed() const { return passed_; }
    int skipped() const { return skipped_; }

  private:
    friend int run_dev_program(int, char**, const char*, void (*)(Report&), void (*)(Report&));
    void compare_bytes(const std::string& name, const std::string& shape, const void* out, const void* reference,
                       size_t n_out, size_t n_reference, size_t element_bytes);
    void record(const std::string& name, const std::string& shape, bool ok, const std::string& figure);
    void add_test(const std::string& name, const std::string& shape, const char* status, const std::string& figure);
    double copy_speed();  // bytes per second of a large device copy, read + written; measured once
    void write_json(const std::string& path) const;

    int failures_ = 0, passed_ = 0, skipped_ = 0;
    double copy_bytes_per_s_ = 0;
    std::vector<std::string> json_tests_, json_benches_;
    std::string program_;
};

int run_dev_program(int argc, char** argv, const char* name, void (*checks)(Report&), void (*benches)(Report&));
