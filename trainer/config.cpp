#include "trainer/config.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <limits>
#include <set>
#include <vector>

#include "kernels/attention.h"
#include "kernels/common/check.h"
#include "trainer/parallel.h"
#include "trainer/recipe.h"

namespace {

using ll = long long;

// ---------------------------------------------------------------------------------------------------------------------
// The one list of options: the command line, --help and the TOML text all come from it

struct OptionInfo {
    const char* group;
    const char* name;
    const char* description;
};

// Calls visit(OptionInfo, field) for every option. C is Config or const Config.
template <typename C, typename Visitor>
void for_each_option(C& c, Visitor&& visit) {
    visit(OptionInfo{"Model", "model", "row of the model table"}, c.model);
    visit(OptionInfo{"Model", "n-layers", "blocks (0: as in the row, here and below)"}, c.n_layers);
    visit(OptionInfo{"Model", "dim", "width of the residual stream"}, c.dim);
    visit(OptionInfo{"Model", "n-heads", "attention heads"}, c.n_heads);
    visit(OptionInfo{"Model", "ffn-dim", "width of the MLP (0 with --dim: 4 * dim)"}, c.ffn_dim);
    visit(OptionInfo{"Model", "vocab-size", "tokens in the vocabulary"}, c.vocab_size);
    visit(OptionInfo{"Model", "seq-len", "context length, and rows of the position embedding"}, c.seq_len);
    visit(OptionInfo{"Model", "recipe", "precision: row of the recipe table"}, c.recipe);
    visit(OptionInfo{"Model", "device", "auto, gpu, or cpu (the reference device: slow, for small models)"}, c.device);
    visit(OptionInfo{"Model", "attention", "auto (the fastest of our own), hopper, mma, or cudnn (for comparison)"}, c.attention);

    visit(OptionInfo{"Data", "train", "token files to train on: a folder, a file or a glob"}, c.train);
    visit(OptionInfo{"Data", "val", "token files to evaluate on (empty: no evaluation)"}, c.val);

    visit(OptionInfo{"Batch", "micro-batch", "sequences that are processed at once"}, c.micro_batch);
    visit(OptionInfo{"Batch", "global-batch-tokens", "tokens of an optimizer step: a multiple of micro-batch * seq-len"},
          c.global_batch_tokens);

    visit(OptionInfo{"Training", "steps", "optimizer steps"}, c.steps);
    visit(OptionInfo{"Training", "lr", "peak learning rate"}, c.lr);
    visit(OptionInfo{"Training", "min-lr-factor", "the schedule ends at this factor times lr"}, c.min_lr_factor);
    visit(OptionInfo{"Training", "warmup-steps", "linear warm-up (-1: min(700, steps / 20))"}, c.warmup_steps);
    visit(OptionInfo{"Training", "schedule", "after the warm-up: cosine, linear, wsd (constant, then linear) or constant"}, c.schedule);
    visit(OptionInfo{"Training", "decay-fraction", "wsd decays over this fraction of the steps, the last ones"}, c.decay_fraction);
    visit(OptionInfo{"Training", "weight-decay", "AdamW, of matrices and embeddings"}, c.weight_decay);
    visit(OptionInfo{"Training", "beta1", "AdamW"}, c.beta1);
    visit(OptionInfo{"Training", "beta2", "AdamW"}, c.beta2);
    visit(OptionInfo{"Training", "eps", "AdamW"}, c.eps);
    visit(OptionInfo{"Training", "max-grad-norm", "gradients are clipped to this norm (0: never)"}, c.max_grad_norm);
    visit(OptionInfo{"Training", "outlier-window", "steps that a step's loss and norm are compared with (0: no detection)"}, c.outlier_window);
    visit(OptionInfo{"Training", "outlier-z", "a loss or norm so many standard deviations above their mean is an outlier"}, c.outlier_z);
    visit(OptionInfo{"Training", "skip-outliers", "leave the weights as they are in such a step: none, loss, norm or both"}, c.skip_outliers);
    visit(OptionInfo{"Training", "seed", "of initial weights and data order"}, c.seed);
    visit(OptionInfo{"Training", "deterministic", "pin GEMM algorithms, so that runs agree bit for bit"}, c.deterministic);
    visit(OptionInfo{"Training", "no-graph", "launch every kernel on its own instead of CUDA graphs; same bits"}, c.no_graph);

    visit(OptionInfo{"Ranks", "shard", "what is cut over the ranks: none, optimizer (ZeRO-1), gradients (2) or full (3)"}, c.shard);
    visit(OptionInfo{"Ranks", "replicate", "groups of ranks; slices are cut inside a group"}, c.replicate);
    visit(OptionInfo{"Ranks", "reduce-dtype", "f32 or bf16: in which gradients travel between ranks"}, c.reduce_dtype);
    visit(OptionInfo{"Ranks", "timeout", "seconds without a rank's progress that end the job"}, c.timeout);

    visit(OptionInfo{"Evaluation", "eval-every", "evaluate every so many steps (0: never)"}, c.eval_every);
    visit(OptionInfo{"Evaluation", "eval-tokens", "validation tokens of an evaluation, in whole sequences"}, c.eval_tokens);

    visit(OptionInfo{"Evaluation", "multiple-choice", "file of questions, a JSON object a line: context, endings, label"}, c.multiple_choice);

    visit(OptionInfo{"Text", "sample-every", "print samples every so many steps (0: never)"}, c.sample_every);
    visit(OptionInfo{"Text", "prompt", "what a sample continues (empty: the beginning of a document)"}, c.prompt);
    visit(OptionInfo{"Text", "samples", "samples at a time"}, c.samples);
    visit(OptionInfo{"Text", "max-tokens", "of a sample"}, c.max_tokens);
    visit(OptionInfo{"Text", "temperature", "divides the logits (0: always the likeliest token)"}, c.temperature);
    visit(OptionInfo{"Text", "top-k", "draw from the likeliest so many tokens (0: from all)"}, c.top_k);
    visit(OptionInfo{"Text", "gpt2-ranks", "file of GPT-2's byte-pair ranks, for data of that tokenizer (empty: where `make data-gpt2-ranks` puts it)"}, c.gpt2_ranks);

    visit(OptionInfo{"Files", "out", "folder of log and checkpoints (empty: runs/DATE-TIME-MODEL)"}, c.out);
    visit(OptionInfo{"Files", "checkpoint-every", "save every so many steps (0: only at the end)"}, c.checkpoint_every);
    visit(OptionInfo{"Files", "keep", "checkpoints to keep, newest first (0: all)"}, c.keep);
    visit(OptionInfo{"Files", "resume", "folder of a checkpoint, or auto: the newest in --out, if any"}, c.resume);

    visit(OptionInfo{"Logging and tuning", "log-every", "print a line every so many steps"}, c.log_every);
    visit(OptionInfo{"Logging and tuning", "gemm-cache", "file of tuned GEMM algorithms (empty: none)"}, c.gemm_cache);
    visit(OptionInfo{"Logging and tuning", "profile", "trace so many steps after the second and print where their time went (0: none)"}, c.profile);
    visit(OptionInfo{"Logging and tuning", "generate", "print samples of this checkpoint (its folder, or a run's) instead of training"}, c.generate);
    visit(OptionInfo{"Logging and tuning", "evaluate", "measure this checkpoint (--val, --multiple-choice) instead of training"}, c.evaluate);
    visit(OptionInfo{"Logging and tuning", "print-config", "print the resolved configuration as TOML and exit"},
          c.print_config);
}

struct SizeOption {
    const char* name;
    int Config::*option;
    int ModelSpec::*field;
};
constexpr SizeOption kSizes[] = {
    {"n-layers", &Config::n_layers, &ModelSpec::n_layers}, {"dim", &Config::dim, &ModelSpec::dim},
    {"n-heads", &Config::n_heads, &ModelSpec::n_heads},    {"ffn-dim", &Config::ffn_dim, &ModelSpec::ffn_dim},
    {"vocab-size", &Config::vocab_size, &ModelSpec::vocab_size}, {"seq-len", &Config::seq_len, &ModelSpec::seq_len},
};

// ---------------------------------------------------------------------------------------------------------------------
// Command line

// CLI11 alone would read 010 as eight and a number that does not fit as the nearest one that does.
template <typename Integer>
std::string check_whole_number(const std::string& text) {
    Integer value;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc() && end == text.data() + text.size() && std::to_string(value) == text) return "";
    return message("must be a whole number in plain digits from %s to %s, is %s",
                   std::to_string(std::numeric_limits<Integer>::min()).c_str(),
                   std::to_string(std::numeric_limits<Integer>::max()).c_str(), text.c_str());
}

