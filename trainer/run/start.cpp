#include "trainer/run/start.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "kernels/common/check.h"
#include "kernels/common/cuda_check.h"
#include "trainer/checkpoint_header.h"
#include "trainer/config_options.h"
#include "trainer/gpu_info.h"
#include "trainer/run/agreement.h"
#include "trainer/run/micro_batch.h"
#include "trainer/run/samples.h"

namespace fs = std::filesystem;
using ll = long long;

namespace {

constexpr double kFolderIsSeen_s = 10;  // a file system over a network is slow to show what is new

// All ranks have a GPU, or none has.
bool on_gpus(const Config& config, World& world) {
    if (config.device == "cpu") return false;
    const std::vector<std::string> obstacles = world.all_texts(gpu_obstacle());
    for (size_t r = 1; r < obstacles.size(); ++r)
        if (obstacles[r].empty() != obstacles[0].empty())
            throw JobError(message("rank %zu has no usable GPU (%s), others have: start one rank a GPU", obstacles[r].empty() ? size_t(0) : r,
                                   obstacles[obstacles[r].empty() ? 0 : r].c_str()));
    return obstacles[0].empty();
}

// Where a launcher shows each rank one GPU, that one; where it shows all, the one of the rank's number on its machine.
void take_a_gpu(World& world) {
    int devices = 0;
    CUDA_CHECK(cudaGetDeviceCount(&devices));
    const int device = devices == 1 ? 0 : world.local_rank();
    REQUIRE(device < devices, "is number %d of its machine, which shows %d GPUs: start one rank a GPU", device, devices);
    CUDA_CHECK(cudaSetDevice(device));
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    const std::vector<std::string> gpus = world.all_texts(std::string(properties.uuid.bytes, sizeof properties.uuid.bytes));
    for (size_t a = 0; a < gpus.size(); ++a)
        for (size_t b = a + 1; b < gpus.size(); ++b)
            if (gpus[a] == gpus[b]) throw JobError(message("ranks %zu and %zu share one GPU: start one rank a GPU", a, b));
}

}  // namespace

Parallel make_ranks(const Config& config, World& world) {
    if (world.alone() || !on_gpus(config, world)) return make_parallel(world, parallel_options(config));
    take_a_gpu(world);
    return make_gpu_parallel(world, parallel_options(config));
}

ParallelOptions parallel_options(const Config& config) {
    return {.shard = find_shard(config.shard), .replicate = config.replicate, .gradient_element = config.reduce_dtype == "bf16" ? Element::bf16 : Element::f32};
}

EngineOptions engine_options(const Config& config, const Parallel& parallel) {
    const ModelSpec model = config.model_spec();
    const int ranks = parallel.world->size();
    REQUIRE(config.micro_batches_per_step() % ranks == 0, "--global-batch-tokens %lld: is %d micro-batches of %lld tokens, must be a multiple of the %d ranks",
            ll(config.global_batch_tokens), config.micro_batches_per_step(), ll(config.micro_batch_tokens()), ranks);
    return {.model = model,
            .recipe = find_recipe(config.recipe),
            .micro_batch = config.micro_batch,
            .seq_len = model.seq_len,
            .micro_batches_per_step = config.micro_batches_per_step() / ranks,
            .adamw = config.adamw(),
            .use_graphs = !config.no_graph,
            .deterministic = config.deterministic,
            .attention = config.attention,
            .gemm_cache = config.gemm_cache,
            .logit_rows = config.sample_every > 0 ? config.samples : 0,
            .parallel = parallel};
}

std::unique_ptr<Engine> make_engine(const Config& config, const EngineOptions& options) {
    if (config.device == "cpu") return make_reference_engine(options);
    const std::string obstacle = gpu_obstacle();
    if (obstacle.empty()) return make_gpu_engine(options);
    REQUIRE(config.device == "auto", "--device gpu: %s", obstacle.c_str());
    std::fprintf(stderr, "no usable GPU (%s): using the reference device, slow and meant for small models\n", obstacle.c_str());
    return make_reference_engine(options);
}

DataLoader training_data(const Config& config) {
    const ModelSpec model = config.model_spec();
    return DataLoader({.shards = find_shards(config.train, "train"), .seq_len = model.seq_len,
                       .samples_per_step = config.global_batch_tokens / model.seq_len, .seed = config.seed, .shuffle = true,
                       .vocab_size = model.vocab_size});
}

// ---------------------------------------------------------------------------------------------------------------------
// Where the weights come from

