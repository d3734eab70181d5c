// Checkpoints: a folder OUT/step_000123 (123 finished steps) with
//   params.safetensors  parameters under their Hugging Face names, in published sizes and orientation, F32
//   adam.safetensors    adam.m.NAME and adam.v.NAME, likewise
//   checkpoint.json     everything else, and sizes and checksums of the other two, and its own; written last
// It is written under a hidden name and renamed when it is complete and on the disk. Nothing in it depends on padding or
// on the device that trained.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "trainer/model_spec.h"
#include "trainer/parameters.h"

struct CheckpointInfo {
    ModelSpec model;
    std::string recipe;
    uint64_t seed = 0;
    int64_t tokens_per_step = 0;
    int64_t samples_per_epoch = 0;  // of the training data: another number means another order of another text
    uint64_t data_hash = 0;  // of the training data, DataLoader::hash(); 0: not known
    std::string tokenizer = "unknown";  // of the training data
    std::string config_toml;
    std::string gemm_choices;  // Engine::gemm_choices(), opaque here
};

struct Checkpoint {
    CheckpointInfo info;
    TrainState state;
};

// Returns the new folder. One of the same step is replaced. Empty moments are saved as the zeros they stand for.
std::string save_checkpoint(const std::string& out_dir, const CheckpointInfo& info, const ParameterList& list,
                            const TrainState& state);

// The same by several ranks in parallel, each writing a part of what it holds into the same files, which do not depend on the
// number of ranks. Between the phases all ranks must have finished the one before.
//
//   begin_checkpoint      one rank: the hidden folder and its files, without data
//   write_part            every rank; returns what it wrote
//   complete_checkpoint   one rank, with the sum of what was written: checks that the parts are the whole, writes checkpoint.json, renames; or, when a phase failed,
//   abandon_checkpoint    one rank: removes the hidden folder
struct PartOfRank {  // of what several ranks hold alike, each writes one part
    int replica, replicas;  // of a slice
    int rank, ranks;        // of what every rank holds
};
struct WrittenPart {
    int64_t elements = 0;
    std::vector<uint64_t> checksums = {};  // of each tensor of both files: those of all parts add up to the whole's

    WrittenPart& operator+=(const WrittenPart& other);
};
std::string format_part(const WrittenPart& part);  // one line, to travel between ranks
WrittenPart parse_part(const std::string& text);
void begin_checkpoint(const std::string& out_dir, const ParameterList& list, int64_t step);
WrittenPart write_part(const std::string& out_dir, const ParameterList& list, const Held& held, const PartOfRank& part, const TrainState& state);
std::string complete_checkpoint(const std::string& out_dir, const CheckpointInfo& info, const ParameterList& list, const TrainState& state,
                                const WrittenPart& whole);
void abandon_checkpoint(const std::string& out_dir, int64_t step);

// Removes all complete checkpoints but the `keep` that were saved last; keep <= 0 removes none.
void prune_checkpoints(const std::string& out_dir, int keep);

// The complete checkpoint that was saved last, "" if there is none. (Not the largest step: after a resume from an older
// checkpoint, the ones ahead of it belong to an abandoned run.)
std::string find_latest(const std::string& out_dir);

// Reads the files through and compares them with their checksums, with all cores; an Error names the file that is damaged.
// False: an older program wrote it, without checksums.
enum class CheckpointFiles : uint8_t { params, all };
bool verify_checkpoint(const std::string& path, CheckpointFiles files);

// As find_latest, but one that is not damaged (verify_checkpoint), and what is wrong with those that are newer.
struct LatestIntact {
    std::string path;  // "" if there is none
    bool verified = true;
    std::vector<std::string> damaged;  // one line each
};
LatestIntact find_latest_intact(const std::string& out_dir);

// Bit for bit what was saved, m and v never empty; verify_checkpoint() is the caller's, once for all ranks. A checkpoint of another shape of model is an Error; whether recipe, seed and batch may
// differ is the caller's to decide from `info`.
Checkpoint load_checkpoint(const std::string& path, const ParameterList& list, const ModelSpec& model);
// The same, but only what a rank holds.
Checkpoint load_checkpoint(const std::string& path, const ParameterList& list, const ModelSpec& model, const Held& held);

// An Error that begins with `whose` and names a size, unless they are of one shape.
void require_same_model(const std::string& whose, const ModelSpec& found, const ModelSpec& expected);

// Only checkpoint.json: for decisions before the parameters are read.
CheckpointInfo load_checkpoint_info(const std::string& path);

// TrainState::params from a checkpoint folder, a Hugging Face folder with model.safetensors, or a .safetensors file.
// Names may lack "transformer."; GPT-2's mask buffers are ignored, and so is an lm_head.weight equal to the embedding.
std::vector<float> load_params_only(const std::string& path, const ParameterList& list);
std::vector<float> load_params_only(const std::string& path, const ParameterList& list, const Held& held);  // what a rank holds of them
