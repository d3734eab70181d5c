// Causal attention by cuDNN: its SDPA graphs on the packed arrays in place, through strides. The baseline that our own
// backends are measured against.
//
// Sources: cuDNN's graph API by way of the header-only cudnn-frontend. libcudnn is opened at run time, when this backend is
// first asked for: a binary that never is needs none. What cannot be used is told by the refusal, never by a crash.
//
// A graph is planned once a shape, direction, mode and device, when its workspace or its refusal is first asked for: so
// ask before a capture. Its backward adds dQ with atomics unless asked to be deterministic; then it keeps all of dP,
// 2 * B * H * T^2 bytes, in its workspace.
#include "kernels/attention/backends.h"
#include "kernels/common/cuda_check.h"

// The Makefile says which headers are here; without both this file holds refusals.
#if !defined(TRAIN_GPT_CUDNN) || !defined(TRAIN_GPT_CUDNN_FRONTEND)

namespace {
std::string missing() {
    return "this binary was built without the headers of cuDNN or of cudnn-frontend: `make cudnn-frontend`, then `make` says what is missing";
}
}  // namespace

std::string cudnn_attention_forward_refusal(const AttentionShape&, const AttentionOptions&) { return missing(); }
size_t cudnn_attention_forward_workspace_bytes(const AttentionShape&, const AttentionOptions&) { throw Error(missing()); }
void cudnn_attention_forward(const AttentionForward&, cudaStream_t) { throw Error(missing()); }
std::string cudnn_attention_backward_refusal(const AttentionShape&, const AttentionOptions&) { return missing(); }
size_t cudnn_attention_backward_workspace_bytes(const AttentionShape&, const AttentionOptions&) { throw Error(missing()); }
void cudnn_attention_backward(const AttentionBackward&, cudaStream_t) { throw Error(missing()); }

#else

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // where the frontend, under dynamic loading, looks its functions up
}