namespace {

// A folder belongs to one run: its log and checkpoints are never mixed with another's.
void require_own_folder(const Config& config, const std::string& resumed_from) {
    for (fs::path folder = fs::weakly_canonical(config.out); folder.has_relative_path(); folder = folder.parent_path())
        REQUIRE(!fs::exists(folder / kInfoFile), "--out %s: lies in checkpoint %s, which a run may remove: choose another folder", config.out.c_str(), folder.c_str());
    const bool used = fs::exists(fs::path(config.out) / "log.jsonl");
    const bool own = !resumed_from.empty() && fs::weakly_canonical(fs::path(resumed_from) / "..") == fs::weakly_canonical(config.out);
    REQUIRE(!used || own || config.resume == "auto", "--out %s: holds the log.jsonl of another run; continue it with --resume auto, or choose another folder",
            config.out.c_str());
}

// What to_toml() wrote, a line an option.
std::map<std::string, std::string> values_of(const std::string& toml) {
    std::map<std::string, std::string> values;
    std::istringstream lines(toml);
    for (std::string line; std::getline(lines, line);)
        if (const size_t equals = line.find(" = "); equals != std::string::npos) values[line.substr(0, equals)] = line.substr(equals + 3);
    return values;
}

// It may be meant. More steps are what a longer run has.
void note_other_training(const Config& config, const std::string& path, const std::string& its_config_toml) {
    std::map<std::string, std::string> before = values_of(its_config_toml), now = values_of(to_toml(config));
    std::string changed;
    for_each_option(config, [&](const OptionInfo& option, const auto&) {
        const std::string name = option.name;
        if (option.group != "Training" || name == "steps" || !before.count(name) || before[name] == now[name]) return;
        changed += message("%s--%s %s (was %s)", changed.empty() ? "" : ", ", name.c_str(), now[name].c_str(), before[name].c_str());
    });
    if (!changed.empty()) std::printf("note: checkpoint %s goes on with %s\n", path.c_str(), changed.c_str());
}

// The data order is a function of seed, step and batch: another one would repeat and skip text without a word.
void require_same_data_order(const Config& config, const Checkpoint& checkpoint, const std::string& path, const DataLoader& train) {
    const CheckpointInfo& info = checkpoint.info;
    REQUIRE(info.seed == config.seed, "--seed %llu: checkpoint %s was trained with seed %llu", (unsigned long long)config.seed, path.c_str(),
            (unsigned long long)info.seed);
    REQUIRE(info.tokens_per_step == config.global_batch_tokens, "--global-batch-tokens %lld: checkpoint %s was trained with %lld",
            ll(config.global_batch_tokens), path.c_str(), ll(info.tokens_per_step));
    REQUIRE(info.samples_per_epoch == train.samples_per_epoch(), "--train %s: has %lld samples an epoch; checkpoint %s was trained on other data, with %lld",
            config.train.c_str(), ll(train.samples_per_epoch()), path.c_str(), ll(info.samples_per_epoch));
    require_same_tokenizer({"--train " + config.train, tokenizer_name(train.info().tokenizer)}, {"checkpoint " + path, info.tokenizer});
    REQUIRE(info.data_hash == 0 || info.data_hash == train.hash(), "--train %s: has as many samples as what checkpoint %s was trained on, but other text; to train it on other text use --init-from",
            config.train.c_str(), path.c_str());
    REQUIRE(checkpoint.state.step < config.steps, "--steps %lld: checkpoint %s has finished %lld steps: nothing to do", ll(config.steps), path.c_str(),
            ll(checkpoint.state.step));
}

// However damaged.
bool is_checkpoint_folder(const fs::path& path) { return fs::exists(path / "checkpoint.json") || fs::exists(path / "params.safetensors"); }

// The folder to resume from, read through; "" if --resume auto finds none.
std::string intact_checkpoint(const Config& config) {
    const bool automatic = config.resume == "auto";
    const std::string& where = automatic ? config.out : config.resume;
    if (!automatic && is_checkpoint_folder(where)) {
        note_unless_verified(where, verify_checkpoint(where, CheckpointFiles::all));
        return where;
    }
    REQUIRE(automatic || fs::is_directory(where), "--resume %s: no such folder", where.c_str());
    const LatestIntact latest = find_latest_intact(where);
    REQUIRE(!latest.path.empty() || latest.damaged.empty(), "--resume %s: %s holds no checkpoint that is intact: %s%s", config.resume.c_str(),
            where.c_str(), latest.damaged.front().c_str(), automatic ? "; remove it to begin anew" : "");
    REQUIRE(automatic || !latest.path.empty(), "--resume %s: holds no checkpoint; give its folder, or the folder of a run", where.c_str());
    for (const std::string& problem : latest.damaged) std::fprintf(stderr, "note: passed over a checkpoint: %s\n", problem.c_str());
    note_unless_verified(latest.path, latest.verified);
    return latest.path;
}

// Published weights say nothing of themselves: the shapes of their tensors must do.
std::string checked_weights(const Config& config, const DataLoader& train) {
    const std::string& where = config.init_from;
    REQUIRE(fs::exists(where), "--init-from %s: no such folder or file", where.c_str());
    const bool published = fs::is_regular_file(where) || (fs::exists(fs::path(where) / "model.safetensors") && !fs::exists(fs::path(where) / "checkpoint.json"));
    if (published) return where;
    const std::string path = find_checkpoint(where, "--init-from");
    const CheckpointInfo info = load_checkpoint_info(path);
    require_same_model("--init-from " + path, info.model, config.model_spec());
    require_same_tokenizer({"--train " + config.train, tokenizer_name(train.info().tokenizer)}, {"--init-from " + path, info.tokenizer});
    note_unless_verified(path, verify_checkpoint(path, CheckpointFiles::params));
    return path;
}

std::vector<std::string> weight_files(const std::string& path) {
    if (fs::is_regular_file(path)) return {path};
    if (!fs::exists(path + "/" + kInfoFile)) return {path + "/model.safetensors"};
    return {path + "/" + kInfoFile, path + "/" + kParamsFile};
}

// Step 0, with no moments and a schedule of its own.
StartPoint fresh_start(const Config& config, const ParameterList& list, const Held& held, const DataLoader& train, World& world) {
    if (config.init_from.empty()) return {initial_state(list, config.model_spec(), config.seed, held), "", "", ""};
    const std::string weights = world.all_texts(world.rank() == 0 ? checked_weights(config, train) : "")[0];
    require_same_files(world, "--init-from " + weights, weight_files(weights));
    return {{.params = load_params_only(weights, list, held), .m = {}, .v = {}}, "", weights, ""};
}

}  // namespace

