#include "dev/parts/quantize/weights.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "dev/parts/quantize/slots.h"
#include "trainer/reference/quantizer.h"

std::vector<WeightSet::Shape> block_shapes(int layers, int C) {
    std::vector<WeightSet::Shape> shapes;
    for (int layer = 0; layer < layers; layer++)
        shapes.insert(shapes.end(), {{3 * C, C}, {C, C}, {4 * C, C}, {C, 4 * C}});
    return shapes;
}

void check_weights(Report& report, Dtype format) {
    const std::vector<float> edges = rounding_edges(format);
    std::vector<WeightSet::Shape> shapes = {{1, 1},     {16, 16},   {3, 5},     {1, int(edges.size())}, {128, 128},
                                            {384, 128}, {130, 257}, {272, 144}, {64, 48},               {127, 129}};
    constexpr size_t kEdges = 3, kZeros = 8;
    for (int i = 0; i < 300; i++) shapes.push_back({16 + i % 3, 32});  // more tensors than a block has threads
    if (!report.small_only) shapes.insert(shapes.end(), {{768, 3072}, {2304, 768}, {1600, 6400}});
    const WeightSet set(shapes);
    std::vector<float> master = random_normal(set.elements, 0.02f);
    std::copy(edges.begin(), edges.end(), master.begin() + int64_t(set.offsets[kEdges]));
    std::fill_n(master.begin() + int64_t(set.offsets[kZeros]), shapes[kZeros].N * shapes[kZeros].K, 0.0f);

    const DeviceBuffer<float> in(master);
    DeviceBuffer<uint8_t> q(set.elements), qt(set.elements);
    DeviceBuffer<QuantSlot> slots(std::vector<QuantSlot>(shapes.size(), measured_slot(0.0f)));
    std::vector<QuantizeWeight> table = set.table(in.get(), q.get(), qt.get(), slots.get());
    for (const QuantizeWeight& w : table) amax_f32(w.master, int64_t(w.N) * w.K, w.slot, nullptr);
    std::vector<QuantSlot> measured = slots.download();
    measured[kEdges].amax_bits = std::bit_cast<uint32_t>(fp8_max(format));  // scale 1
    slots.upload(measured);
    const int64_t tiles = quantize_weights_plan(table.data(), int(table.size()));
    const DeviceBuffer<QuantizeWeight> device_table(table);
    const DeviceBuffer<uint32_t> skip(std::vector<uint32_t>{1}), keep(std::vector<uint32_t>{0});
    const DeviceBuffer<uint32_t> flag(std::vector<uint32_t>{0});
    const auto run = [&](const uint32_t* skip_flag) {
        quantize_weights(device_table.get(), int(table.size()), tiles, format, skip_flag, flag.get(), nullptr);
    };

    const std::vector<uint8_t> untouched(set.elements, 0xff);
    run(skip.get());
    const std::vector<QuantSlot> slots_skipped = slots.download();
    report.expect("weights skipped", name_of(format),
                  q.download() == untouched && qt.download() == untouched &&
                      std::memcmp(slots_skipped.data(), measured.data(), measured.size() * sizeof(QuantSlot)) == 0,
                  "nothing written");

    std::vector<uint8_t> expected(untouched), expected_transposed(untouched);
    bool slots_right = true;
    for (size_t i = 0; i < shapes.size(); i++) {
        const auto [N, K] = shapes[i];
        const float scale = scale_from_amax(std::bit_cast<float>(measured[i].amax_bits), format);
        for (int n = 0; n < N; n++)
            for (int k = 0; k < K; k++) {
                const size_t at = set.offsets[i] + size_t(n) * K + k;
                expected[at] = encode_fp8(master[at] * scale, format);
                expected_transposed[set.offsets[i] + size_t(k) * N + n] = expected[at];
            }
    }
    for (const bool with_flag : {false, true}) {
        const uint32_t* skip_flag = with_flag ? keep.get() : nullptr;
        q.poison(), qt.poison();
        run(skip_flag);
        const std::string name = skip_flag ? "weights, skip 0," : "weights";
        report.compare_bits(name + " q", name_of(format), q.download(), expected);
        report.compare_bits(name + " qt", name_of(format), qt.download(), expected_transposed);
    }
    const std::vector<QuantSlot> after = slots.download();
    for (size_t i = 0; i < shapes.size(); i++)
        slots_right &= slot_is_right(after[i], std::bit_cast<float>(measured[i].amax_bits), format);
    report.expect("weights slots", name_of(format), slots_right && flag.download()[0] == 0, "scales as on the host");
    report.expect("weights scale of zeros", name_of(format),
                  after[kZeros].scale == float(double(fp8_max(format)) / 1e-12),
                  message("%g", double(after[kZeros].scale)));

    measured[4].amax_bits = std::bit_cast<uint32_t>(kInfinity);
    slots.upload(measured);
    run(nullptr);
    report.expect("weights infinite amax", name_of(format), flag.download()[0] == 1, "raises the flag");
    report.expect("weights guards", name_of(format),
                  q.guards_intact() && qt.guards_intact() && slots.guards_intact() && flag.guards_intact(), "intact");
}

void bench_weights(Report& report, const char* model, int layers, int C) {
    const std::vector<WeightSet::Shape> shapes = block_shapes(layers, C);
    const WeightSet set(shapes);
    const auto master = filled(set.elements, random_normal(size_t(1) << 22, 0.02f));
    DeviceBuffer<uint8_t> q(set.elements), qt(set.elements);
    const DeviceBuffer<QuantSlot> slots(std::vector<QuantSlot>(shapes.size(), measured_slot(0.1f)));
    std::vector<QuantizeWeight> table = set.table(master->get(), q.get(), qt.get(), slots.get());
    const int64_t tiles = quantize_weights_plan(table.data(), int(table.size()));
    const DeviceBuffer<QuantizeWeight> device_table(table);
    report.bench({.name = "quantize_weights e4m3", .shape = model, .bytes = 6.0 * double(set.elements)},
                 [&](int, cudaStream_t s) {
                     quantize_weights(device_table.get(), int(table.size()), tiles, Dtype::e4m3, nullptr, nullptr, s);
                 });
    report.bench({.name = "amax_f32", .shape = model, .bytes = 4.0 * double(set.elements)}, [&](int, cudaStream_t s) {
        amax_f32(master->get(), int64_t(set.elements), slots.get(), s);
    });
}
