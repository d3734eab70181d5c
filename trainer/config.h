// Every option of the program: its name, default and rule. The same names work as long flags and as keys of a TOML file.
#pragma once
#include <cstdint>
#include <string>

#include "kernels/common/step_state.h"
#include "trainer/model_spec.h"
#include "trainer/schedule.h"

struct Config {
    // Model: a row of the table; a zero takes the row's value (--dim alone also sets ffn_dim to 4 * dim)
    std::string model = "gpt2-124M";
    int n_layers = 0, dim = 0, n_heads = 0, ffn_dim = 0, vocab_size = 0, seq_len = 0;
    std::string recipe = "tensorwise";
    std::string device = "auto";  // auto | gpu | cpu
    std::string attention = "auto";  // auto | hopper | mma | cudnn

    // Data
    std::string train;  // folder, file or glob of token files
    std::string val;    // same; empty: no evaluation

    // Batch
    int micro_batch = 32;                  // sequences; 0: auto, until choose_micro_batch
    int64_t global_batch_tokens = 524288;  // of one optimizer step

    // Training
    int64_t steps = 19073;  // at the default batch: 10 billion tokens
    float lr = 6e-4f;
    float min_lr_factor = 0.1f;
    int64_t warmup_steps = -1;        // -1 becomes min(700, steps / 20) in parse_config
    bool warmup_is_default = false;   // that happened
    std::string schedule = "cosine";  // cosine | linear | wsd | constant
    float decay_fraction = 0.2f;      // of the steps, for wsd
    float weight_decay = 0.1f;
    float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
    float max_grad_norm = 1.0f;  // 0: no clipping
    int outlier_window = 128;             // steps that a step is compared with; 0: no detection
    float outlier_z = 6.0f;               // standard deviations above their mean
    std::string skip_outliers = "none";   // none | loss | norm | both
    uint64_t seed = 1337;
    bool deterministic = false;
    bool no_graph = false;

    // Ranks (GPUs), of mpirun, srun or torchrun
    std::string shard = "optimizer";   // none | optimizer | gradients | full
    int replicate = 1;                 // groups of ranks that each hold a whole model; 1: one group of all
    std::string reduce_dtype = "f32";  // f32 | bf16: in which gradients travel (NCCL rounds BF16 at every hop)
    int timeout = 600;                 // seconds without progress of a rank that end the job

    // Evaluation
    int64_t eval_every = 250;  // steps; 0: never
    int64_t eval_tokens = 655360;  // of the validation data, in whole sequences

    // Text
    int64_t sample_every = 0;  // steps; 0: never
    std::string prompt;
    int samples = 1;
    int max_tokens = 128;      // of a sample
    float temperature = 1.0f;  // 0: the likeliest token
    int top_k = 0;             // 0: all
    std::string multiple_choice;  // file of questions
    std::string gpt2_ranks;       // file; empty: where make_tokenizer looks

    // Files
    std::string out;  // empty becomes runs/DATE-TIME-MODEL in parse_config
    bool out_is_default = false;  // no option: that happened, and ranks take rank 0's
    int64_t checkpoint_every = 1000;  // steps; 0: only at the end
    int keep = 2;                     // newest checkpoints to keep; 0: all
    std::string init_from;            // checkpoint or published weights that a new run starts with
    std::string resume;               // folder of a checkpoint or of a run, or "auto": the newest in `out`, if there is one

    // Logging and tuning
    int64_t log_every = 1;
    std::string gemm_cache;     // file of tuned GEMM algorithms; parse_config sets a default, "" on the command line: none
    bool gemm_cache_is_default = false;  // that happened
    int64_t profile = 0;        // steps; 0: none
    std::string profile_trace;  // file

    // Instead of training; at most one
    std::string generate;  // checkpoint: print samples of it
    std::string evaluate;  // checkpoint: measure it
    bool print_config = false;  // print given_toml()
    bool dry_run = false, verify = false, help_markdown = false;
    std::string mode_note;  // no option: a line on options of the command line that have no use there, or ""

    // What follows from the options.
    ModelSpec model_spec() const;                  // the row with its overrides
    int64_t micro_batch_tokens() const;            // micro_batch * model_spec().seq_len
    int micro_batches_per_step() const;            // global_batch_tokens / micro_batch_tokens(); exact once validated
    AdamWConfig adamw() const;
    Schedule lr_schedule() const;
    bool skips_loss_outliers() const { return skip_outliers == "loss" || skip_outliers == "both"; }
    bool skips_norm_outliers() const { return skip_outliers == "norm" || skip_outliers == "both"; }
};

// Command line over TOML file over defaults, completed and validated. Prints help and exits with status 0 on --help;
// throws Error otherwise.
Config parse_config(int argc, char** argv);

// Throws Error naming the option, its value and the rule.
void validate(const Config& config);

// The resolved configuration as a file for --config. Sizes that the model row decides are comments, so that the file
// still works with another --model.
std::string to_toml(const Config& config);
// The same without what nobody asked for, but follows from the moment (the date in `out`), the machine or the steps: comments, too.
// So the text is the same at any time, and a file of it gives other runs their own folder and warm-up.
std::string given_toml(const Config& config);

// Puts the values of TOML text into `config`. Throws Error naming `file`, the line, the key and the rule.
void read_toml(const std::string& text, const std::string& file, Config& config);

// The table of all options, OPTIONS.md.
std::string options_markdown();