std::string find_checkpoint(const std::string& path, const char* option) {
    if (fs::exists(fs::path(path) / "checkpoint.json")) return path;
    REQUIRE(fs::is_directory(path), "%s %s: %s", option, path.c_str(), fs::exists(path) ? "is not a folder" : "no such folder");
    const std::string latest = find_latest(path);
    if (!latest.empty()) return latest;
    const std::vector<std::string> damaged = find_latest_intact(path).damaged;
    REQUIRE(damaged.empty(), "%s %s: holds no checkpoint that is intact: %s", option, path.c_str(), damaged.front().c_str());
    REQUIRE(!latest.empty(), "%s %s: holds no checkpoint", option, path.c_str());
    return latest;
}

void note_unless_verified(const std::string& path, bool verified) {
    if (!verified) std::fprintf(stderr, "note: %s is of an older program and holds no checksums: damage in it would not be noticed\n", path.c_str());
}

StartPoint start_point(const Config& config, const ParameterList& list, const Held& held, const DataLoader& train, World& world) {
    require_shared_folder(world, config.out, std::min(kFolderIsSeen_s, config.timeout / 2.0));
    std::string path = config.resume;
    if (!path.empty()) path = world.all_texts(world.rank() == 0 ? intact_checkpoint(config) : "")[0];
    require_own_folder(config, path);
    world.all_texts("");  // before rank 0 begins a log there
    if (path.empty()) return fresh_start(config, list, held, train, world);
    require_same_files(world, "checkpoint " + path, {path + "/" + kInfoFile, path + "/" + kParamsFile, path + "/" + kAdamFile});
    Checkpoint checkpoint = load_checkpoint(path, list, config.model_spec(), held);
    require_same_data_order(config, checkpoint, path, train);
    if (checkpoint.info.recipe != config.recipe)
        std::printf("note: checkpoint %s was trained with recipe %s and goes on with %s\n", path.c_str(), checkpoint.info.recipe.c_str(), config.recipe.c_str());
    world.require_agreement({{"a checkpoint of step", std::to_string(checkpoint.state.step)}});
    note_other_micro_batch(config, path, checkpoint.info.config_toml);
    note_other_training(config, path, checkpoint.info.config_toml);
    return {std::move(checkpoint.state), path, "", checkpoint.info.gemm_choices};
}

CheckpointInfo checkpoint_info(const Config& config, const Engine& engine, const DataLoader& train) {
    return {.model = config.model_spec(), .recipe = config.recipe, .seed = config.seed,
            .tokens_per_step = config.global_batch_tokens, .samples_per_epoch = train.samples_per_epoch(), .data_hash = train.hash(),
            .tokenizer = tokenizer_name(train.info().tokenizer), .config_toml = to_toml(config), .gemm_choices = engine.gemm_choices()};
}

