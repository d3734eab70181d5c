// The dispatch of kernels/attention.cu: what it refuses and how it says so. Needs no GPU.
#include <gtest/gtest.h>

#include "kernels/attention.h"
#include "kernels/common/check.h"

namespace {

std::string error_of(auto&& call) {
    try {
        call();
        return "no error";
    } catch (const Error& error) {
        return error.what();
    }
}
constexpr AttentionShape kGood{.B = 2, .T = 48, .H = 4, .KV = 2, .head_dim = 64};
constexpr AttentionOptions kMma{.backend = AttentionBackend::mma};

TEST(Attention, ABackendIsFoundByItsName) {
    EXPECT_EQ(attention_backend("auto"), AttentionBackend::automatic);
    for (const AttentionBackend b : {AttentionBackend::hopper, AttentionBackend::mma, AttentionBackend::cudnn})
        EXPECT_EQ(attention_backend(kAttentionBackendNames[int(b)]), b);
    EXPECT_EQ(error_of([] { attention_backend("flash"); }), "--attention flash: must be auto, hopper, mma or cudnn");
}

TEST(Attention, UnsupportedShapesAreRefusedWithTheValues) {
    struct Case {
        AttentionShape shape;
        const char* value;
    };
    const Case cases[] = {
        {{.B = 0, .T = 48, .H = 4, .KV = 2, .head_dim = 64}, "B=0"},    {{.B = 2, .T = 0, .H = 4, .KV = 2, .head_dim = 64}, "T=0"},
        {{.B = 2, .T = 48, .H = 5, .KV = 2, .head_dim = 64}, "H=5"},    {{.B = 2, .T = 48, .H = 2, .KV = 4, .head_dim = 64}, "KV=4"},
        {{.B = 2, .T = 48, .H = 4, .KV = 2, .head_dim = 7}, "head_dim=7"}, {{.B = 2, .T = 48, .H = 4, .KV = 2, .head_dim = 264}, "head_dim=264"},
        {{.B = 2, .T = 1 << 30, .H = 4, .KV = 2, .head_dim = 64}, "T=1073741824"},
    };
    for (const Case& c : cases) {
        EXPECT_NE(error_of([&] { attention_forward_workspace_bytes(c.shape, kMma); }).find(c.value), std::string::npos) << c.value;
        EXPECT_NE(error_of([&] { attention_backward_workspace_bytes(c.shape, kMma); }).find(c.value), std::string::npos) << c.value;
        EXPECT_NE(error_of([&] { attention_forward({.shape = c.shape}, nullptr); }).find(c.value), std::string::npos) << c.value;
        EXPECT_NE(error_of([&] { attention_backward({.shape = c.shape}, nullptr); }).find(c.value), std::string::npos) << c.value;
    }
}

TEST(Attention, PointersThatAreNullOrUnalignedAreRefusedByName) {
    alignas(256) static char memory[512];
    auto* bf16 = reinterpret_cast<__nv_bfloat16*>(memory);
    auto* lse = reinterpret_cast<float*>(memory);
    const auto forward = [&](AttentionForward p) { return error_of([&] { attention_forward(p, nullptr); }); };
    EXPECT_TRUE(forward({.shape = kGood, .out = bf16, .lse = lse, .options = kMma}).starts_with("attention_forward: qkv="));
    EXPECT_TRUE(forward({.shape = kGood, .qkv = bf16, .out = bf16 + 1, .lse = lse, .options = kMma}).starts_with("attention_forward: out="));
    const auto backward = [&](AttentionBackward p) { return error_of([&] { attention_backward(p, nullptr); }); };
    EXPECT_TRUE(backward({.shape = kGood, .qkv = bf16, .out = bf16, .dout = bf16, .lse = lse, .workspace = memory, .options = kMma}).starts_with("attention_backward: dqkv="));
    EXPECT_TRUE(backward({.shape = kGood, .qkv = bf16, .out = bf16, .dout = bf16, .lse = lse, .dqkv = bf16, .workspace = memory + 16, .options = kMma})
                    .starts_with("attention_backward: workspace="));
}

TEST(Attention, TheChoiceNamesBothDirections) {
    const AttentionChoice choice = attention_choice(kGood, kMma);
    EXPECT_EQ(choice.forward, "mma");
    EXPECT_EQ(choice.backward, "mma");
    EXPECT_EQ(choice.reason, "");
}

}  // namespace
