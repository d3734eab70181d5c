// Matrix multiplication through cuBLASLt: plans, autotuning, and a file of choices.
//
// cuBLASLt is column-major, the contract (gemm.h) is row-major, so everything is transposed: a row-major (R, C) matrix
// is a column-major (C, R) one with the same leading dimension, and
//
//   D (M, N) = A (M, K) * B (N, K)^T    is    D^T (N, M) = B (N, K) * A^T (K, M).
//
// cuBLASLt's operand A is our B and its operand B is our A. Its D has N rows, which is the direction its bias runs in.
//
//   ours            stored row-major   column-major matrix   operation
//   B row_k         (N, K)             (K, N), ld K          transposed
//   B col_k         (K, N)             (N, K), ld N          as it is
//   A row_k         (M, K)             (K, M), ld K          as it is
//   A col_k         (K, M)             (M, K), ld M          transposed
//
// so two row_k operands are the "TN" form, the only one that Hopper's FP8 tensor cores take.
//
// Autotuning asks the heuristic for up to 32 algorithms and times them on random data: never zeros, which draw less
// power and run faster (894 against 798 TFLOP/s, BF16 8192^3 on an H200). It is worth up to 24 % over the heuristic's
// first choice. A plan gives the same bits every time; another algorithm may round differently, so the choice is kept
// in a file, and a checkpoint holds the choices that its run made (kernels/gemm/choices.h: both are the same lines).
#include "kernels/gemm.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstring>
#include <fstream>
#include <sstream>
#include <unordered_map>

#include "kernels/common/cuda_check.h"
#include "kernels/common/mark.h"
#include "kernels/gemm/choices.h"
#include "kernels/gemm/owned.h"
#include "kernels/gemm/tuning_bench.h"