// ---------------------------------------------------------------------------------------------------------------------
// What the log and the terminal say first

RunLogOptions log_options(const Config& config, const Engine& engine, int64_t first_step, const World& world) {
    const ModelSpec model = config.model_spec();
    double memory = 0;
    for (const MemoryRow& row : engine.memory_table()) memory += row.bytes;
    return {.out = world.rank() == 0 ? config.out : "", .resuming = !config.resume.empty(), .first_step = first_step, .total_steps = config.steps,
            .log_every = config.log_every, .flops = flops_per_token(model, model.seq_len),
            .fp8_linears = find_recipe(config.recipe).quantizes(), .devices = world.size(), .memory_bytes = memory, .device = engine.device_name()};
}

RunRecord run_record(const Config& config, const ParameterList& list, int argc, char** argv) {
    std::string command;
    for (int i = 0; i < argc; ++i) {
        if (i > 0) command += ' ';
        command += argv[i];
    }
    return {.command = command, .config_toml = to_toml(config), .commit = git_commit(), .versions = library_versions(),
            .model = config.model_spec().name, .recipe = config.recipe, .parameters = list.published_count(),
            .tokens_per_step = config.global_batch_tokens};
}

void save_configuration(const Config& config) {
    const std::string path = config.out + "/config.toml", temporary = path + ".tmp";
    std::ofstream file(temporary);
    file << to_toml(config);
    file.close();
    std::error_code error;
    if (file) fs::rename(temporary, path, error);
    REQUIRE(file && !error, "%s: cannot write: %s", path.c_str(), error ? error.message().c_str() : std::strerror(errno));
}

void print_model(const Config& config, const ParameterList& list) {
    const ModelSpec m = config.model_spec();
    std::printf("model   %s: %d layers, width %d, %d heads, ffn %d, vocabulary %d (%d in memory), context %d: %lld parameters\n",
                m.name.c_str(), m.n_layers, m.dim, m.n_heads, m.ffn_dim, m.vocab_size, m.padded_vocab(), m.seq_len, ll(list.published_count()));
    std::printf("recipe  %s: %s\n", config.recipe.c_str(), find_recipe(config.recipe).description.c_str());
}

void print_linears(const std::vector<LinearRow>& rows) {
    for (const LinearRow& row : rows) std::printf("  %-44s %-5s %s\n", row.name.c_str(), row.precision.c_str(), row.reason.c_str());
}

void print_start(const Started& s) {
    const auto& [config, engine, list, train, start, world] = s;
    const ModelSpec m = config.model_spec();
    std::printf("train_gpt_fp8 %s | %s", git_commit().c_str(), engine.device_name().c_str());
    for (const auto& [name, version] : library_versions()) std::printf(" | %s %s", name.c_str(), version.c_str());
    std::printf("\n");
    print_model(config, list);
    if (!world.alone())
        std::printf("ranks   %d, %s: --shard %s, %d groups of %d\n", world.size(), world.transport(), config.shard.c_str(), world.size() / list.ranks, list.ranks);
    print_linears(engine.linear_table());
    std::printf("data    %lld tokens in %zu shards, %lld samples an epoch\n", ll(train.tokens()), train.shards(), ll(train.samples_per_epoch()));
    const double epochs = double(config.steps) * double(train.samples_per_step()) / double(train.samples_per_epoch());
    std::printf("step    %lld tokens = %d micro-batches of %d x %d; %lld steps, %.2f epochs\n", ll(config.global_batch_tokens),
                config.micro_batches_per_step(), config.micro_batch, m.seq_len, ll(config.steps), epochs);
    const double step_flops = flops_per_token(m, m.seq_len).total() * double(config.global_batch_tokens);
    if (engine.device_name() == "CPU reference" && step_flops > 1e11)
        std::printf("note    the reference device may need minutes for a step of %.2f TFLOP: take a smaller --global-batch-tokens or --model\n", step_flops / 1e12);
    std::printf("configuration\n");
    std::istringstream lines(to_toml(config));
    for (std::string line; std::getline(lines, line);)
        if (!line.empty()) std::printf("  %s\n", line.c_str());
    std::printf("memory\n%s", format_memory_table(engine.memory_table()).c_str());
    if (!start.weights_from.empty()) std::printf("start   weights of %s\n", start.weights_from.c_str());
    else if (start.resumed_from.empty()) std::printf("start   random weights, seed %llu\n", (unsigned long long)config.seed);
    else std::printf("start   step %lld of %s\n", ll(start.state.step), start.resumed_from.c_str());
    std::fflush(stdout);
}
