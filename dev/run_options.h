// Command lines of the dev programs that take the trainer's options and a few of their own: every option of the trainer
// keeps its name, default and rule, because parse_config reads it.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels/common/check.h"
#include "trainer/config.h"
#include "trainer/engine.h"
#include "trainer/gpu_info.h"

struct RunOptions {
    Config config;
    std::map<std::string, std::string> own;  // by name, without the dashes
};

struct OwnOption {
    const char* name;
    const char* fallback;  // nullptr: must be given
};

// Takes `--NAME VALUE` of the own options out of the command line and gives the rest to parse_config, after `defaults`:
// words for trainer options that are not on the command line ({"--train", "none"}).
inline RunOptions parse_run_options(int argc, char** argv, const std::vector<OwnOption>& own,
                                    const std::vector<std::pair<std::string, std::string>>& defaults) {
    RunOptions options;
    for (const OwnOption& option : own)
        if (option.fallback) options.own[option.name] = option.fallback;
    std::vector<std::string> words{argv[0]};
    std::map<std::string, bool> given;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        given[word.substr(0, word.find('='))] = true;
        bool taken = false;
        for (const OwnOption& option : own) {
            if (word != std::string("--") + option.name) continue;
            REQUIRE(i + 1 < argc, "%s: needs a value", word.c_str());
            options.own[option.name] = argv[++i];
            taken = true;
        }
        if (!taken) words.push_back(word);
    }
    for (const auto& [name, value] : defaults)
        if (!given[name]) words.push_back(name), words.push_back(value);

    std::vector<char*> pointers;
    for (std::string& word : words) pointers.push_back(word.data());
    pointers.push_back(nullptr);
    options.config = parse_config(int(words.size()), pointers.data());
    for (const OwnOption& option : own)
        REQUIRE(options.own.count(option.name) == 1, "--%s: is missing", option.name);
    return options;
}

inline EngineOptions engine_options(const Config& config) {
    const ModelSpec model = config.model_spec();
    return {.model = model,
            .recipe = find_recipe(config.recipe),
            .micro_batch = config.micro_batch,
            .seq_len = model.seq_len,
            .micro_batches_per_step = config.micro_batches_per_step(),
            .adamw = config.adamw(),
            .use_graphs = !config.no_graph,
            .deterministic = config.deterministic,
            .attention = config.attention,
            .gemm_cache = config.gemm_cache};
}

inline std::unique_ptr<Engine> make_engine(const Config& config) {
    if (config.device == "cpu") return make_reference_engine(engine_options(config));
    const std::string obstacle = gpu_obstacle();
    REQUIRE(obstacle.empty(), "no usable GPU: %s", obstacle.c_str());
    return make_gpu_engine(engine_options(config));
}
