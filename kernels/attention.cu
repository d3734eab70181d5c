// Attention: asserts the contract and hands the call to a backend (kernels/attention/).
#include "kernels/attention.h"

#include <span>

#include "kernels/attention/backends.h"
#include "kernels/common/cuda_check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/mark.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The tables of backends. `automatic` takes the first that does not refuse; what follows mma must be asked for by name.

std::string takes_all(const AttentionShape&, const AttentionOptions&) { return ""; }
size_t no_workspace(const AttentionShape&, const AttentionOptions&) { return 0; }

template <class Arguments>
struct Row {
    AttentionBackend id;
    std::string (*refusal)(const AttentionShape&, const AttentionOptions&);
    size_t (*workspace_bytes)(const AttentionShape&, const AttentionOptions&);
    void (*run)(const Arguments&, cudaStream_t);

    const char* name() const { return kAttentionBackendNames[int(id)]; }
};

constexpr Row<AttentionForward> kForward[] = {
    {AttentionBackend::hopper, hopper_attention_forward_refusal, hopper_attention_forward_workspace_bytes, hopper_attention_forward},
    {AttentionBackend::mma, takes_all, no_workspace, mma_attention_forward},
    {AttentionBackend::cudnn, cudnn_attention_forward_refusal, cudnn_attention_forward_workspace_bytes, cudnn_attention_forward},
};
constexpr Row<AttentionBackward> kBackward[] = {
    {AttentionBackend::hopper, hopper_attention_backward_refusal, hopper_attention_backward_workspace_bytes,
     hopper_attention_backward},
    {AttentionBackend::mma, takes_all, mma_attention_backward_workspace_bytes, mma_attention_backward},
    {AttentionBackend::cudnn, cudnn_attention_backward_refusal, cudnn_attention_backward_workspace_bytes, cudnn_attention_backward},
};

std::string describe(const AttentionShape& s) {
    return message("B=%d T=%d H=%d KV=%d head_dim=%d", s.B, s.T, s.H, s.KV, s.head_dim);
}

// The row to use; `reason`, if given, receives why the rows above it are not.
template <class Arguments>
const Row<Arguments>& choose(std::span<const Row<Arguments>> rows, const char* direction, const AttentionShape& shape,
                             const AttentionOptions& options, std::string* reason = nullptr) {
    const AttentionBackend wanted = options.backend;
    std::string refusals;
    for (const Row<Arguments>& row : rows) {
        if (wanted != AttentionBackend::automatic && row.id != wanted) continue;
        const std::string refusal = row.refusal(shape, options);
        if (refusal.empty()) {
            if (reason) *reason = refusals;
            return row;
        }
        refusals += (refusals.empty() ? "" : "; ") + (row.name() + (": " + refusal));
    }
    throw Error(message("attention %s: no backend for %s: %s", direction, describe(shape).c_str(),
                        refusals.empty() ? message("this binary has no %s", kAttentionBackendNames[int(wanted)]).c_str()
                                         : refusals.c_str()));
}
const Row<AttentionForward>& forward_row(const AttentionShape& s, const AttentionOptions& o, std::string* reason = nullptr) {
    return choose<AttentionForward>(kForward, "forward", s, o, reason);
}
const Row<AttentionBackward>& backward_row(const AttentionShape& s, const AttentionOptions& o, std::string* reason = nullptr) {
    return choose<AttentionBackward>(kBackward, "backward", s, o, reason);
}

// ---------------------------------------------------------------------------------------------------------------------
// The contract

void require_shape(const char* name, const AttentionShape& s) {
    REQUIRE(s.B >= 1 && s.T >= 1 && s.KV >= 1 && s.H >= s.KV && s.H % s.KV == 0,
            "%s: B=%d, T=%d must be at least 1 and H=%d a multiple of KV=%d", name, s.B, s.T, s.H, s.KV);
    REQUIRE(s.head_dim >= 8 && s.head_dim <= 256 && s.head_dim % 8 == 0,
            "%s: head_dim=%d must be a multiple of 8, 8..256", name, s.head_dim);
    REQUIRE(s.T < (1 << 30) && ceil_div(s.T, 64) * s.B * s.H < (int64_t(1) << 31) &&
                int64_t(s.H + 2 * s.KV) * s.head_dim < (1 << 24),
            "%s: B=%d x T=%d x H=%d x head_dim=%d is too large", name, s.B, s.T, s.H, s.head_dim);
}