namespace {
constexpr size_t kWorkspaceBytes = size_t(64) << 20;
constexpr int kMaxCandidates = 32;
constexpr uint32_t kAlignment = 16;  // of every pointer, promised to the heuristic and checked in run()

void cublas_check(cublasStatus_t status, const char* expression, const char* file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    throw Error(message("%s failed: %s (%s:%d)", expression, cublasLtGetStatusString(status), file, line));
}
#define CUBLAS_CHECK(expression) cublas_check((expression), #expression, __FILE__, __LINE__)

// ---------------------------------------------------------------------------------------------------------------------
// Shapes

cudaDataType_t cuda_type(Dtype t) {
    switch (t) {
        case Dtype::f32: return CUDA_R_32F;
        case Dtype::bf16: return CUDA_R_16BF;
        case Dtype::e4m3: return CUDA_R_8F_E4M3;
        case Dtype::e5m2: return CUDA_R_8F_E5M2;
    }
    throw Error("gemm: unknown data type");
}

const char* name_of(Layout layout) { return layout == Layout::row_k ? "row" : "col"; }

void check_shape(const GemmShape& s) {
    const std::string key = s.key();
    const char* name = key.c_str();
    REQUIRE(s.M > 0 && s.N > 0 && s.K > 0, "gemm %s: M, N and K must be positive", name);
    // cuBLAS 12.6U2 to 13.2 computes wrong results when a leading dimension exceeds INT32_MAX bytes.
    REQUIRE(std::max({s.M, s.N, s.K}) <= INT_MAX / 4, "gemm %s: no dimension may exceed %d", name, INT_MAX / 4);
    REQUIRE(s.d == Dtype::bf16 || s.d == Dtype::f32, "gemm %s: D is %s and must be bf16 or f32", name, name_of(s.d));
    REQUIRE(!s.bias || s.d == Dtype::bf16, "gemm %s: a bias needs D in bf16, not %s", name, name_of(s.d));
    if (is_fp8(s.a) || is_fp8(s.b)) {
        REQUIRE(is_fp8(s.a) && is_fp8(s.b), "gemm %s: either both operands are FP8 or none", name);
        REQUIRE(s.a == Dtype::e4m3 || s.b == Dtype::e4m3, "gemm %s: one FP8 operand must be e4m3", name);
        REQUIRE(s.K % 16 == 0, "gemm %s: FP8 needs K=%d to be a multiple of 16", name, s.K);
        REQUIRE(s.N % 16 == 0, "gemm %s: FP8 needs N=%d to be a multiple of 16", name, s.N);
        REQUIRE(s.layout_a == Layout::row_k && s.layout_b == Layout::row_k,
                "gemm %s: FP8 operands must be row_k (K contiguous)", name);
    } else {
        REQUIRE(s.a == Dtype::bf16 && s.b == Dtype::bf16, "gemm %s: operands must be bf16 or FP8", name);
        REQUIRE(!s.fast_accumulation, "gemm %s: fast accumulation is for FP8 operands only", name);
    }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAlignment == 0; }

void check_operands(const GemmShape& s, const GemmOperands& o) {
    const auto pointer = [&](const char* which, const void* p, bool wanted) {
        REQUIRE(!wanted || p, "gemm %s: operand %s is missing", s.key().c_str(), which);
        REQUIRE(wanted || !p, "gemm %s: operand %s is given, but the shape has none", s.key().c_str(), which);
        REQUIRE(aligned(p), "gemm %s: operand %s at %p must be %u-byte aligned", s.key().c_str(), which, p, kAlignment);
    };
    pointer("a", o.a, true);
    pointer("b", o.b, true);
    pointer("d", o.d, true);
    pointer("a_scale", o.a_scale, is_fp8(s.a));
    pointer("b_scale", o.b_scale, is_fp8(s.b));
    pointer("bias", o.bias, s.bias);
}

struct ShapeHash {
    size_t operator()(const GemmShape& s) const {
        const uint64_t flags = uint64_t(s.a) | uint64_t(s.b) << 4 | uint64_t(s.d) << 8 | uint64_t(s.layout_a) << 12 |
                               uint64_t(s.layout_b) << 13 | uint64_t(s.bias) << 14 | uint64_t(s.accumulate) << 15 |
                               uint64_t(s.fast_accumulation) << 16;
        uint64_t h = flags;
        for (const int n : {s.M, s.N, s.K}) h = (h ^ uint64_t(n)) * 0x9e3779b97f4a7c15u, h ^= h >> 29;
        return h;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Plans: the descriptors of one shape and its algorithm

using namespace gemm_detail;

struct Plan {
    Owned<cublasLtMatmulDesc_t> description;
    Owned<cublasLtMatrixLayout_t> a, b, d;  // ours: cuBLASLt's B, A and D
    cublasLtMatmulAlgo_t algorithm;
    float beta;
    std::string mark;
};

template <class T>
void set(const Plan& plan, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.description.get(), attribute, &value, sizeof value));
}

void set_pointers(const Plan& plan, const GemmOperands& o) {
    if (o.a_scale) {
        set(plan, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, o.b_scale);
        set(plan, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, o.a_scale);
    }
    if (o.bias) set(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, o.bias);
}

Owned<cublasLtMatrixLayout_t> make_layout(Dtype type, int rows, int cols) {  // column-major, dense
    cublasLtMatrixLayout_t layout = nullptr;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, cuda_type(type), uint64_t(rows), uint64_t(cols), rows));
    return Owned<cublasLtMatrixLayout_t>(layout);
}

Plan describe(const GemmShape& s) {
    const bool a_row = s.layout_a == Layout::row_k, b_row = s.layout_b == Layout::row_k;
    Plan plan{};
    cublasLtMatmulDesc_t description = nullptr;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    plan.description.reset(description);
    plan.a = a_row ? make_layout(s.a, s.K, s.M) : make_layout(s.a, s.M, s.K);
    plan.b = b_row ? make_layout(s.b, s.K, s.N) : make_layout(s.b, s.N, s.K);
    plan.d = make_layout(s.d, s.N, s.M);
    plan.beta = s.accumulate ? 1.0f : 0.0f;
    set(plan, CUBLASLT_MATMUL_DESC_TRANSA, b_row ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(plan, CUBLASLT_MATMUL_DESC_TRANSB, a_row ? CUBLAS_OP_N : CUBLAS_OP_T);
    if (is_fp8(s.a)) set(plan, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t(s.fast_accumulation));
    if (s.bias) {
        set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
        set(plan, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_16BF);
    }
    return plan;
}

struct Candidate {
    cublasLtMatmulAlgo_t algorithm;
};

gemm_choices::Table read_file(const std::string& path) {
    std::ifstream file(path);
    const gemm_choices::Read read = gemm_choices::read(file);
    if (read.damaged > 0) std::fprintf(stderr, "warning: %s: %d damaged lines are ignored\n", path.c_str(), read.damaged);
    return read.table;
}

}  // namespace