namespace {

namespace fe = cudnn_frontend;
using fe::graph::Tensor_attributes;

// ---------------------------------------------------------------------------------------------------------------------
// The library

std::string cudnn_library() { return message("libcudnn.so.%d", CUDNN_MAJOR); }

// Opens libcudnn at the first call. Returns "" or what is in the way.
const std::string& library_obstacle() {
    static const std::string obstacle = []() -> std::string {
        // The frontend would take the runtime of another CUDA major version if it saw one first
        setenv("CUDNN_FRONTEND_CUDART_LIB_NAME", message("libcudart.so.%d", CUDART_VERSION / 1000).c_str(), 0);
        fe::cudnn_dlhandle = dlopen(cudnn_library().c_str(), RTLD_NOW | RTLD_GLOBAL);
        if (fe::cudnn_dlhandle) return "";
        return cudnn_library() + " cannot be opened (" + dlerror() + "): install cuDNN or name its folder in LD_LIBRARY_PATH";
    }();
    return obstacle;
}

void check(cudnnStatus_t status, const char* what) {
    if (status == CUDNN_STATUS_SUCCESS) return;
    throw Error(message("%s failed: cuDNN status %d: %s", what, int(status), fe::detail::get_last_error_string_().c_str()));
}
void check(fe::error_t error, const char* what) {
    if (error.is_bad()) throw Error(message("%s failed: %s", what, error.get_message().c_str()));
}

// One for every device, for the life of the process.
cudnnHandle_t handle_of(int device) {
    static std::map<int, cudnnHandle_t> handles;
    cudnnHandle_t& handle = handles[device];
    if (!handle) check(fe::detail::create_handle(&handle), "cudnnCreate");
    return handle;
}
int current_device() {
    int device;
    CUDA_CHECK(cudaGetDevice(&device));
    return device;
}

// ---------------------------------------------------------------------------------------------------------------------
// Graphs

enum Uid : int64_t { kQ = 1, kK, kV, kO, kStats, kDO, kDQ, kDK, kDV };

// A (B, heads, T, head_dim) view of rows of `row_heads` heads each; the pointer picks the first head.
Tensor_attributes heads_of_rows(Uid uid, const AttentionShape& s, int heads, int row_heads) {
    const int64_t row = int64_t(row_heads) * s.head_dim;
    return Tensor_attributes().set_uid(uid).set_dim({s.B, heads, s.T, s.head_dim}).set_stride({s.T * row, s.head_dim, row, 1});
}
Tensor_attributes statistics(Uid uid, const AttentionShape& s) {
    return Tensor_attributes().set_uid(uid).set_dim({s.B, s.H, s.T, 1}).set_stride({int64_t(s.H) * s.T, s.T, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT);
}
void make_output(const std::shared_ptr<Tensor_attributes>& tensor, const Tensor_attributes& layout) {
    tensor->set_output(true).set_uid(layout.get_uid()).set_dim(layout.get_dim()).set_stride(layout.get_stride());
    tensor->set_data_type(layout.get_data_type());
}

float score_scale(const AttentionShape& s) { return float(1.0 / std::sqrt(double(s.head_dim))); }

void add_forward(fe::graph::Graph& graph, const AttentionShape& s) {
    const int row = s.H + 2 * s.KV;
    const auto q = graph.tensor(heads_of_rows(kQ, s, s.H, row));
    const auto k = graph.tensor(heads_of_rows(kK, s, s.KV, row)), v = graph.tensor(heads_of_rows(kV, s, s.KV, row));
    auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true).set_causal_mask(true)
                       .set_attn_scale(score_scale(s));
    const auto [out, stats] = graph.sdpa(q, k, v, options);
    make_output(out, heads_of_rows(kO, s, s.H, s.H).set_data_type(fe::DataType_t::BFLOAT16));
    make_output(stats, statistics(kStats, s));
}

void add_backward(fe::graph::Graph& graph, const AttentionShape& s, bool deterministic) {
    const int row = s.H + 2 * s.KV;
    const auto q = graph.tensor(heads_of_rows(kQ, s, s.H, row));
    const auto k = graph.tensor(heads_of_rows(kK, s, s.KV, row)), v = graph.tensor(heads_of_rows(kV, s, s.KV, row));
    const auto o = graph.tensor(heads_of_rows(kO, s, s.H, s.H)), d_o = graph.tensor(heads_of_rows(kDO, s, s.H, s.H));
    const auto stats = graph.tensor(statistics(kStats, s));
    auto options = fe::graph::SDPA_backward_attributes().set_name("attention_backward").set_causal_mask(true)
                       .set_attn_scale(score_scale(s)).set_deterministic_algorithm(deterministic);
    const auto [dq, dk, dv] = graph.sdpa_backward(q, k, v, o, d_o, stats, options);
    make_output(dq, heads_of_rows(kDQ, s, s.H, row).set_data_type(fe::DataType_t::BFLOAT16));
    make_output(dk, heads_of_rows(kDK, s, s.KV, row).set_data_type(fe::DataType_t::BFLOAT16));
    make_output(dv, heads_of_rows(kDV, s, s.KV, row).set_data_type(fe::DataType_t::BFLOAT16));
}

// ---------------------------------------------------------------------------------------------------------------------
// Plans

enum class Direction { forward, backward, backward_deterministic };

struct Plan {
    fe::graph::Graph graph;
    int64_t workspace_bytes = 0;
    std::string refusal;
};

std::unique_ptr<Plan> make_plan(const AttentionShape& s, Direction direction, int device) {
    auto plan = std::make_unique<Plan>();
    plan->refusal = library_obstacle();
    if (!plan->refusal.empty()) return plan;
    fe::graph::Graph& graph = plan->graph;
    graph.set_io_data_type(fe::DataType_t::BFLOAT16).set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    if (direction == Direction::forward) add_forward(graph, s);
    else add_backward(graph, s, direction == Direction::backward_deterministic);
    fe::error_t error = graph.build(handle_of(device), {fe::HeurMode_t::A});
    if (error.is_good()) error = graph.get_workspace_size(plan->workspace_bytes);
    if (error.is_bad()) plan->refusal = message("cuDNN %s: %s", fe::detail::get_backend_version_string().c_str(), error.get_message().c_str());
    return plan;
}

Plan& plan_of(const AttentionShape& s, Direction direction) {
    static std::map<std::array<int, 7>, std::unique_ptr<Plan>> plans;
    const int device = current_device();
    std::unique_ptr<Plan>& plan = plans[{device, int(direction), s.B, s.T, s.H, s.KV, s.head_dim}];
    if (!plan) plan = make_plan(s, direction, device);
    return *plan;
}
Direction backward_direction(const AttentionOptions& o) {
    return o.deterministic ? Direction::backward_deterministic : Direction::backward;
}

void execute(const Plan& plan, std::unordered_map<int64_t, void*> pointers, void* workspace, cudaStream_t stream) {
    const cudnnHandle_t handle = handle_of(current_device());
    check(fe::detail::set_stream(handle, stream), "cudnnSetStream");
    check(plan.graph.execute(handle, pointers, workspace), "cuDNN attention");
}

// Where the query, key and value heads of packed rows begin. cuDNN takes pointers to void, also for what it only reads.
struct PackedHeads {
    void *q, *k, *v;

