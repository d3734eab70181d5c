#include "trainer/run/checkpoint_modes.h"

#include <cstdio>

#include "data/printable.h"
#include "kernels/common/check.h"
#include "trainer/checkpoint.h"
#include "trainer/run/choices.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/samples.h"
#include "trainer/run/start.h"
#include "trainer/standard_output.h"

namespace {

// The options with the checkpoint's model and recipe, one micro-batch a step.
Config of_checkpoint(Config config, const CheckpointInfo& info, int micro_batch) {
    const ModelSpec& m = info.model;
    config.model = m.name;
    config.n_layers = m.n_layers, config.dim = m.dim, config.n_heads = m.n_heads, config.ffn_dim = m.ffn_dim;
    config.vocab_size = m.vocab_size, config.seq_len = m.seq_len;
    config.recipe = info.recipe;
    config.micro_batch = micro_batch;
    while (find_recipe(info.recipe).quantizes() && config.micro_batch_tokens() % 16 != 0) ++config.micro_batch;  // as FP8 needs it
    config.global_batch_tokens = config.micro_batch_tokens();
    return config;
}

struct Loaded {
    std::string path;
    CheckpointInfo info;
    Config config;
    EngineOptions shape;
    std::unique_ptr<Engine> engine;
};

Loaded load(const std::string& where, const char* option, const Config& config, int micro_batch, int logit_rows) {
    const std::string path = find_checkpoint(where, option);
    const CheckpointInfo info = load_checkpoint_info(path);
    note_unless_verified(path, verify_checkpoint(path, CheckpointFiles::params));
    const Config own = of_checkpoint(config, info, micro_batch);
    EngineOptions shape = engine_options(own);
    shape.logit_rows = logit_rows;
    const ParameterList list = make_parameters(info.model);
    TrainState state{.params = load_params_only(path, list), .m = {}, .v = {}};
    std::unique_ptr<Engine> engine = make_engine(own, shape);
    engine->load(state);
    return {path, info, own, shape, std::move(engine)};
}

}  // namespace

// The first sample streams; the others, which are drawn in the same passes, follow when it has ended.
void generate_from_checkpoint(const Config& config) {
    const Loaded model = load(config.generate, "--generate", config, config.samples, config.samples);
    const Samples samples(model.config, model.shape, text_tokenizer(model.info.tokenizer, config, "--generate"));
    std::fprintf(stderr, "%s on %s: %s, recipe %s\n", model.path.c_str(), model.engine->device_name().c_str(), model.info.model.name.c_str(), model.info.recipe.c_str());
    const std::string prompt = printable(config.prompt);
    std::printf("%s", prompt.c_str());
    SingleCommunicator alone;
    const std::vector<std::string> texts = samples.run(*model.engine, 0, alone, {.on_text = [](int sample, std::string_view piece) {
        if (sample != 0) return;
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        require_written_output();  // nobody listens: no need to go on
    }});
    std::printf("\n");
    for (size_t i = 1; i < texts.size(); ++i) std::printf("--- sample %zu\n%s%s\n", i + 1, prompt.c_str(), texts[i].c_str());
    require_written_output();
}

void evaluate_checkpoint(const Config& config) {
    REQUIRE(!config.val.empty() || !config.multiple_choice.empty(), "--evaluate: needs --val, --multiple-choice or both");
    const Loaded model = load(config.evaluate, "--evaluate", config, config.micro_batch, 0);
    std::printf("%s on %s: %s, recipe %s\n", model.path.c_str(), model.engine->device_name().c_str(), model.info.model.name.c_str(), model.info.recipe.c_str());
    if (!config.val.empty()) {
        REQUIRE(config.eval_tokens >= model.shape.seq_len, "--eval-tokens %lld: must be at least a sequence of the checkpoint's model, %d",
                (long long)config.eval_tokens, model.shape.seq_len);
        const Validation validation(model.config);
        require_same_tokenizer({"--val " + config.val, validation.tokenizer()}, {"--evaluate " + model.path, model.info.tokenizer});
        const Validation::Result result = validation.run(*model.engine, *model.shape.parallel.world);
        std::printf("val loss %.4f | %lld tokens\n", result.loss, (long long)result.tokens);
    }
    if (!config.multiple_choice.empty()) {
        const std::unique_ptr<Tokenizer> tokenizer = text_tokenizer(model.info.tokenizer, config, "--multiple-choice");
        std::printf("multiple choice %s\n", format_choices(Choices(config.multiple_choice, model.shape, *tokenizer).run(*model.engine)).c_str());
    }
    require_written_output();
}
