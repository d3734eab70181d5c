// The initial weights and every batch of a training run as plain files, so that another program can make the same run:
// what tests/gpu/learning.py trains PyTorch on.
//
//   export_run --to FOLDER [the trainer's options]
//
//   FOLDER/initial.safetensors  the weights before step 0
//   FOLDER/train.u16            (steps, samples a step, T + 1) tokens; of each row, the first T are inputs, the last T targets
//   FOLDER/val.u16              (samples, T + 1), what the trainer evaluates on
//   FOLDER/run.json             sizes, hyperparameters, the learning rate of every step; written last
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "data/loader.h"
#include "dev/parameter_file.h"
#include "dev/run_options.h"

namespace {

using Json = nlohmann::ordered_json;

void write_batches(const std::string& path, const DataLoader& loader, int64_t steps) {
    std::ofstream file(path, std::ios::binary);
    const int64_t T = loader.seq_len(), B = loader.samples_per_step();
    std::vector<int> inputs(size_t(B * T)), targets(inputs.size());
    std::vector<uint16_t> row(size_t(T) + 1);
    for (int64_t step = 0; step < steps; ++step) {
        loader.fill(step, 0, B, inputs.data(), targets.data());
        for (int64_t sample = 0; sample < B; ++sample) {
            const size_t first = size_t(sample * T);
            std::copy_n(inputs.begin() + int64_t(first), T, row.begin());
            row.back() = uint16_t(targets[first + size_t(T) - 1]);
            file.write(reinterpret_cast<const char*>(row.data()), std::streamsize(row.size() * sizeof(uint16_t)));
        }
    }
    file.close();
    REQUIRE(file, "%s: cannot write: %s", path.c_str(), std::strerror(errno));
}

Json describe(const Config& c, const ParameterList& list, int64_t val_samples) {
    const ModelSpec m = c.model_spec();
    Json run;
    run["model"] = {{"name", m.name}, {"n_layers", m.n_layers}, {"dim", m.dim}, {"n_heads", m.n_heads},
                    {"ffn_dim", m.ffn_dim}, {"vocab_size", m.vocab_size}, {"seq_len", m.seq_len}};
    run["seed"] = c.seed;
    run["steps"] = c.steps;
    run["samples_per_step"] = c.global_batch_tokens / m.seq_len;
    run["micro_batch"] = c.micro_batch;
    run["val_samples"] = val_samples;
    run["eval_every"] = c.eval_every;
    run["weight_decay"] = c.weight_decay;
    run["betas"] = {c.beta1, c.beta2};
    run["eps"] = c.eps;
    run["max_grad_norm"] = c.max_grad_norm;
    run["decays"] = Json::array();
    for (const Parameter& p : list.all)
        if (p.decays) run["decays"].push_back(p.name);
    run["learning_rates"] = Json::array();
    for (int64_t step = 0; step < c.steps; ++step) run["learning_rates"].push_back(learning_rate(c.lr_schedule(), step));
    return run;
}

void run(int argc, char** argv) {
    const RunOptions options = parse_run_options(argc, argv, {{"to", nullptr}}, {{"--out", "none"}});
    const Config& config = options.config;
    const std::string folder = options.own.at("to");
    const ModelSpec model = config.model_spec();
    REQUIRE(model.vocab_size <= 65536, "--vocab-size %d: this program writes 16-bit tokens", model.vocab_size);
    REQUIRE(!config.val.empty(), "--val: is missing");
    const ParameterList list = make_parameters(model);
    const int64_t T = model.seq_len, samples = config.global_batch_tokens / T;
    const DataLoader train({.shards = find_shards(config.train, "train"), .seq_len = T, .samples_per_step = samples,
                            .seed = config.seed, .shuffle = true, .vocab_size = model.vocab_size});
    // As the trainer's Validation: the first samples in order. Evaluated in other batches, they are the same samples.
    const DataLoader in_order({.shards = find_shards(config.val, "val"), .seq_len = T, .samples_per_step = 1, .shuffle = false,
                               .vocab_size = model.vocab_size});
    const int64_t val_samples = std::min(in_order.samples_per_epoch(), config.eval_tokens / T);

    std::filesystem::create_directories(folder);
    write_parameter_file(folder + "/initial.safetensors", list, initial_state(list, model, config.seed).params);
    write_batches(folder + "/train.u16", train, config.steps);
    write_batches(folder + "/val.u16", in_order, val_samples);
    std::ofstream json(folder + "/run.json");
    json << describe(config, list, val_samples).dump(1) << "\n";
    json.close();
    REQUIRE(json, "%s/run.json: cannot write", folder.c_str());
    std::printf("%s: weights, %lld steps of %lld samples, %lld validation samples\n", folder.c_str(), (long long)config.steps,
                (long long)samples, (long long)val_samples);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        run(argc, argv);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