    PackedHeads(const __nv_bfloat16* packed, const AttentionShape& s)
        : q(const_cast<__nv_bfloat16*>(packed)), k(static_cast<__nv_bfloat16*>(q) + s.H * s.head_dim),
          v(static_cast<__nv_bfloat16*>(k) + s.KV * s.head_dim) {}
};
void* as_void(const void* p) { return const_cast<void*>(p); }

}  // namespace

std::string cudnn_attention_forward_refusal(const AttentionShape& s, const AttentionOptions&) {
    return plan_of(s, Direction::forward).refusal;
}
size_t cudnn_attention_forward_workspace_bytes(const AttentionShape& s, const AttentionOptions&) {
    return size_t(plan_of(s, Direction::forward).workspace_bytes);
}
void cudnn_attention_forward(const AttentionForward& p, cudaStream_t stream) {
    const AttentionShape& s = p.shape;
    const PackedHeads in(p.qkv, s);
    execute(plan_of(s, Direction::forward), {{kQ, in.q}, {kK, in.k}, {kV, in.v}, {kO, p.out}, {kStats, p.lse}}, p.workspace, stream);
    if (p.amax) attention_amax(p.out, int64_t(s.B) * s.T * s.H * s.head_dim, p.amax, stream);
}

std::string cudnn_attention_backward_refusal(const AttentionShape& s, const AttentionOptions& o) {
    return plan_of(s, backward_direction(o)).refusal;
}
size_t cudnn_attention_backward_workspace_bytes(const AttentionShape& s, const AttentionOptions& o) {
    return size_t(plan_of(s, backward_direction(o)).workspace_bytes);
}
void cudnn_attention_backward(const AttentionBackward& p, cudaStream_t stream) {
    const AttentionShape& s = p.shape;
    const PackedHeads in(p.qkv, s), gradient(p.dqkv, s);
    execute(plan_of(s, backward_direction(p.options)),
            {{kQ, in.q}, {kK, in.k}, {kV, in.v}, {kO, as_void(p.out)}, {kDO, as_void(p.dout)}, {kStats, as_void(p.lse)},
             {kDQ, gradient.q}, {kDK, gradient.k}, {kDV, gradient.v}},
            p.workspace, stream);
    if (p.amax) attention_amax(p.dqkv, int64_t(s.B) * s.T * (s.H + 2 * s.KV) * s.head_dim, p.amax, stream);
}

#endif
