// Whole weight matrices: quantize_weights against the host quantizer, bit for bit, and its speed.
#pragma once
#include <utility>
#include <vector>

#include "dev/harness.h"
#include "kernels/quantize.h"

// Matrices in one flat buffer.
struct WeightSet {
    struct Shape {
        int N, K;
    };
    std::vector<Shape> shapes;
    std::vector<size_t> offsets;  // in elements; the gaps are padding that must stay as it is
    size_t elements = 0;
    explicit WeightSet(std::vector<Shape> of) : shapes(std::move(of)) {
        for (const auto [N, K] : shapes) {
            offsets.push_back(elements);
            elements += size_t((int64_t(N) * K + 63) / 64 * 64);
        }
    }
    std::vector<QuantizeWeight> table(const float* master, uint8_t* q, uint8_t* qt, QuantSlot* slots) const {
        std::vector<QuantizeWeight> rows;
        for (size_t i = 0; i < shapes.size(); i++)
            rows.push_back({.master = master + offsets[i], .q = q + offsets[i], .qt = qt + offsets[i],
                            .slot = slots + i, .N = shapes[i].N, .K = shapes[i].K, .first_tile = -1});
        return rows;
    }
};

// The quantized matrices of `layers` blocks of GPT-2.
std::vector<WeightSet::Shape> block_shapes(int layers, int C);

void check_weights(Report& report, Dtype format);
void bench_weights(Report& report, const char* model, int layers, int C);
