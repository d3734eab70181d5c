#include "dev/parts/quantize/pieces.h"

#include <bit>
#include <cstring>

#include "dev/parts/quantize/slots.h"
#include "dev/parts/quantize/weights.h"
#include "kernels/quantize.h"
#include "trainer/reference/quantizer.h"

namespace {

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Pieces

// How matrices are cut, and where their codes lie relative to 16 bytes (the master is aligned at a matrix's start).
struct Cuts {
    const char* name;
    int64_t multiple;  // cuts lie on multiples of it ...
    int64_t longest;   // ... and pieces are at most this long
    size_t shift;      // bytes in front of q
};

struct PieceRun {
    std::vector<QuantizePiece> pieces;
    std::vector<bool> covered;  // elements of the flat buffer
};

// Every matrix of the set in pieces of random lengths; every fourth piece belongs to another rank and is left out.
PieceRun cut(const WeightSet& set, const Cuts& cuts, const float* master, uint8_t* q, const QuantSlot* slots) {
    PieceRun run{.pieces = {}, .covered = std::vector<bool>(set.elements, false)};
    int turn = 0;
    for (size_t i = 0; i < set.shapes.size(); i++) {
        const int64_t n = int64_t(set.shapes[i].N) * set.shapes[i].K;
        for (int64_t at = 0, count = 0; at < n; at += count) {
            const int64_t steps = random_ints(1, 1, int(cuts.longest / cuts.multiple) + 1)[0];
            count = std::min(steps * cuts.multiple, n - at);
            if (++turn % 4 == 0) continue;
            const size_t first = set.offsets[i] + size_t(at);
            run.pieces.push_back({.master = master + first, .q = q + first, .slot = slots + i, .count = count, .first_tile = -1});
            std::fill_n(run.covered.begin() + int64_t(first), count, true);
        }
    }
    return run;
}

// A few matrices of every kind, with final scales (1 for the one that holds the rounding edges).
struct PieceInput {
    WeightSet set;
    std::vector<float> master;
    std::vector<QuantSlot> slots;
    std::vector<uint8_t> codes;  // of everything, from the host
};

PieceInput piece_input(Report& report, Dtype format) {
    const std::vector<float> edges = rounding_edges(format);
    std::vector<WeightSet::Shape> shapes = {{1, 1}, {3, 5}, {1, int(edges.size())}, {128, 128}, {130, 257}, {1, 8192}, {1, 8193}, {3, 8191}};
    for (int i = 0; i < 500; i++) shapes.push_back({16 + i % 3, 32});  // more pieces than a block has threads
    if (!report.small_only) shapes.insert(shapes.end(), {{768, 3072}, {1600, 6400}});
    PieceInput in{.set = WeightSet(shapes), .master = {}, .slots = {}, .codes = {}};
    in.master = random_normal(in.set.elements, 0.02f);
    std::copy(edges.begin(), edges.end(), in.master.begin() + int64_t(in.set.offsets[2]));
    in.codes.assign(in.set.elements, 0xff);
    for (size_t i = 0; i < shapes.size(); i++) {
        const size_t first = in.set.offsets[i], n = size_t(shapes[i].N) * size_t(shapes[i].K);
        const float amax = i == 2 ? fp8_max(format) : amax_of({in.master.data() + first, n});
        const float scale = scale_from_amax(amax, format);
        in.slots.push_back({.inv_scale = 1.0f / scale, .scale = scale, .amax_bits = 0, .unused = 0x12345678u});  // amax is not read
        for (size_t at = first; at < first + n; at++) in.codes[at] = encode_fp8(in.master[at] * scale, format);
    }
    return in;
}

void check_cut(Report& report, Dtype format, const PieceInput& in, const Cuts& cuts) {
    const std::string shape = message("%s %s", name_of(format), cuts.name);
    const DeviceBuffer<float> master(in.master);
    DeviceBuffer<uint8_t> q(in.set.elements + cuts.shift);
    const DeviceBuffer<QuantSlot> slots(in.slots);
    PieceRun run = cut(in.set, cuts, master.get(), q.get() + cuts.shift, slots.get());
    const int count = int(run.pieces.size());
    const int64_t tiles = quantize_pieces_plan(run.pieces.data(), count);
    const DeviceBuffer<QuantizePiece> table(run.pieces);
    const DeviceBuffer<uint32_t> skip(std::vector<uint32_t>{1}), keep(std::vector<uint32_t>{0});

    std::vector<uint8_t> expected(q.size(), 0xff);
    quantize_pieces(table.get(), count, tiles, format, skip.get(), nullptr);
    report.expect("pieces skipped", shape, same_bytes(q.download(), expected), "nothing written");
    for (size_t i = 0; i < in.set.elements; i++)
        if (run.covered[i]) expected[cuts.shift + i] = in.codes[i];
    for (const uint32_t* flag : {static_cast<const uint32_t*>(nullptr), static_cast<const uint32_t*>(keep.get())}) {
        q.poison();
        quantize_pieces(table.get(), count, tiles, format, flag, nullptr);
        report.compare_bits(flag ? "pieces, skip 0" : "pieces", message("%s, %d pieces", shape.c_str(), count), q.download(), expected);
    }
    report.expect("pieces: slots, guards", shape, same_bytes(slots.download(), in.slots) && q.guards_intact() && slots.guards_intact() && table.guards_intact(),
                  "as they were");
}

// ---------------------------------------------------------------------------------------------------------------------
// Transposes

struct CodeMatrices {
    WeightSet set;
    DeviceBuffer<uint8_t> q, qt;

