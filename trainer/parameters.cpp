#include "trainer/parameters.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/common/check.h"
#include "trainer/philox.h"
#include "trainer/distributed/shard.h"
#include "trainer/recipe.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Building the list

class ListBuilder {
  public:
    explicit ListBuilder(ParameterList& list) : list_(list) {}

    int linear(const std::string& name, int out, int in, Init init) {
        return add({.name = name, .rows = out, .cols = in, .padded_rows = out, .is_vector = false, .file_transposed = true,
                    .decays = true, .is_linear = true, .gemm_gradient = true, .init = init, .offset = 0});
    }
    int embedding(const std::string& name, int rows, int cols, int padded_rows, bool is_head) {
        return add({.name = name, .rows = rows, .cols = cols, .padded_rows = padded_rows, .is_vector = false,
                    .file_transposed = false, .decays = true, .is_linear = false, .gemm_gradient = is_head, .init = Init::normal, .offset = 0});
    }
    int vector(const std::string& name, int n, Init init) {
        return add({.name = name, .rows = 1, .cols = n, .padded_rows = 1, .is_vector = true, .file_transposed = false,
                    .decays = false, .is_linear = false, .gemm_gradient = false, .init = init, .offset = 0});
    }

  private:
    int add(Parameter p) {
        list_.all.push_back(std::move(p));
        return int(list_.all.size()) - 1;
    }
    ParameterList& list_;
};

BlockParameters add_block(ListBuilder& add, const ModelSpec& s, int layer) {
    const std::string prefix = "transformer.h." + std::to_string(layer) + ".";
    return {
        .ln1_weight = add.vector(prefix + "ln_1.weight", s.dim, Init::ones),
        .ln1_bias = add.vector(prefix + "ln_1.bias", s.dim, Init::zeros),
        .qkv_weight = add.linear(prefix + "attn.c_attn.weight", 3 * s.dim, s.dim, Init::normal),
        .qkv_bias = add.vector(prefix + "attn.c_attn.bias", 3 * s.dim, Init::zeros),
        .proj_weight = add.linear(prefix + "attn.c_proj.weight", s.dim, s.dim, Init::normal_residual),
        .proj_bias = add.vector(prefix + "attn.c_proj.bias", s.dim, Init::zeros),
        .ln2_weight = add.vector(prefix + "ln_2.weight", s.dim, Init::ones),
        .ln2_bias = add.vector(prefix + "ln_2.bias", s.dim, Init::zeros),
        .fc1_weight = add.linear(prefix + "mlp.c_fc.weight", s.ffn_dim, s.dim, Init::normal),
        .fc1_bias = add.vector(prefix + "mlp.c_fc.bias", s.ffn_dim, Init::zeros),
        .fc2_weight = add.linear(prefix + "mlp.c_proj.weight", s.dim, s.ffn_dim, Init::normal_residual),
        .fc2_bias = add.vector(prefix + "mlp.c_proj.bias", s.dim, Init::zeros),
    };
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers: key = seed, counter = (index, hash of the name)

uint64_t fnv1a(const std::string& text) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const unsigned char c : text) hash = (hash ^ c) * 0x100000001b3u;
    return hash;
}

// Box-Muller: elements 4i..4i+3 of the file layout from one Philox block.
void four_normals(const Philox& random, uint64_t name_hash, int64_t block, float out[4]) {
    const Philox::Block bits = random.at(uint64_t(block), name_hash);
    for (int pair = 0; pair < 2; ++pair) {
        const float u = (float(bits.x[2 * pair] >> 8) + 0.5f) * 0x1p-24f;  // in (0, 1)
        const float angle = 2 * std::numbers::pi_v<float> * float(bits.x[2 * pair + 1] >> 8) * 0x1p-24f;
        const float radius = std::sqrt(-2 * std::log(u));
        out[2 * pair] = radius * std::cos(angle);
        out[2 * pair + 1] = radius * std::sin(angle);
    }
}

