#include "trainer/parameters.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "trainer/position.h"

namespace {

TEST(Parameters, PublishedCounts) {
    const std::pair<const char*, int64_t> expected[] = {
        {"gpt2-124M", 124'439'808}, {"gpt2-355M", 354'823'168}, {"gpt2-774M", 774'030'080}, {"gpt2-1558M", 1'557'611'200}};
    for (const auto& [name, count] : expected) EXPECT_EQ(make_parameters(find_model(name)).published_count(), count) << name;
}

TEST(Parameters, NamesAreUnique) {
    const ParameterList list = make_parameters(find_model("gpt2-124M"));
    std::set<std::string> names;
    for (const Parameter& p : list.all) names.insert(p.name);
    EXPECT_EQ(names.size(), list.all.size());
    EXPECT_EQ(list.all.size(), 4u + 12 * 12);
    EXPECT_TRUE(names.contains("transformer.h.11.mlp.c_proj.weight"));
}

TEST(Parameters, OffsetsAreAlignedAndDisjoint) {
    for (const ModelSpec& spec : model_table()) {
        const ParameterList list = make_parameters(spec);
        std::vector<Parameter> by_offset = list.all;
        std::sort(by_offset.begin(), by_offset.end(), [](const Parameter& a, const Parameter& b) { return a.offset < b.offset; });
        int64_t end = 0;
        for (const Parameter& p : by_offset) {
            EXPECT_EQ(p.offset % 64, 0) << p.name;
            EXPECT_GE(p.offset, end) << p.name;
            end = p.offset + p.padded_count();
        }
        EXPECT_GE(list.flat_elements, end);
    }
}

// What a step must clear is one range: exactly the gradients that no GEMM writes.
TEST(Parameters, ClearedGradientsAreOneRange) {
    for (const ModelSpec& spec : model_table()) {
        const ParameterList list = make_parameters(spec);
        for (const Parameter& p : list.all) {
            EXPECT_EQ(p.gemm_gradient, p.is_linear || p.name == "transformer.wte.weight") << p.name;
            EXPECT_EQ(p.gemm_gradient, p.offset + p.padded_count() <= list.cleared_from) << p.name;
            EXPECT_EQ(!p.gemm_gradient, p.offset >= list.cleared_from) << p.name;
        }
    }
}

TEST(Position, FirstWritesAndLastCompletes) {
    EXPECT_EQ(position_of(0, 1), Position::only);
    const Position expected[] = {Position::first, Position::middle, Position::middle, Position::last};
    for (int i = 0; i < 4; ++i) EXPECT_EQ(position_of(i, 4), expected[i]) << i;
    for (const int n : {1, 2, 5})
        for (int i = 0; i < n; ++i) {
            EXPECT_EQ(starts_gradients(position_of(i, n)), i == 0) << i << " of " << n;
            EXPECT_EQ(completes_gradients(position_of(i, n)), i == n - 1) << i << " of " << n;
        }
}

TEST(Parameters, OnlyMatricesAndEmbeddingsDecay) {
    const ParameterList list = make_parameters(find_model("tiny"));
    for (const Parameter& p : list.all) EXPECT_EQ(p.decays, !p.name.ends_with(".bias") && p.name.find("ln_") == std::string::npos) << p.name;
    for (const Parameter& p : list.all) EXPECT_EQ(p.is_linear, p.name.find("c_") != std::string::npos && p.name.ends_with(".weight")) << p.name;
}

TEST(Parameters, FileLayoutRoundTrip) {
    const ParameterList list = make_parameters(find_model("tiny"));
    const int parameters[] = {list.wte, list.blocks[0].fc1_weight, list.blocks[0].qkv_bias};
    for (const int index : parameters) {
        const Parameter& p = list[index];
        std::vector<float> file(size_t(p.count())), again(file.size(), NAN), flat(size_t(p.padded_count()), NAN);
        std::iota(file.begin(), file.end(), 1.0f);
        from_file_layout(p, file.data(), flat.data());
        to_file_layout(p, flat.data(), again.data());
        EXPECT_EQ(file, again) << p.name;
        for (int64_t i = p.count(); i < p.padded_count(); ++i) EXPECT_EQ(flat[size_t(i)], 0.0f) << p.name;
    }
}

TEST(Parameters, LinearsLieTransposedInFiles) {
    const ParameterList list = make_parameters(find_model("tiny"));
    const Parameter& p = list[list.blocks[1].fc1_weight];  // (256, 64) in memory, (64, 256) in files
    std::vector<float> flat(size_t(p.count())), file(flat.size());
    std::iota(flat.begin(), flat.end(), 0.0f);
    to_file_layout(p, flat.data(), file.data());
    EXPECT_EQ(file[0 * 256 + 1], flat[1 * 64 + 0]);
    EXPECT_EQ(file[63 * 256 + 200], flat[200 * 64 + 63]);
}

struct Moments {
    double mean, stddev, kurtosis;
};
Moments moments(const float* x, int64_t n) {
    double sum = 0, sum2 = 0, sum4 = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    const double mean = sum / double(n);
    for (int64_t i = 0; i < n; ++i) sum2 += std::pow(x[i] - mean, 2), sum4 += std::pow(x[i] - mean, 4);
    const double variance = sum2 / double(n);
    return {mean, std::sqrt(variance), sum4 / double(n) / (variance * variance)};
}

TEST(Parameters, InitialStatistics) {
    const ModelSpec spec = find_model("mini");
    const ParameterList list = make_parameters(spec);
    const TrainState state = initial_state(list, spec, 1);
    for (const Parameter& p : list.all) {
        const float* x = state.params.data() + p.offset;
        const double n = double(p.count());
        if (p.init == Init::zeros || p.init == Init::ones) {
            const float value = p.init == Init::ones ? 1.0f : 0.0f;
            EXPECT_TRUE(std::all_of(x, x + p.count(), [&](float v) { return v == value; })) << p.name;
            EXPECT_EQ(p.init == Init::ones, p.name.find("ln_") != std::string::npos && p.name.ends_with("weight")) << p.name;
            continue;
        }
        const bool residual = p.name.ends_with("c_proj.weight");
        EXPECT_EQ(p.init == Init::normal_residual, residual) << p.name;
        const double sigma = residual ? 0.02 / std::sqrt(2.0 * spec.n_layers) : 0.02;
        const Moments m = moments(x, p.count());
        // Five standard errors of the mean, the standard deviation and the kurtosis of n normal numbers.
        EXPECT_LE(std::abs(m.mean), 5 * sigma / std::sqrt(n)) << p.name;
        EXPECT_LE(std::abs(m.stddev / sigma - 1), 5 / std::sqrt(2 * n)) << p.name;
        EXPECT_LE(std::abs(m.kurtosis - 3), 5 * std::sqrt(24 / n)) << p.name;
    }
    EXPECT_EQ(state.step, 0);
    EXPECT_EQ(state.adam_t, 0);
    EXPECT_TRUE(state.m.empty() && state.v.empty());
}

std::vector<float> file_values(const Parameter& p, const TrainState& state) {
    std::vector<float> file(size_t(p.count()));
    to_file_layout(p, state.params.data() + p.offset, file.data());
    return file;
}

// The draw of an element depends on seed, name and index in the file alone: neither on the orientation nor on the padding
// in memory, nor on what else the model holds.
TEST(Parameters, DrawsFollowTheFileIndex) {
    const ModelSpec spec = find_model("tiny");
    ParameterList list = make_parameters(spec);
    const TrainState usual = initial_state(list, spec, 7);

    ParameterList other = list;
    other.flat_elements = 0;
    for (Parameter& p : other.all) {
        if (p.file_transposed) std::swap(p.rows, p.cols), p.file_transposed = false, p.padded_rows = p.rows + 3;
        if (p.name == "transformer.wte.weight") p.padded_rows = p.rows;
        p.offset = other.flat_elements;
        other.flat_elements += (p.padded_count() + 63) / 64 * 64;
    }
    const TrainState unusual = initial_state(other, spec, 7);
    for (size_t i = 0; i < list.all.size(); ++i)
        EXPECT_EQ(file_values(list.all[i], usual), file_values(other.all[i], unusual)) << list.all[i].name;
}

TEST(Parameters, PaddingIsZero) {
    const ModelSpec spec = find_model("tiny");
    const ParameterList list = make_parameters(spec);
    const TrainState state = initial_state(list, spec, 7);
    const Parameter& wte = list[list.wte];
    ASSERT_EQ(wte.padded_rows, 384);
    const float* x = state.params.data() + wte.offset;
    for (int64_t i = wte.count(); i < wte.padded_count(); ++i) ASSERT_EQ(x[i], 0.0f);
}

TEST(Parameters, SeedsAndNamesGiveDifferentDraws) {
    const ModelSpec spec = find_model("tiny");
    const ParameterList list = make_parameters(spec);
    const TrainState a = initial_state(list, spec, 1), same = initial_state(list, spec, 1);
    EXPECT_EQ(a.params, same.params);
    const uint64_t others[] = {2, uint64_t(1) << 32 | 1};  // both halves of the seed matter
    for (const uint64_t seed : others) {
        const TrainState b = initial_state(list, spec, seed);
        for (const Parameter& p : list.all) {
            if (p.init != Init::normal) continue;
            EXPECT_NE(file_values(p, a), file_values(p, b)) << p.name << " seed " << seed;
        }
    }
    EXPECT_NE(file_values(list[list.blocks[0].qkv_weight], a), file_values(list[list.blocks[1].qkv_weight], a));
}

}  // namespace
