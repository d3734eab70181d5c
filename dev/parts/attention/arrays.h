// One shape's inputs and outputs on the device, and a run of one backend over them.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "dev/harness.h"
#include "kernels/attention.h"

inline int packed_heads(const AttentionShape& s) { return s.H + 2 * s.KV; }
inline size_t elements(const AttentionShape& s, int heads) { return size_t(s.B) * s.T * heads * s.head_dim; }
inline std::string describe(const AttentionShape& s) { return message("B%d H%d/%d T%d D%d", s.B, s.H, s.KV, s.T, s.head_dim); }

inline const char* name_of(AttentionBackend backend) { return kAttentionBackendNames[int(backend)]; }

// Why the backend does not run this shape here, or "".
std::string forward_obstacle(const AttentionShape& shape, const AttentionOptions& options);
std::string backward_obstacle(const AttentionShape& shape, const AttentionOptions& options);

struct AttentionResult {
    std::vector<__nv_bfloat16> out, dqkv;
    std::vector<float> lse;
    uint32_t out_amax = 0, dqkv_amax = 0;  // bits
    bool guards_intact = false;
};

class AttentionArrays {
  public:
    AttentionArrays(const AttentionShape& shape, const std::vector<__nv_bfloat16>& qkv, const std::vector<__nv_bfloat16>& dout);

    // Poisons all outputs, then runs both directions. A backend that lacks one is stood in for by `automatic`.
    AttentionResult run(const AttentionOptions& options, bool with_amax);

    // The calls alone, for timing.
    AttentionForward forward_call(const AttentionOptions& options);
    AttentionBackward backward_call(const AttentionOptions& options);

    const AttentionShape shape;
    const DeviceBuffer<__nv_bfloat16> qkv, dout;
    DeviceBuffer<__nv_bfloat16> out, dqkv;
    DeviceBuffer<float> lse;

  private:
    using Workspace = std::optional<DeviceBuffer<uint8_t>>;

    DeviceBuffer<QuantSlot> slots_;  // of out, of dqkv
    Workspace forward_workspace_, backward_workspace_;
};