std::string check_number(const std::string& text) {
    double value;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    return error == std::errc() && end == text.data() + text.size() ? "" : "must be a number, is " + text;
}

struct CommandLineBuilder {
    CLI::App& app;

    void operator()(const OptionInfo& info, bool& field) {
        app.add_flag(std::string("--") + info.name, field, info.description)->group(info.group);
    }
    void operator()(const OptionInfo& info, std::string& field) { add(info, field); }
    void operator()(const OptionInfo& info, float& field) { add(info, field)->check(CLI::Validator(check_number, "")); }
    template <typename Integer>
    void operator()(const OptionInfo& info, Integer& field) {
        add(info, field)->check(CLI::Validator(check_whole_number<Integer>, ""));
    }

  private:
    template <typename T>
    CLI::Option* add(const OptionInfo& info, T& field) {
        return app.add_option(std::string("--") + info.name, field, info.description)
            ->group(info.group)
            ->capture_default_str();
    }
};

std::string default_gemm_cache() {
    const char* cache = std::getenv("XDG_CACHE_HOME");
    if (cache && cache[0] == '/') return std::string(cache) + "/train_gpt_fp8/gemm.cache";
    const char* home = std::getenv("HOME");
    return home && *home ? std::string(home) + "/.cache/train_gpt_fp8/gemm.cache" : "";
}