std::string GemmShape::key() const {
    return message("%dx%dx%d %s*%s>%s %s %s%s%s%s", M, N, K, name_of(a), name_of(b), name_of(d),
                   name_of(layout_a), name_of(layout_b), bias ? " bias" : "", accumulate ? " accumulate" : "",
                   fast_accumulation ? " fast" : "");
}

namespace {
MarkCost cost_of(const GemmShape& s) {
    const double M = s.M, N = s.N, K = s.K, passes_of_d = s.accumulate ? 2 : 1;
    return {.flops = 2 * M * N * K, .format = s.a,
            .bytes = M * K * double(bytes_of(s.a)) + N * K * double(bytes_of(s.b)) + M * N * double(bytes_of(s.d)) * passes_of_d};
}
}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

struct Gemm::Impl {
    Options options;
    Owned<cublasLtHandle_t> handle;
    DeviceBytes workspace;
    DeviceBytes one;                // a float 1 in device memory: the scales while planning
    std::string machine;            // "device <tab> version <tab>": start of a choice's name
    gemm_choices::Table cache;      // as loaded, plus what was tuned since
    gemm_choices::Table pinned;     // another run's record
    int unpinned = 0;               // shapes that are not in it
    gemm_choices::Table record;     // the choices of all plans
    std::unordered_map<GemmShape, Plan, ShapeHash> plans;
    std::vector<GemmChoice> choices;

    std::vector<Candidate> candidates(const GemmShape& shape, const Plan& plan) const;
    bool take_from(const gemm_choices::Table& table, Plan& plan, GemmChoice& choice) const;
    void tune(const GemmShape& shape, Plan& plan, const std::vector<Candidate>& found, GemmChoice& choice) const;
    cublasStatus_t enqueue(const Plan& plan, const GemmOperands& operands, cudaStream_t stream) const;
};

cublasStatus_t Gemm::Impl::enqueue(const Plan& plan, const GemmOperands& o, cudaStream_t stream) const {
    constexpr float kAlpha = 1.0f;
    set_pointers(plan, o);
    return cublasLtMatmul(handle.get(), plan.description.get(), &kAlpha, o.b, plan.b.get(), o.a, plan.a.get(),
                          &plan.beta, o.d, plan.d.get(), o.d, plan.d.get(), &plan.algorithm, workspace.get(),
                          kWorkspaceBytes, stream);
}

std::vector<Candidate> Gemm::Impl::candidates(const GemmShape& shape, const Plan& plan) const {
    cublasLtMatmulPreference_t raw = nullptr;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&raw));
    const Owned<cublasLtMatmulPreference_t> preference(raw);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(kWorkspaceBytes));
    // Split-K (besides none, which is always allowed): partial sums stay FP32 and are added in a step of their own, in
    // one order. INPLACE adds them up in D as the blocks come.
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE |
                                (shape.d == Dtype::f32 ? CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE : 0);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, kAlignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, kAlignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, kAlignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, kAlignment);

    cublasLtMatmulHeuristicResult_t results[kMaxCandidates];
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle.get(), plan.description.get(), plan.b.get(), plan.a.get(), plan.d.get(), plan.d.get(), preference.get(),
        kMaxCandidates, results, &count);
    std::vector<Candidate> found;
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < count; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS) found.push_back({results[i].algo});
    REQUIRE(!found.empty(), "gemm %s: cuBLASLt %zu has no algorithm for it (%s)", shape.key().c_str(),
            cublasLtGetVersion(), cublasLtGetStatusString(status));
    return found;
}