// A product of queries and keys over the causal half: forward does two, backward five.
MarkCost cost_of(const AttentionShape& s, int products) {
    const double rows = double(s.B) * s.T, width = double(s.H) * s.head_dim, packed = double(s.H + 2 * s.KV) * s.head_dim;
    const double passes_of_packed = products == 2 ? 1 : 2, passes_of_out = products == 2 ? 1 : 2;
    return {.flops = products * rows * s.T * width, .bytes = 2 * rows * (packed * passes_of_packed + width * passes_of_out)};
}

struct Pointer {
    const char* name;
    const void* p;
    size_t alignment = 16;
};
void require_aligned(const char* name, std::initializer_list<Pointer> pointers) {
    for (const Pointer& pointer : pointers)
        REQUIRE(pointer.p && reinterpret_cast<uintptr_t>(pointer.p) % pointer.alignment == 0,
                "%s: %s=%p must be a multiple of %zu and not null", name, pointer.name, pointer.p, pointer.alignment);
}

}  // namespace

AttentionBackend attention_backend(const std::string& name) {
    std::string names;
    for (size_t i = 0; i < std::size(kAttentionBackendNames); ++i) {
        if (name == kAttentionBackendNames[i]) return AttentionBackend(i);
        names += (i == 0 ? "" : i + 1 == std::size(kAttentionBackendNames) ? " or " : ", ") + std::string(kAttentionBackendNames[i]);
    }
    throw Error(message("--attention %s: must be %s", name.c_str(), names.c_str()));
}

size_t attention_forward_workspace_bytes(const AttentionShape& s, const AttentionOptions& options) {
    require_shape("attention_forward", s);
    return forward_row(s, options).workspace_bytes(s, options);
}

void attention_forward(const AttentionForward& p, cudaStream_t stream) {
    constexpr const char* kName = "attention_forward";
    const Mark mark(kName, cost_of(p.shape, 2));
    require_shape(kName, p.shape);
    require_aligned(kName, {{"qkv", p.qkv}, {"out", p.out}, {"lse", p.lse}});
    const Row<AttentionForward>& row = forward_row(p.shape, p.options);
    if (row.workspace_bytes(p.shape, p.options) > 0) require_aligned(kName, {{"workspace", p.workspace, 256}});
    row.run(p, stream);
}

size_t attention_backward_workspace_bytes(const AttentionShape& s, const AttentionOptions& options) {
    require_shape("attention_backward", s);
    return backward_row(s, options).workspace_bytes(s, options);
}

void attention_backward(const AttentionBackward& p, cudaStream_t stream) {
    constexpr const char* kName = "attention_backward";
    const Mark mark(kName, cost_of(p.shape, 5));
    require_shape(kName, p.shape);
    require_aligned(kName, {{"qkv", p.qkv}, {"out", p.out}, {"dout", p.dout}, {"lse", p.lse}, {"dqkv", p.dqkv}});
    const Row<AttentionBackward>& row = backward_row(p.shape, p.options);
    if (row.workspace_bytes(p.shape, p.options) > 0) require_aligned(kName, {{"workspace", p.workspace, 256}});
    row.run(p, stream);
}

AttentionChoice attention_choice(const AttentionShape& s, const AttentionOptions& options) {
    require_shape("attention", s);
    std::string forward, backward;
    AttentionChoice choice{.forward = forward_row(s, options, &forward).name(),
                           .backward = backward_row(s, options, &backward).name(), .reason = forward};
    if (!backward.empty() && backward != forward) choice.reason += (forward.empty() ? "backward: " : "; backward: ") + backward;
    return choice;
}
