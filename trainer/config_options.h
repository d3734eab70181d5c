// The one list of options: the command line, --help, TOML files and the table of OPTIONS.md all come from it.
#pragma once
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <set>
#include <string>
#include <string_view>

#include "trainer/config.h"

constexpr std::string_view kModes = "Instead of training";  // a group: not part of a run's configuration, never in a file

struct OptionInfo {
    std::string_view group;
    const char* name;
    const char* description;
    const char* zero = nullptr;  // the word that stands for 0
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
    visit(OptionInfo{"Model", "attention", "auto (the fastest of our own), hopper, mma, or cudnn (for comparison)"}, c.attention);
    visit(OptionInfo{"Model", "device", "auto, gpu, or cpu (the reference device: slow, for small models)"}, c.device);

    visit(OptionInfo{"Data", "train", "token files to train on: a folder, a file or a glob"}, c.train);
    visit(OptionInfo{"Data", "val", "token files to evaluate on (empty: no evaluation)"}, c.val);

    visit(OptionInfo{"Batch", "micro-batch", "sequences that are processed at once; auto: what fits and is fastest", "auto"}, c.micro_batch);
    visit(OptionInfo{"Batch", "global-batch-tokens", "tokens of an optimizer step: a multiple of micro-batch * seq-len"},
          c.global_batch_tokens);

    visit(OptionInfo{"Ranks", "shard", "what is cut over the ranks: optimizer (ZeRO-1), gradients (2), full (3) or none, where every rank has all"}, c.shard);
    visit(OptionInfo{"Ranks", "replicate", "groups of ranks; slices are cut inside a group"}, c.replicate);
    visit(OptionInfo{"Ranks", "reduce-dtype", "f32 or bf16: in which gradients travel between ranks; slices of a group are added in f32, NCCL rounds bf16 sums of replicas at every hop"}, c.reduce_dtype);
    visit(OptionInfo{"Ranks", "timeout", "seconds without a rank's progress that end the job"}, c.timeout);

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

    visit(OptionInfo{"Evaluation", "eval-every", "evaluate every so many steps (0: never)"}, c.eval_every);
    visit(OptionInfo{"Evaluation", "eval-tokens", "validation tokens of an evaluation, in whole sequences"}, c.eval_tokens);

    visit(OptionInfo{"Evaluation", "multiple-choice", "file of questions, a JSON object a line: context, endings, label"}, c.multiple_choice);

    visit(OptionInfo{"Text", "sample-every", "print samples every so many steps (0: never)"}, c.sample_every);
    visit(OptionInfo{"Text", "prompt", "what a sample continues (empty: the beginning of a document)"}, c.prompt);
    visit(OptionInfo{"Text", "samples", "samples at a time"}, c.samples);
    visit(OptionInfo{"Text", "max-tokens", "of a sample"}, c.max_tokens);
    visit(OptionInfo{"Text", "temperature", "divides the logits (0: always the likeliest token)"}, c.temperature);
    visit(OptionInfo{"Text", "top-k", "draw from the likeliest so many tokens (0: from all)"}, c.top_k);
    visit(OptionInfo{"Text", "gpt2-ranks", "file of GPT-2's byte-pair ranks, for data of that tokenizer (empty: deps/gpt2.tiktoken here or where the program was built, as `make data-gpt2-ranks` brings it)"}, c.gpt2_ranks);

    visit(OptionInfo{"Files", "out", "folder of log and checkpoints (empty: runs/DATE-TIME-MODEL)"}, c.out);
    visit(OptionInfo{"Files", "checkpoint-every", "save every so many steps, in the background (0: only at the end)"}, c.checkpoint_every);
    visit(OptionInfo{"Files", "keep", "checkpoints to keep, newest first (0: all)"}, c.keep);
    visit(OptionInfo{"Files", "init-from", "start a new run from the weights of this checkpoint (its folder, or a run's), or from published ones (folder or .safetensors)"}, c.init_from);
    visit(OptionInfo{"Files", "resume", "folder of a checkpoint, or of a run (its newest one that is intact), or auto: the newest in --out, if any"}, c.resume);

    visit(OptionInfo{"Logging and tuning", "log-every", "print a line every so many steps"}, c.log_every);
    visit(OptionInfo{"Logging and tuning", "gemm-cache", "file of tuned GEMM algorithms (empty: none; default: train_gpt_fp8/gemm.cache in the user's cache folder)"},
          c.gemm_cache);

    visit(OptionInfo{"Logging and tuning", "profile", "trace so many steps after the second and print where their time went (0: none)"}, c.profile);
    visit(OptionInfo{"Logging and tuning", "profile-trace", "also write those steps' timeline to this file, for ui.perfetto.dev (ranks but the first add their number)"}, c.profile_trace);

    visit(OptionInfo{kModes, "generate", "print samples of this checkpoint (its folder, or a run's): they continue --prompt; without one, each begins as a document does, after <|endoftext|>"}, c.generate);
    visit(OptionInfo{kModes, "evaluate", "measure this checkpoint (--val, --multiple-choice)"}, c.evaluate);
    visit(OptionInfo{kModes, "print-config", "print the configuration as TOML for --config; what nobody asked for, but follows from the moment, is a comment"}, c.print_config);
    visit(OptionInfo{kModes, "dry-run", "print memory, precision and the time that the run would take"}, c.dry_run);
    visit(OptionInfo{kModes, "verify", "check device, libraries, GEMMs and graph replay, in seconds"}, c.verify);
    visit(OptionInfo{kModes, "help-markdown", "print the table of these options"}, c.help_markdown);
}

// Options that override a field of the model's row.
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

// An Error if the command line, which gave these options, asks for two things instead of training, or for one of nothing. Returns
// a note on options that the one it asks for has no use for, or "".
std::string check_modes(const Config& config, const std::set<std::string>& given);

// ", did you mean --steps?" for a name that nearly is one of an option; "" otherwise.
std::string suggestion(const std::string& unknown, const char* dashes);

// Whether it is a float, or nan or inf, whose own rules refuse them: else a tiny one would become 0, a huge one inf.
inline constexpr const char* kFloatRule = "must be 0 or from 1.2e-38 to 3.4e38 in size";
inline bool is_float(double value) {
    const double size = std::abs(value);
    return value == 0 || !std::isfinite(value) || (size >= double(std::numeric_limits<float>::min()) && size <= double(std::numeric_limits<float>::max()));
}

// A value as a TOML file has it.
std::string toml_value(const std::string& text);
std::string toml_value(bool value);
std::string toml_value(float value);
std::string toml_value(int value);
std::string toml_value(int64_t value);
std::string toml_value(uint64_t value);