bool Gemm::Impl::take_from(const gemm_choices::Table& table, Plan& plan, GemmChoice& choice) const {
    const auto entry = table.find(machine + choice.key);
    if (entry == table.end()) return false;
    cublasLtMatmulHeuristicResult_t result{};
    const cublasStatus_t status =
        cublasLtMatmulAlgoCheck(handle.get(), plan.description.get(), plan.b.get(), plan.a.get(), plan.d.get(),
                                plan.d.get(), &entry->second.algorithm, &result);
    if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > kWorkspaceBytes) {
        std::fprintf(stderr, "warning: %s: the algorithm for %s is not valid here and is ignored\n",
                     &table == &pinned ? "the checkpoint" : options.cache_file.c_str(), choice.key.c_str());
        return false;
    }
    plan.algorithm = entry->second.algorithm;
    choice.algorithm = entry->second.index;
    choice.candidates = entry->second.candidates;
    (&table == &pinned ? choice.pinned : choice.from_cache) = true;
    return true;
}

// Leaves the fastest of `found` in the plan; the first one if there is no memory for operands.
void Gemm::Impl::tune(const GemmShape& shape, Plan& plan, const std::vector<Candidate>& found,
                      GemmChoice& choice) const {
    constexpr float kHopeless = 1.5f;                 // one run this much slower than the best: not looked at again
    constexpr float kLaunchUs = 20;                   // what the host may add to the time of one run
    constexpr float kShortUs = 200, kLongUs = 1000;   // short runs are timed many at once, long ones less often
    TuningBench bench;
    if (!bench.allocate(shape, static_cast<const float*>(one.get()))) {
        std::fprintf(stderr, "warning: gemm %s: no device memory to tune in, takes the heuristic's first algorithm\n",
                     choice.key.c_str());
        return;
    }
    const auto enqueue = [&](const GemmOperands& o, cudaStream_t stream) { return this->enqueue(plan, o, stream); };
    int best = -1;
    for (size_t i = 0; i < found.size(); i++) {
        plan.algorithm = found[i].algorithm;
        if (!bench.time_us(1, enqueue)) continue;  // the first run loads the kernel
        const float once = bench.time_us(1, enqueue).value();
        if (best >= 0 && once > kHopeless * choice.us + kLaunchUs) continue;
        const int calls = once < kShortUs ? std::clamp(int(kShortUs / once), 1, 20) : 1;
        std::array<float, 5> times;
        const size_t rounds = once > kLongUs ? 3 : times.size();
        for (size_t round = 0; round < rounds; round++) times[round] = bench.time_us(calls, enqueue).value();
        std::sort(times.begin(), times.begin() + rounds);
        const float us = times[rounds / 2];
        if (best < 0) choice.first_us = us;
        if (best < 0 || us < choice.us) best = int(i), choice.us = us;
    }
    REQUIRE(best >= 0, "gemm %s: none of cuBLASLt's %zu algorithms runs", choice.key.c_str(), found.size());
    plan.algorithm = found[size_t(best)].algorithm;
    choice.algorithm = best;
}

// ---------------------------------------------------------------------------------------------------------------------

Gemm::Gemm(const Options& options) : impl_(std::make_unique<Impl>()) {
    impl_->options = options;
    cublasLtHandle_t handle = nullptr;
    CUBLAS_CHECK(cublasLtCreate(&handle));
    impl_->handle.reset(handle);
    impl_->workspace = allocate(kWorkspaceBytes);
    impl_->one = allocate(sizeof(float));
    const float one = 1.0f;
    CUDA_CHECK(cudaMemcpy(impl_->one.get(), &one, sizeof one, cudaMemcpyHostToDevice));

    int device = 0;
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    // The number of SMs too: a slice of a GPU has the whole one's name, but other algorithms suit it.
    impl_->machine =
        message("%s, %d SMs\t%zu\t", properties.name, properties.multiProcessorCount, cublasLtGetVersion());
    if (!options.cache_file.empty()) impl_->cache = read_file(options.cache_file);
    std::istringstream pinned(options.pinned);
    impl_->pinned = gemm_choices::read(pinned).table;
}