void fill_normal(const Parameter& p, float stddev, uint64_t seed, float* flat) {
    const Philox random{uint32_t(seed), uint32_t(seed >> 32)};
    const uint64_t name_hash = fnv1a(p.name);
    const int64_t n = p.count();
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (n + 3) / 4; ++block) {
        float draws[4];
        four_normals(random, name_hash, block, draws);
        for (int64_t i = 4 * block; i < std::min(n, 4 * block + 4); ++i) {
            const int64_t row = i / p.rows, col = i % p.rows;  // of the (in, out) file layout
            flat[p.file_transposed ? col * p.cols + row : i] = stddev * draws[i - 4 * block];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Places in the flat arrays

class Layout {
  public:
    explicit Layout(ParameterList& list) : list_(list) {}

    int add_unit(const std::vector<int>& parameters, bool fits_fp8) {
        Unit unit{.parameters = parameters, .begin = list_.flat_elements, .elements = 0, .fits_fp8 = fits_fp8};
        for (const int i : parameters) place(list_.all[size_t(i)]);
        unit.elements = padded_elements(list_.flat_elements - unit.begin, list_.ranks);
        list_.flat_elements = unit.begin + unit.elements;
        list_.units.push_back(unit);
        return int(list_.units.size()) - 1;
    }
    void add_rest() {
        list_.cleared_from = list_.flat_elements;
        for (Parameter& p : list_.all)
            if (!p.gemm_gradient) place(p);
    }

  private:
    void place(Parameter& p) {
        p.offset = list_.flat_elements;
        list_.flat_elements += (p.padded_count() + 63) / 64 * 64;
    }
    ParameterList& list_;
};

void lay_out(ParameterList& list) {
    Layout layout(list);
    list.embedding_unit = layout.add_unit({list.wte}, false);
    for (const BlockParameters& b : list.blocks) {
        std::vector<int>& units = list.block_units.emplace_back();
        for (const bool fits : {true, false}) {
            std::vector<int> matrices;
            for (const int i : {b.qkv_weight, b.proj_weight, b.fc1_weight, b.fc2_weight})
                if (fp8_obstacle(list[i].rows, list[i].cols).empty() == fits) matrices.push_back(i);
            if (!matrices.empty()) units.push_back(layout.add_unit(matrices, fits));
        }
    }
    layout.add_rest();
}

}  // namespace

int64_t ParameterList::published_count() const {
    int64_t n = 0;
    for (const Parameter& p : all) n += p.count();
    return n;
}

ParameterList make_parameters(const ModelSpec& s, int ranks) {
    ParameterList list{};
    list.ranks = ranks;
    ListBuilder add(list);
    list.wte = add.embedding("transformer.wte.weight", s.vocab_size, s.dim, s.padded_vocab(), true);  // tied: also the head
    list.wpe = add.embedding("transformer.wpe.weight", s.seq_len, s.dim, s.seq_len, false);
    for (int layer = 0; layer < s.n_layers; ++layer) list.blocks.push_back(add_block(add, s, layer));
    list.lnf_weight = add.vector("transformer.ln_f.weight", s.dim, Init::ones);
    list.lnf_bias = add.vector("transformer.ln_f.bias", s.dim, Init::zeros);
    lay_out(list);
    return list;
}

Held held_by(const ParameterList& list, int rank, int ranks) {
    REQUIRE(ranks == list.ranks, "held_by: a list made for %d ranks, asked for %d", list.ranks, ranks);
    Held held{};
    for (const Unit& unit : list.units) {
        held.unit_offsets.push_back(held.elements);
        const Range slice = slice_range(unit.elements, rank, ranks);
        std::vector<Range> places;
        for (const int i : unit.parameters) places.push_back({list[i].offset - unit.begin, list[i].offset - unit.begin + list[i].padded_count()});
        for (const Piece& p : pieces_in(places, slice))
            held.pieces.push_back({.parameter = unit.parameters[size_t(p.tensor)], .first = p.first, .count = p.count, .offset = held.elements + p.offset});
        held.elements += slice.size();
    }
    held.rest_offset = held.elements;
    for (size_t i = 0; i < list.all.size(); ++i) {
        const Parameter& p = list.all[i];
        if (!p.gemm_gradient)
            held.pieces.push_back({.parameter = int(i), .first = 0, .count = p.padded_count(), .offset = held.rest_offset + p.offset - list.cleared_from});
    }
    held.elements += list.flat_elements - list.cleared_from;
    std::stable_sort(held.pieces.begin(), held.pieces.end(), [](const HeldPiece& a, const HeldPiece& b) { return a.parameter < b.parameter; });
    return held;
}

namespace {

void initialize(const Parameter& p, const ModelSpec& spec, uint64_t seed, float* flat) {
    const float residual = 0.02f / std::sqrt(2.0f * float(spec.n_layers));  // Radford et al. 2019, section 2.3
    switch (p.init) {
        case Init::zeros: break;
        case Init::ones: std::fill_n(flat, p.count(), 1.0f); break;
        case Init::normal: fill_normal(p, 0.02f, seed, flat); break;
        case Init::normal_residual: fill_normal(p, residual, seed, flat); break;
    }
}

}  // namespace

TrainState initial_state(const ParameterList& list, const ModelSpec& spec, uint64_t seed) {
    TrainState state;
    state.params.assign(size_t(list.flat_elements), 0.0f);
    for (const Parameter& p : list.all) initialize(p, spec, seed, state.params.data() + p.offset);
    return state;
}

// A piece in memory is not one of the file that the draws follow: draws a whole parameter, one at a time, and keeps the piece.
TrainState initial_state(const ParameterList& list, const ModelSpec& spec, uint64_t seed, const Held& held) {
    TrainState state;
    state.params.assign(size_t(held.elements), 0.0f);
    std::vector<float> whole;
    for (const HeldPiece& piece : held.pieces) {
        const Parameter& p = list[piece.parameter];
        whole.assign(size_t(p.padded_count()), 0.0f);
        initialize(p, spec, seed, whole.data());
        std::copy_n(whole.begin() + piece.first, piece.count, state.params.begin() + piece.offset);
    }
    return state;
}

// Both copy row by row of the file, so that a 40-million-element matrix stays friendly to one side's cache at least.
void to_file_layout(const Parameter& p, const float* flat, float* file) {
    if (!p.file_transposed) {
        std::copy_n(flat, p.count(), file);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int in = 0; in < p.cols; ++in)
        for (int out = 0; out < p.rows; ++out) file[int64_t(in) * p.rows + out] = flat[int64_t(out) * p.cols + in];
}

void from_file_layout(const Parameter& p, const float* file, float* flat) {
    std::fill_n(flat, p.padded_count(), 0.0f);
    if (!p.file_transposed) {
        std::copy_n(file, p.count(), flat);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int out = 0; out < p.rows; ++out)
        for (int in = 0; in < p.cols; ++in) flat[int64_t(out) * p.cols + in] = file[int64_t(in) * p.rows + out];
}
