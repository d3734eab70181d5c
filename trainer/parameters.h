// The one list of a model's parameters. Initialization, optimizer groups, checkpoints and both devices loop over it.
//
// A parameter's identity is its Hugging Face name (GPT2LMHeadModel) and its index in the Hugging Face layout: random
// draws and files use that, so padding or transposing in memory never changes a number. In memory all parameters lie in
// one flat float array at `offset` (a multiple of 64 elements), matrices as (out, in) row-major: first those whose gradient
// a GEMM writes, then the rest, so that what a step must clear is one range.
//
// The first part is cut into units: the tied embedding and head, then each block's matrices (those that FP8 can multiply,
// then those whose dimensions it refuses, if any). A unit is one buffer: gathered in one collective, cut over ranks in
// equal slices (distributed/shard.h). The rest (norms, biases, positions) is replicated on every rank.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "trainer/model_spec.h"

enum class Init : uint8_t { zeros, ones, normal, normal_residual };  // normal: 0.02; residual: 0.02 / sqrt(2 n_layers)

struct Parameter {
    std::string name;       // Hugging Face
    int rows, cols;         // published size; a vector has rows = 1
    int padded_rows;        // rows in memory (token embedding: padded vocabulary); the extra ones are zero
    bool is_vector;         // one-dimensional in files
    bool file_transposed;   // GPT-2's Conv1D stores (in, out)
    bool decays;            // weight decay: matrices and embeddings, not norms and biases
    bool is_linear;         // a block's matmul weight: quantized when the recipe says so
    bool gemm_gradient;     // a GEMM writes the whole gradient; that of the others is only ever added to, so it is cleared
    Init init;
    int64_t offset;         // elements, into the flat arrays

    int64_t count() const { return int64_t(rows) * cols; }
    int64_t padded_count() const { return int64_t(padded_rows) * cols; }
};

struct BlockParameters {  // indices into ParameterList::all
    int ln1_weight, ln1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias;
    int ln2_weight, ln2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};

struct Unit {
    std::vector<int> parameters;  // of one kind: all or none can be multiplied in FP8
    int64_t begin, elements;      // in the flat arrays; elements: a multiple of 512 times the ranks
    bool fits_fp8;                // the embedding never does: its format does not follow the recipe
};

struct ParameterList {
    std::vector<Parameter> all;
    std::vector<BlockParameters> blocks;
    std::vector<Unit> units;                    // in the order of the flat arrays, without gaps, from 0 to cleared_from
    std::vector<std::vector<int>> block_units;  // of each block, indices into units
    int embedding_unit;
    int ranks;              // that units can be cut over
    int wte, wpe, lnf_weight, lnf_bias;
    int64_t flat_elements;  // of each flat array, gaps included
    int64_t cleared_from;   // [cleared_from, flat_elements): the parameters without gemm_gradient

    const Parameter& operator[](int i) const { return all[size_t(i)]; }
    int64_t published_count() const;  // without padding
};
ParameterList make_parameters(const ModelSpec& spec, int ranks = 1);

struct RecentStep {
    int64_t step;  // from 0
    float loss, grad_norm;
};

// What a checkpoint holds and both devices load and save. Flat arrays in the order of ParameterList.
// What one rank holds of the parameters, and where in its flat arrays: of every unit a slice, and all of the rest.
struct HeldPiece {
    int parameter;
    int64_t first, count;  // elements of the parameter, as in memory
    int64_t offset;        // in the rank's flat arrays
};
struct Held {
    std::vector<HeldPiece> pieces;      // in the order of ParameterList::all
    int64_t elements;                   // of each flat array, gaps included
    std::vector<int64_t> unit_offsets;  // of each unit's slice in the rank's flat arrays
    int64_t rest_offset;                // of what is replicated
};
// `list` made for `ranks`. One rank of one holds everything, at the places of the list.
Held held_by(const ParameterList& list, int rank, int ranks);

// What a checkpoint holds and both devices load and save. Flat arrays in the order of ParameterList, or of Held.
struct TrainState {
    std::vector<float> params, m, v;  // m and v may be empty: all zero, as before the first step
    int64_t step = 0;           // steps of data consumed
    int64_t adam_t = 0;         // optimizer updates applied
    int64_t skipped_steps = 0;  // non-finite steps, and outliers
    std::vector<RecentStep> recent;  // oldest first: what outliers are compared with
};

// GPT-2's initialization. Draws are a function of (seed, name, index) alone; uses all cores.
TrainState initial_state(const ParameterList& list, const ModelSpec& spec, uint64_t seed);
TrainState initial_state(const ParameterList& list, const ModelSpec& spec, uint64_t seed, const Held& held);

// Between memory layout and file layout (published size, Hugging Face orientation).
void to_file_layout(const Parameter& p, const float* flat, float* file);
void from_file_layout(const Parameter& p, const float* file, float* flat);