    CodeMatrices(const std::vector<WeightSet::Shape>& shapes, const std::vector<uint8_t>& codes) : set(shapes), q(codes), qt(codes.size()) {}
    std::vector<TransposeCodes> table(size_t shift) const {
        std::vector<TransposeCodes> rows;
        for (size_t i = 0; i < set.shapes.size(); i++)
            rows.push_back({.q = q.get() + set.offsets[i] + shift, .qt = qt.get() + set.offsets[i] + shift, .N = set.shapes[i].N, .K = set.shapes[i].K,
                            .first_tile = -1});
        return rows;
    }
};

std::vector<uint8_t> random_bytes(size_t n) {
    std::vector<uint8_t> bytes(n);
    const std::vector<int> values = random_ints(n, 0, 256);
    for (size_t i = 0; i < n; i++) bytes[i] = uint8_t(values[i]);
    return bytes;
}

// `shift` bytes lie in front of the first matrix: an odd number puts every access on the path of single bytes.
void check_transpose(Report& report, const std::vector<WeightSet::Shape>& shapes, size_t shift) {
    const std::string shape = message("%zu matrices, shift %zu", shapes.size(), shift);
    const std::vector<uint8_t> codes = random_bytes(WeightSet(shapes).elements + shift);
    CodeMatrices m(shapes, codes);
    std::vector<TransposeCodes> table = m.table(shift);
    const int count = int(table.size());
    const int64_t tiles = transpose_codes_plan(table.data(), count);
    const DeviceBuffer<TransposeCodes> device_table(table);
    const DeviceBuffer<uint32_t> skip(std::vector<uint32_t>{1}), keep(std::vector<uint32_t>{0});

    std::vector<uint8_t> expected(codes.size(), 0xff);
    transpose_codes(device_table.get(), count, tiles, skip.get(), nullptr);
    report.expect("transposes skipped", shape, same_bytes(m.qt.download(), expected), "nothing written");
    for (size_t i = 0; i < shapes.size(); i++) {
        const size_t first = m.set.offsets[i] + shift, N = size_t(shapes[i].N), K = size_t(shapes[i].K);
        for (size_t n = 0; n < N; n++)
            for (size_t k = 0; k < K; k++) expected[first + k * N + n] = codes[first + n * K + k];
    }
    for (const uint32_t* flag : {static_cast<const uint32_t*>(nullptr), static_cast<const uint32_t*>(keep.get())}) {
        m.qt.poison();
        transpose_codes(device_table.get(), count, tiles, flag, nullptr);
        report.compare_bits(flag ? "transposes, skip 0" : "transposes", shape, m.qt.download(), expected);
    }
    report.expect("transposes: codes, guards", shape, same_bytes(m.q.download(), codes) && m.q.guards_intact() && m.qt.guards_intact(), "as they were");
}

}  // namespace

void check_pieces(Report& report, Dtype format) {
    const PieceInput in = piece_input(report, format);
    for (const Cuts& cuts : {Cuts{"cut as shards are", 512, 20480, 0}, Cuts{"cut anywhere", 1, 20000, 0}, Cuts{"cut at 4, codes at 4", 4, 20000, 4},
                             Cuts{"cut at 16, codes at 3", 16, 20000, 3}})
        check_cut(report, format, in, cuts);
}

void check_scales(Report& report) {
    std::vector<float> amaxes = {0.0f, 1e-40f, 1e-13f, 1e-12f, 1.0f, 3.3e38f};
    for (const float amax : random_uniform(600, 1e-4f, 10.0f)) amaxes.push_back(amax);  // several blocks of threads
    const size_t finite = amaxes.size();
    for (const Dtype format : kFormats)
        for (const float special : {1.0f, kInfinity, kNan}) {
            amaxes.resize(finite), amaxes.push_back(special);
            std::vector<QuantSlot> before;
            for (const float amax : amaxes) before.push_back(measured_slot(amax));
            const DeviceBuffer<QuantSlot> slots(before), without_flag(before);
            const DeviceBuffer<uint32_t> skip(std::vector<uint32_t>{1}), keep(std::vector<uint32_t>{0}), flag(std::vector<uint32_t>{0});
            const int count = int(amaxes.size());
            quantize_scales(slots.get(), count, format, skip.get(), flag.get(), nullptr);
            const bool untouched = same_bytes(slots.download(), before) && flag.download()[0] == 0;
            quantize_scales(slots.get(), count, format, keep.get(), flag.get(), nullptr);
            quantize_scales(without_flag.get(), count, format, nullptr, nullptr, nullptr);
            const std::vector<QuantSlot> after = slots.download();
            size_t right = 0;
            for (size_t i = 0; i < amaxes.size(); i++) right += slot_is_right(after[i], amaxes[i], format);
            report.expect("scales", message("%s, last amax %g", name_of(format), double(special)),
                          untouched && right == amaxes.size() && flag.download()[0] == (std::isfinite(special) ? 0u : 1u) &&
                              same_bytes(without_flag.download(), after) && slots.guards_intact() && flag.guards_intact(),
                          message("%zu of %zu as on the host, flag %u, skipped call %s", right, amaxes.size(), flag.download()[0],
                                  untouched ? "wrote nothing" : "WROTE"));
        }
}