Gemm::~Gemm() = default;

void Gemm::plan(const GemmShape& shape) {
    if (impl_->plans.contains(shape)) return;
    check_shape(shape);
    GemmChoice choice{.key = shape.key(), .algorithm = 0, .candidates = 0, .us = 0, .first_us = 0, .from_cache = false};
    Plan plan = describe(shape);
    plan.mark = message("gemm %dx%dx%d %s*%s>%s", shape.M, shape.N, shape.K, name_of(shape.a), name_of(shape.b), name_of(shape.d));
    // The library looks at these pointers' alignment when it chooses.
    const void* const one = impl_->one.get();
    set_pointers(plan, {.a_scale = is_fp8(shape.a) ? static_cast<const float*>(one) : nullptr,
                        .b_scale = is_fp8(shape.b) ? static_cast<const float*>(one) : nullptr,
                        .bias = shape.bias ? static_cast<const __nv_bfloat16*>(one) : nullptr});
    const bool pinned = impl_->take_from(impl_->pinned, plan, choice);
    if (!pinned) impl_->unpinned++;
    if (!pinned && !impl_->take_from(impl_->cache, plan, choice)) {
        const auto found = impl_->candidates(shape, plan);
        plan.algorithm = found[0].algorithm;
        choice.candidates = int(found.size());
        if (impl_->options.autotune) impl_->tune(shape, plan, found, choice);
        if (choice.us > 0)  // a choice that was not measured is not worth keeping
            impl_->cache[impl_->machine + choice.key] = {choice.algorithm, choice.candidates, plan.algorithm};
    }
    impl_->record[impl_->machine + choice.key] = {choice.algorithm, choice.candidates, plan.algorithm};
    impl_->plans.emplace(shape, std::move(plan));
    impl_->choices.push_back(std::move(choice));
}

void Gemm::run(const GemmShape& shape, const GemmOperands& operands, cudaStream_t stream) {
    const auto plan = impl_->plans.find(shape);
    REQUIRE(plan != impl_->plans.end(), "gemm %s: this shape was not planned", shape.key().c_str());
    const Mark mark(plan->second.mark.c_str(), cost_of(shape));
    check_operands(shape, operands);
    const cublasStatus_t status = impl_->enqueue(plan->second, operands, stream);
    REQUIRE(status == CUBLAS_STATUS_SUCCESS, "gemm %s failed: %s", shape.key().c_str(),
            cublasLtGetStatusString(status));
}

const std::vector<GemmChoice>& Gemm::choices() const { return impl_->choices; }

void Gemm::save_cache() const {
    const std::string& path = impl_->options.cache_file;
    if (path.empty()) return;
    gemm_choices::Table merged = impl_->cache;
    merged.merge(read_file(path));  // what other processes and machines have written; ours wins
    if (!gemm_choices::write(path, merged))
        std::fprintf(stderr, "warning: %s: cannot be written: %s\n", path.c_str(), std::strerror(errno));
}

std::string Gemm::record() const {
    std::string lines;
    for (const auto& [name, entry] : impl_->record) lines += gemm_choices::line_of(name, entry) + "\n";
    return lines;
}

std::string Gemm::pin_failure() const {
    if (impl_->options.pinned.empty() || impl_->unpinned == 0) return "";
    const std::string recorded = impl_->options.pinned, here = impl_->machine;
    const auto machine_of = [](const std::string& line) {
        const size_t device = line.find('\t'), version = line.find('\t', std::min(device, line.size() - 1) + 1);
        return version == std::string::npos ? "nothing readable" : line.substr(0, device) + ", cuBLASLt " + line.substr(device + 1, version - device - 1);
    };
    return message("%d of %zu GEMM shapes have no algorithm in the record (made on %s; this is %s)", impl_->unpinned, impl_->plans.size(),
                   machine_of(recorded).c_str(), machine_of(here).c_str());
}

size_t Gemm::workspace_bytes() { return kWorkspaceBytes; }
