// The whole model's gradients for given weights and tokens, as a file: what tests/gpu/gradients.py compares with PyTorch.
//
//   gradients --params W.safetensors --tokens T.i32 --grads G.safetensors --global-batch-tokens N [the trainer's options]
//
// The tokens are int32, N inputs and then N targets (negative: masked). The result has every parameter's gradient under its
// Hugging Face name, in published size and orientation, and "loss": the mean over the unmasked targets. (Named --grads,
// since the trainer's --out is a run's folder.)
#include <cerrno>
#include <cstring>
#include <fstream>

#include "dev/parameter_file.h"
#include "dev/run_options.h"
#include "trainer/checkpoint.h"

namespace {

struct Batch {
    std::vector<int> inputs, targets;
    int64_t valid = 0;  // unmasked targets
};

Batch read_batch(const std::string& path, size_t tokens, int vocab_size) {
    std::ifstream file(path, std::ios::binary);
    REQUIRE(file, "--tokens %s: cannot open: %s", path.c_str(), std::strerror(errno));
    Batch batch{.inputs = std::vector<int>(tokens), .targets = std::vector<int>(tokens)};
    for (std::vector<int>* half : {&batch.inputs, &batch.targets})
        file.read(reinterpret_cast<char*>(half->data()), std::streamsize(tokens * sizeof(int)));
    REQUIRE(file && file.peek() == EOF, "--tokens %s: must hold exactly %zu int32 inputs and as many targets", path.c_str(), tokens);
    for (const int token : batch.inputs)
        REQUIRE(token >= 0 && token < vocab_size, "--tokens %s: input %d, the vocabulary has %d", path.c_str(), token, vocab_size);
    for (const int token : batch.targets) {
        REQUIRE(token < vocab_size, "--tokens %s: target %d, the vocabulary has %d", path.c_str(), token, vocab_size);
        batch.valid += token >= 0;
    }
    REQUIRE(batch.valid > 0, "--tokens %s: every target is masked", path.c_str());
    return batch;
}

// By the evaluation's path: Engine::gradients keeps the loss to itself, and this checks that the two see the same model.
double mean_loss(Engine& engine, const Batch& batch, size_t micro_tokens) {
    double sum = 0;
    for (size_t first = 0; first < batch.inputs.size(); first += micro_tokens)
        sum += engine.evaluate({batch.inputs.data() + first, micro_tokens}, {batch.targets.data() + first, micro_tokens});
    return sum / double(batch.valid);
}

void run(int argc, char** argv) {
    const RunOptions options = parse_run_options(
        argc, argv, {{"params", nullptr}, {"tokens", nullptr}, {"grads", nullptr}},
        {{"--train", "none"}, {"--out", "none"}, {"--gemm-cache", ""}});
    const Config& config = options.config;
    const ModelSpec model = config.model_spec();
    const ParameterList list = make_parameters(model);
    const Batch batch = read_batch(options.own.at("tokens"), size_t(config.global_batch_tokens), model.vocab_size);

    const std::unique_ptr<Engine> engine = make_engine(config);
    engine->load({.params = load_params_only(options.own.at("params"), list)});
    const StepInputs in{.step = 0, .learning_rate = 0, .inverse_valid_tokens = float(1.0 / double(batch.valid))};
    const std::vector<float> grads = engine->gradients(in, batch.inputs, batch.targets);
    const double loss = mean_loss(*engine, batch, size_t(config.micro_batch_tokens()));
    write_parameter_file(options.own.at("grads"), list, grads, {{"loss", float(loss)}});
    std::printf("%s %s on %s: loss %.6f, %zu tensors in %s\n", model.name.c_str(), config.recipe.c_str(),
                engine->device_name().c_str(), loss, list.all.size(), options.own.at("grads").c_str());
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