void check_transposes(Report& report) {
    std::vector<WeightSet::Shape> shapes = {{1, 1},     {3, 5},     {16, 16},   {17, 33},  {127, 129}, {128, 128}, {144, 272},
                                            {384, 128}, {130, 257}, {272, 144}, {64, 48},  {1000, 48}, {16, 4096}, {520, 131}};
    check_transpose(report, shapes, 0);
    check_transpose(report, shapes, 16);
    check_transpose(report, shapes, 3);
    for (int i = 0; i < 300; i++) shapes.push_back({16 + i % 3, 32});  // more matrices than a block has threads
    check_transpose(report, shapes, 0);
    if (!report.small_only) check_transpose(report, {{768, 3072}, {2304, 768}, {4800, 1600}, {1600, 6400}}, 0);
}

// Two ranks' pieces (this is the first's half of each block), all scales, and the transposes of all blocks at once, and of one.
void bench_pieces(Report& report, const char* model, int layers, int C) {
    const std::vector<WeightSet::Shape> shapes = block_shapes(layers, C);
    const WeightSet set(shapes);
    const size_t per_block = shapes.size() / size_t(layers), half = set.elements / size_t(layers) / 2;
    const auto master = filled(set.elements, random_normal(size_t(1) << 22, 0.02f));
    const CodeMatrices codes(shapes, std::vector<uint8_t>(set.elements, 0x35));
    std::vector<QuantSlot> final_slots(shapes.size(), measured_slot(0.1f));
    for (QuantSlot& slot : final_slots) slot.scale = 4480.0f, slot.inv_scale = 1 / slot.scale;
    const DeviceBuffer<QuantSlot> slots(final_slots);

    std::vector<QuantizePiece> pieces;
    for (size_t i = 0; i < shapes.size(); i++) {
        const size_t start = set.offsets[i / per_block * per_block], n = size_t(shapes[i].N) * size_t(shapes[i].K);
        const size_t end = std::min(set.offsets[i] + n, start + half);
        if (end <= set.offsets[i]) continue;
        pieces.push_back({.master = master->get() + set.offsets[i], .q = codes.q.get() + set.offsets[i], .slot = slots.get() + i,
                          .count = int64_t(end - set.offsets[i]), .first_tile = -1});
    }
    const int64_t piece_tiles = quantize_pieces_plan(pieces.data(), int(pieces.size()));
    const DeviceBuffer<QuantizePiece> piece_table(pieces);
    report.bench({.name = "quantize_pieces e4m3", .shape = message("%s, half", model), .bytes = 5.0 * double(half) * layers},
                 [&](int, cudaStream_t s) { quantize_pieces(piece_table.get(), int(pieces.size()), piece_tiles, Dtype::e4m3, nullptr, s); });
    report.bench({.name = "quantize_scales", .shape = message("%zu slots", shapes.size())},
                 [&](int, cudaStream_t s) { quantize_scales(slots.get(), int(shapes.size()), Dtype::e4m3, nullptr, nullptr, s); });

    std::vector<TransposeCodes> all = codes.table(0);
    std::vector<int64_t> block_tiles;
    const int64_t tiles = transpose_codes_plan(all.data(), int(all.size()));
    const DeviceBuffer<TransposeCodes> all_table(all);
    report.bench({.name = "transpose_codes", .shape = model, .bytes = 2.0 * double(set.elements)},
                 [&](int, cudaStream_t s) { transpose_codes(all_table.get(), int(all.size()), tiles, nullptr, s); });
    for (size_t block = 0; block < all.size(); block += per_block) block_tiles.push_back(transpose_codes_plan(all.data() + block, int(per_block)));
    const DeviceBuffer<TransposeCodes> block_table(all);
    report.bench({.name = "transpose_codes", .shape = message("%s, one block", model), .bytes = 2.0 * double(set.elements) / layers, .sets = layers},
                 [&](int set_index, cudaStream_t s) {
                     transpose_codes(block_table.get() + size_t(set_index) * per_block, int(per_block), block_tiles[size_t(set_index)], nullptr, s);
                 });
}
