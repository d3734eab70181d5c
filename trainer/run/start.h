// Start-up: from the options to an engine, data and the state to begin with, and what is printed of them.
#pragma once
#include <memory>
#include <string>

#include "data/loader.h"
#include "trainer/checkpoint.h"
#include "trainer/config.h"
#include "trainer/distributed/world.h"
#include "trainer/engine.h"
#include "trainer/metrics.h"

// The communicators of the device that --device names; on GPUs, each rank takes one of its machine's. All ranks call it.
Parallel make_ranks(const Config& config, World& world);
ParallelOptions parallel_options(const Config& config);
EngineOptions engine_options(const Config& config, const Parallel& parallel = {});

// The device that --device names; `auto` falls back to the reference device, and says so.
std::unique_ptr<Engine> make_engine(const Config& config, const EngineOptions& options);
inline std::unique_ptr<Engine> make_engine(const Config& config) { return make_engine(config, engine_options(config)); }

DataLoader training_data(const Config& config);

struct StartPoint {
    TrainState state;
    std::string resumed_from;  // folder, "" for a fresh start
    std::string weights_from;  // of a fresh start: "" for random ones
    std::string gemm_choices;  // of the run that is resumed
};

// A checkpoint's folder, or the newest one of a run's folder.
std::string find_checkpoint(const std::string& path, const char* option);
// One line for a checkpoint without checksums (verify_checkpoint's answer).
void note_unless_verified(const std::string& path, bool verified);

// Initial weights, those of --init-from, or the checkpoint of --resume. An Error if it is damaged, or belongs to a run that this
// one would not continue, or if --out is the folder of another run. --resume auto, or of a run's folder, passes over damaged ones, and says so.
// All ranks call it; each gets what it holds, and all the same step.
StartPoint start_point(const Config& config, const ParameterList& list, const Held& held, const DataLoader& train, World& world);

CheckpointInfo checkpoint_info(const Config& config, const Engine& engine, const DataLoader& train);

RunLogOptions log_options(const Config& config, const Engine& engine, int64_t first_step, const World& world);
RunRecord run_record(const Config& config, const ParameterList& list, int argc, char** argv);

// OUT/config.toml: the configuration as it is resolved.
void save_configuration(const Config& config);

// Parts of what print_start() prints.
void print_model(const Config& config, const ParameterList& list);
void print_linears(const std::vector<LinearRow>& rows);

struct Started {
    const Config& config;
    const Engine& engine;
    const ParameterList& list;
    const DataLoader& train;
    const StartPoint& start;
    const World& world;
};
void print_start(const Started& s);