std::string default_out(const Config& c) {
    const std::time_t now = std::time(nullptr);
    std::tm local{};
    localtime_r(&now, &local);
    char text[32];
    std::strftime(text, sizeof(text), "%Y%m%d-%H%M%S", &local);
    return std::string("runs/") + text + "-" + c.model;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rules

void validate_model(const Config& c) {
    const ModelSpec spec = c.model_spec();
    validate(spec);
    const Recipe& recipe = find_recipe(c.recipe);
    REQUIRE(c.device == "auto" || c.device == "gpu" || c.device == "cpu", "--device %s: must be auto, gpu or cpu",
            c.device.c_str());
    attention_backend(c.attention);
    REQUIRE(c.attention == "auto" || c.device != "cpu", "--attention %s: needs a GPU, --device is cpu", c.attention.c_str());
    REQUIRE(!recipe.reference_device_only || c.device == "cpu", "--recipe %s: needs --device cpu, is %s", c.recipe.c_str(),
            c.device.c_str());
}

void validate_batch(const Config& c) {
    REQUIRE(c.micro_batch >= 1, "--micro-batch %d: must be at least 1", c.micro_batch);
    const int64_t micro = c.micro_batch_tokens(), global = c.global_batch_tokens;
    REQUIRE(micro <= INT_MAX, "--micro-batch %d: times sequence length = %lld tokens, must be at most %d", c.micro_batch,
            ll(micro), INT_MAX);
    // These tokens are the K of the weight gradient's GEMM.
    REQUIRE(!find_recipe(c.recipe).quantizes() || micro % 16 == 0,
            "--micro-batch %d: times sequence length = %lld tokens, must be a multiple of 16 for --recipe %s", c.micro_batch,
            ll(micro), c.recipe.c_str());
    REQUIRE(global >= 1, "--global-batch-tokens %lld: must be at least 1", ll(global));
    const int64_t below = global / micro * micro;
    const int64_t nearest = below > 0 && global - below <= below + micro - global ? below : below + micro;
    REQUIRE(global % micro == 0,
            "--global-batch-tokens %lld: must be a multiple of micro-batch %d * sequence length %lld = %lld; nearest: %lld",
            ll(global), c.micro_batch, ll(micro / c.micro_batch), ll(micro), ll(nearest));
    REQUIRE(global / micro <= INT_MAX, "--global-batch-tokens %lld: must be at most %d micro-batches, is %lld", ll(global),
            INT_MAX, ll(global / micro));
}

void validate_ranks(const Config& c) {
    find_shard(c.shard);
    REQUIRE(c.replicate >= 1, "--replicate %d: must be at least 1", c.replicate);
    REQUIRE(c.reduce_dtype == "f32" || c.reduce_dtype == "bf16", "--reduce-dtype %s: must be f32 or bf16", c.reduce_dtype.c_str());
    REQUIRE(c.timeout >= 1, "--timeout %d: must be at least 1", c.timeout);
}

// Written so that NaN fails.
void validate_training(const Config& c) {
    REQUIRE(c.steps >= 1, "--steps %lld: must be at least 1", ll(c.steps));
    REQUIRE(c.lr > 0 && std::isfinite(c.lr), "--lr %g: must be above 0 and finite", double(c.lr));
    REQUIRE(c.min_lr_factor >= 0 && c.min_lr_factor <= 1, "--min-lr-factor %g: must be from 0 to 1", double(c.min_lr_factor));
    REQUIRE(c.warmup_steps >= 0 && c.warmup_steps <= c.steps, "--warmup-steps %lld: must be from 0 to --steps %lld",
            ll(c.warmup_steps), ll(c.steps));
    find_decay(c.schedule);
    REQUIRE(c.decay_fraction >= 0 && c.decay_fraction <= 1, "--decay-fraction %g: must be from 0 to 1", double(c.decay_fraction));
    REQUIRE(c.outlier_window == 0 || (c.outlier_window >= 8 && c.outlier_window <= 100000), "--outlier-window %d: must be 0, or from 8 to 100000", c.outlier_window);
    REQUIRE(c.outlier_z > 0 && std::isfinite(c.outlier_z), "--outlier-z %g: must be above 0 and finite", double(c.outlier_z));
    const std::string& skip = c.skip_outliers;
    REQUIRE(skip == "none" || skip == "loss" || skip == "norm" || skip == "both", "--skip-outliers %s: must be none, loss, norm or both", skip.c_str());
    REQUIRE(skip == "none" || c.outlier_window > 0, "--skip-outliers %s: needs --outlier-window above 0", skip.c_str());
    REQUIRE(c.weight_decay >= 0 && std::isfinite(c.weight_decay), "--weight-decay %g: must be at least 0 and finite",
            double(c.weight_decay));
    REQUIRE(c.beta1 >= 0 && c.beta1 < 1, "--beta1 %g: must be at least 0 and below 1", double(c.beta1));
    REQUIRE(c.beta2 >= 0 && c.beta2 < 1, "--beta2 %g: must be at least 0 and below 1", double(c.beta2));
    REQUIRE(c.eps > 0 && std::isfinite(c.eps), "--eps %g: must be above 0 and finite", double(c.eps));
    REQUIRE(c.max_grad_norm >= 0 && std::isfinite(c.max_grad_norm), "--max-grad-norm %g: must be at least 0 and finite",
            double(c.max_grad_norm));
}

void validate_text(const Config& c) {
    REQUIRE(c.sample_every >= 0, "--sample-every %lld: must be at least 0", ll(c.sample_every));
    REQUIRE(c.samples >= 1, "--samples %d: must be at least 1", c.samples);
    REQUIRE(c.sample_every == 0 || c.samples <= c.micro_batch, "--samples %d: must be at most --micro-batch %d", c.samples, c.micro_batch);
    REQUIRE(c.max_tokens >= 1, "--max-tokens %d: must be at least 1", c.max_tokens);
    REQUIRE(c.temperature >= 0 && std::isfinite(c.temperature), "--temperature %g: must be at least 0 and finite", double(c.temperature));
    REQUIRE(c.top_k >= 0, "--top-k %d: must be at least 0", c.top_k);
    REQUIRE(c.profile >= 0, "--profile %lld: must be at least 0", ll(c.profile));
}

void validate_files(const Config& c) {
    REQUIRE(!c.train.empty() || c.print_config || !c.generate.empty() || !c.evaluate.empty(), "--train: is missing; give a folder, a file or a glob of token files");
    REQUIRE(c.eval_every >= 0, "--eval-every %lld: must be at least 0", ll(c.eval_every));
    REQUIRE(c.eval_tokens >= c.model_spec().seq_len || !c.evaluate.empty(), "--eval-tokens %lld: must be at least a sequence, %d", ll(c.eval_tokens), c.model_spec().seq_len);
    REQUIRE(c.checkpoint_every >= 0, "--checkpoint-every %lld: must be at least 0", ll(c.checkpoint_every));
    REQUIRE(c.keep >= 0, "--keep %d: must be at least 0", c.keep);
    REQUIRE(c.log_every >= 1, "--log-every %lld: must be at least 1", ll(c.log_every));
    REQUIRE(!c.out.empty(), "--out: must not be empty");
}

// CLI11's TOML reader ends a value at #, even inside quotes, and knows no escapes.
struct TextChecker {
    void operator()(const OptionInfo& info, const std::string& text) {
        if (std::string(info.name) == "prompt") return;
        for (const char ch : text)
            REQUIRE(ch != '#' && ch != '\'' && ch != '"' && static_cast<unsigned char>(ch) >= ' ',
                    "--%s %s: must not hold #, a quote or a control character", info.name, text.c_str());
    }
    template <typename T>
    void operator()(const OptionInfo&, const T&) {}
};

// ---------------------------------------------------------------------------------------------------------------------
// TOML text

std::string toml_value(const std::string& text) { return "'" + text + "'"; }
std::string toml_value(bool value) { return value ? "true" : "false"; }
std::string toml_value(float value) {
    char digits[32];
    std::string text(digits, std::to_chars(digits, digits + sizeof(digits), value).ptr);  // shortest that reads back
    return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;           // e: 6e-04; n: inf, nan
}
template <typename Integer>
std::string toml_value(Integer value) {
    return std::to_string(value);
}

struct TomlWriter {
    ModelSpec spec;
    std::string text;
    std::string group;

    template <typename T>
    void operator()(const OptionInfo& info, const T& value) {
        const std::string name = info.name;
        if (name == "print-config") return;
        if (group != info.group) text += (group.empty() ? "# " : "\n# ") + (group = info.group) + "\n";
        const SizeOption* size = std::find_if(std::begin(kSizes), std::end(kSizes), [&](const auto& s) { return s.name == name; });
        if (size != std::end(kSizes) && toml_value(value) == "0")
            text += "# " + name + " = " + std::to_string(spec.*size->field) + "\n";
        else
            text += name + " = " + toml_value(value) + "\n";
    }
};

// The command line's words in reverse, as CLI11 wants them, where a repeated flag counts only with its last value: so
// that a script's defaults can be overridden by what is appended. (CLI11's own policy would accept lists in files too.)
std::vector<std::string> last_of_repeated(int argc, char** argv) {
    std::vector<std::vector<std::string>> groups;  // a flag and the words up to the next one
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (groups.empty() || word.starts_with("--")) groups.emplace_back();
        groups.back().push_back(word);
    }
    const auto flag = [](const std::vector<std::string>& group) { return group[0].substr(0, group[0].find('=')); };
    std::vector<std::string> words;
    std::set<std::string> seen;
    for (auto group = groups.rbegin(); group != groups.rend(); ++group)
        if (!group->at(0).starts_with("--") || seen.insert(flag(*group)).second) words.insert(words.end(), group->rbegin(), group->rend());
    return words;
}

}  // namespace

