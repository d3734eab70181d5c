#include "dev/parts/attention/arrays.h"

namespace {

std::string error_of(const std::function<void()>& call) {
    try {
        call();
        return "";
    } catch (const Error& error) {
        return error.what();
    }
}

// Of exactly this many bytes, so that what lies behind them is a guard; poisoned.
void* sized(std::optional<DeviceBuffer<uint8_t>>& workspace, size_t bytes) {
    if (!workspace || workspace->size() != bytes) workspace.emplace(bytes);
    else workspace->poison();
    return bytes > 0 ? workspace->get() : nullptr;
}

// The options, or `automatic` if the backend lacks the direction.
AttentionOptions usable(AttentionOptions options, const std::string& obstacle) {
    if (!obstacle.empty()) options.backend = AttentionBackend::automatic;
    return options;
}

}  // namespace

std::string forward_obstacle(const AttentionShape& s, const AttentionOptions& o) {
    return error_of([&] { attention_forward_workspace_bytes(s, o); });
}
std::string backward_obstacle(const AttentionShape& s, const AttentionOptions& o) {
    return error_of([&] { attention_backward_workspace_bytes(s, o); });
}

AttentionArrays::AttentionArrays(const AttentionShape& s, const std::vector<__nv_bfloat16>& qkv_values,
                                 const std::vector<__nv_bfloat16>& dout_values)
    : shape(s), qkv(qkv_values), dout(dout_values), out(elements(s, s.H)), dqkv(qkv.size()), lse(size_t(s.B) * s.H * s.T),
      slots_(2) {}

AttentionForward AttentionArrays::forward_call(const AttentionOptions& o) {
    return {.shape = shape, .qkv = qkv.get(), .out = out.get(), .lse = lse.get(), .amax = nullptr,
            .workspace = sized(forward_workspace_, attention_forward_workspace_bytes(shape, o)), .options = o};
}
AttentionBackward AttentionArrays::backward_call(const AttentionOptions& o) {
    return {.shape = shape, .qkv = qkv.get(), .out = out.get(), .dout = dout.get(), .lse = lse.get(), .dqkv = dqkv.get(),
            .amax = nullptr, .workspace = sized(backward_workspace_, attention_backward_workspace_bytes(shape, o)), .options = o};
}

AttentionResult AttentionArrays::run(const AttentionOptions& options, bool with_amax) {
    out.poison(), dqkv.poison(), lse.poison(), slots_.zero();
    AttentionForward forward = forward_call(usable(options, forward_obstacle(shape, options)));
    AttentionBackward backward = backward_call(usable(options, backward_obstacle(shape, options)));
    if (with_amax) forward.amax = slots_.get(), backward.amax = slots_.get() + 1;
    attention_forward(forward, nullptr);
    attention_backward(backward, nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());

    const bool guards = qkv.guards_intact() && dout.guards_intact() && out.guards_intact() && dqkv.guards_intact() &&
                        lse.guards_intact() && slots_.guards_intact() && forward_workspace_->guards_intact() &&
                        backward_workspace_->guards_intact();
    const std::vector<QuantSlot> slots = slots_.download();
    return {out.download(), dqkv.download(), lse.download(), slots[0].amax_bits, slots[1].amax_bits, guards};
}
