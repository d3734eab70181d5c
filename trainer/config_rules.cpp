// What the options must satisfy, each alone and together. Every message names the option, its value and the rule.
#include <algorithm>
#include <climits>
#include <cmath>

#include "kernels/common/check.h"
#include "trainer/ascii_toml.h"
#include "trainer/config_options.h"
#include "trainer/parallel.h"
#include "trainer/recipe.h"

namespace {

using ll = long long;

void validate_model(const Config& c) {
    const ModelSpec spec = c.model_spec();
    validate(spec);
    const Recipe& recipe = find_recipe(c.recipe);
    REQUIRE(c.device == "auto" || c.device == "gpu" || c.device == "cpu", "--device %s: must be auto, gpu or cpu",
            c.device.c_str());
    REQUIRE(!recipe.reference_device_only || c.device == "cpu", "--recipe %s: needs --device cpu, is %s", c.recipe.c_str(),
            c.device.c_str());
}

void validate_attention(const Config& c) {
    const std::string& name = c.attention;
    REQUIRE(name == "auto" || name == "hopper" || name == "mma" || name == "cudnn", "--attention %s: must be auto, hopper, mma or cudnn", name.c_str());
    REQUIRE(c.attention == "auto" || c.device != "cpu", "--attention %s: needs a GPU, --device is cpu", c.attention.c_str());
}

constexpr int64_t kMostBatchTokens = 1'000'000'000'000;  // leaves room for products in 64 bits

void validate_batch(const Config& c) {
    REQUIRE(c.micro_batch >= 0, "--micro-batch %d: must be at least 1, or auto", c.micro_batch);
    const bool automatic = c.micro_batch == 0;  // until it is chosen: then a sequence is what the batch must be a multiple of
    const int64_t micro = automatic ? c.model_spec().seq_len : c.micro_batch_tokens(), global = c.global_batch_tokens;
    REQUIRE(micro <= INT_MAX, "--micro-batch %d: times sequence length = %lld tokens, must be at most %d", c.micro_batch,
            ll(micro), INT_MAX);
    // These tokens are the K of the weight gradient's GEMM.
    REQUIRE(automatic || !find_recipe(c.recipe).quantizes() || micro % 16 == 0,
            "--micro-batch %d: times sequence length = %lld tokens, must be a multiple of 16 for --recipe %s", c.micro_batch,
            ll(micro), c.recipe.c_str());
    REQUIRE(global >= 1 && global <= kMostBatchTokens, "--global-batch-tokens %lld: must be at least 1, at most %lld", ll(global), ll(kMostBatchTokens));
    const int64_t below = global / micro * micro;
    const int64_t nearest = below > 0 && global - below <= below + micro - global ? below : below + micro;
    REQUIRE(global % micro == 0,
            "--global-batch-tokens %lld: must be a multiple of micro-batch %d * sequence length %lld = %lld; nearest: %lld",
            ll(global), std::max(1, c.micro_batch), ll(c.model_spec().seq_len), ll(micro), ll(nearest));
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
    constexpr int64_t kMostSteps = 1'000'000'000'000;  // years of training; leaves room for products in 64 bits
    REQUIRE(c.steps >= 1 && c.steps <= kMostSteps, "--steps %lld: must be at least 1, at most %lld", ll(c.steps), ll(kMostSteps));
    REQUIRE(c.lr > 0 && std::isfinite(c.lr), "--lr %g: must be above 0 and finite", double(c.lr));
    REQUIRE(c.min_lr_factor >= 0 && c.min_lr_factor <= 1, "--min-lr-factor %g: must be from 0 to 1", double(c.min_lr_factor));
    REQUIRE(c.warmup_steps >= 0 && c.warmup_steps <= c.steps, "--warmup-steps %lld: must be from 0 to --steps %lld",
            ll(c.warmup_steps), ll(c.steps));
    find_decay(c.schedule);
    REQUIRE(c.decay_fraction >= 0 && c.decay_fraction <= 1, "--decay-fraction %g: must be from 0 to 1", double(c.decay_fraction));
    REQUIRE(c.outlier_window == 0 || (c.outlier_window >= 8 && c.outlier_window <= 100000), "--outlier-window %d: must be 0, or from 8 to 100000", c.outlier_window);
    REQUIRE(c.outlier_z > 0 && std::isfinite(c.outlier_z), "--outlier-z %g: must be above 0 and finite", double(c.outlier_z));
    REQUIRE(c.schedule != "wsd" || double(c.warmup_steps) + double(c.decay_fraction) * double(c.steps) <= double(c.steps),
            "--warmup-steps %lld: with --decay-fraction %g of --steps %lld: there are more steps of warm-up and decay than steps", ll(c.warmup_steps),
            double(c.decay_fraction), ll(c.steps));
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
    constexpr int kMostSamples = 1024;  // rows of a pass
    REQUIRE(c.samples >= 1 && c.samples <= kMostSamples, "--samples %d: must be at least 1, at most %d", c.samples, kMostSamples);
    REQUIRE(c.sample_every == 0 || c.micro_batch == 0 || c.samples <= c.micro_batch, "--samples %d: must be at most --micro-batch %d", c.samples, c.micro_batch);
    REQUIRE(c.max_tokens >= 1, "--max-tokens %d: must be at least 1", c.max_tokens);
    REQUIRE(c.temperature >= 0 && std::isfinite(c.temperature), "--temperature %g: must be at least 0 and finite", double(c.temperature));
    REQUIRE(c.top_k >= 0, "--top-k %d: must be at least 0", c.top_k);
    REQUIRE(c.profile >= 0, "--profile %lld: must be at least 0", ll(c.profile));
    REQUIRE(c.profile_trace.empty() || c.profile > 0, "--profile-trace %s: needs --profile N, the number of steps to trace", c.profile_trace.c_str());
}

void validate_files(const Config& c) {
    const int modes = !c.generate.empty() + !c.evaluate.empty() + c.print_config + c.dry_run + c.verify + c.help_markdown;
    REQUIRE(c.evaluate.empty() || c.micro_batch > 0, "--micro-batch auto: is chosen for training; --evaluate needs a number");
    REQUIRE(!c.train.empty() || modes > 0, "--train: is missing; give a folder, a file or a glob of token files");
    REQUIRE(c.eval_every >= 0, "--eval-every %lld: must be at least 0", ll(c.eval_every));
    REQUIRE(c.eval_tokens >= c.model_spec().seq_len || !c.evaluate.empty(), "--eval-tokens %lld: must be at least a sequence, %d", ll(c.eval_tokens), c.model_spec().seq_len);
    REQUIRE(c.checkpoint_every >= 0, "--checkpoint-every %lld: must be at least 0", ll(c.checkpoint_every));
    REQUIRE(c.keep >= 0, "--keep %d: must be at least 0", c.keep);
    REQUIRE(c.log_every >= 1, "--log-every %lld: must be at least 1", ll(c.log_every));
    REQUIRE(!c.out.empty(), "--out: must not be empty");
    REQUIRE(c.init_from.empty() || c.resume.empty() || c.resume == "auto", "--init-from %s: --resume %s goes on with weights of its own; give one of the two "
            "(beside --resume auto, --init-from is for the first start)", c.init_from.c_str(), c.resume.c_str());
}

struct TextChecker {
    void operator()(const OptionInfo& info, const std::string& text) {
        REQUIRE(is_utf8(text), "--%s %s: must be UTF-8, as the configuration is saved as TOML", info.name, text.c_str());
    }
    template <typename T>
    void operator()(const OptionInfo&, const T&) {}
};

}  // namespace

void validate(const Config& c) {
    validate_model(c);
    validate_attention(c);
    validate_batch(c);
    validate_ranks(c);
    validate_training(c);
    validate_text(c);
    validate_files(c);
    for_each_option(c, TextChecker{});
}