ModelSpec Config::model_spec() const {
    ModelSpec spec = find_model(model);
    for (const SizeOption& size : kSizes)
        if (this->*size.option != 0) spec.*size.field = this->*size.option;
    if (dim != 0 && ffn_dim == 0) spec.ffn_dim = int(std::clamp<int64_t>(int64_t(4) * dim, INT_MIN, INT_MAX));
    return spec;
}

int64_t Config::micro_batch_tokens() const { return int64_t(micro_batch) * model_spec().seq_len; }

int Config::micro_batches_per_step() const { return int(global_batch_tokens / micro_batch_tokens()); }

AdamWConfig Config::adamw() const {
    return {.beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = weight_decay, .max_grad_norm = max_grad_norm};
}

Schedule Config::lr_schedule() const {
    return {.decay = find_decay(schedule), .peak = lr, .min_factor = min_lr_factor, .warmup_steps = warmup_steps,
            .total_steps = steps, .decay_fraction = decay_fraction};
}

Config parse_config(int argc, char** argv) {
    Config config;
    config.gemm_cache = default_gemm_cache();
    CLI::App app("Trains GPT models in FP8.", "train_gpt_fp8");
    app.set_help_flag("--help", "print this and exit");
    app.set_config("--config", "", "TOML file of these options without the dashes; the command line wins");
    app.allow_config_extras(CLI::config_extras_mode::error);
    for_each_option(config, CommandLineBuilder{app});
    try {
        app.parse(last_of_repeated(argc, argv));
    } catch (const CLI::CallForHelp& help) {
        std::exit(app.exit(help));
    } catch (const CLI::ConfigError& error) {
        std::string text = error.what();
        const std::string unknown = "INI was not able to parse ";
        if (text.starts_with(unknown)) text = "unknown key " + text.substr(unknown.size());
        throw Error("--config: " + text);
    } catch (const CLI::FileError& error) {
        throw Error(std::string("--config: ") + error.what());
    } catch (const CLI::ParseError& error) {
        throw Error(error.what());
    }
    REQUIRE(config.resume != "auto" || !config.out.empty(), "--resume auto: needs --out, the folder to look in");
    if (config.warmup_steps == -1) config.warmup_steps = std::min<int64_t>(700, config.steps / 20);
    config.out_is_default = config.out.empty();
    if (config.out_is_default) config.out = default_out(config);
    validate(config);
    return config;
}

void validate(const Config& c) {
    validate_model(c);
    validate_batch(c);
    validate_ranks(c);
    validate_training(c);
    validate_text(c);
    validate_files(c);
    for_each_option(c, TextChecker{});
}

std::string to_toml(const Config& config) {
    TomlWriter writer{config.model_spec(), "", ""};
    for_each_option(config, writer);
    return writer.text;
}
