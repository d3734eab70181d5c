#include "trainer/config.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "tests/host/temp_folder.h"

namespace {

Config parse(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "train_gpt_fp8");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    return parse_config(int(argv.size()), argv.data());
}

Config parse_with_data(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"--train", "shards"});
    return parse(arguments);
}

struct BadCase {
    std::vector<std::string> arguments;
    std::vector<std::string> message_holds;  // option, value, rule
};

TEST(Config, DefaultsAreA124MRun) {
    const Config c = parse_with_data({});
    EXPECT_EQ(c.model_spec().dim, 768);
    EXPECT_EQ(c.micro_batch_tokens(), 32 * 1024);
    EXPECT_EQ(c.micro_batches_per_step(), 16);
    EXPECT_EQ(c.warmup_steps, 700);
    EXPECT_EQ(c.recipe, "tensorwise");
    EXPECT_EQ(c.attention, "auto");
    EXPECT_TRUE(c.out.starts_with("runs/")) << c.out;
    EXPECT_TRUE(c.out.ends_with("-gpt2-124M")) << c.out;
}

TEST(Config, WarmupFollowsShortRuns) {
    EXPECT_EQ(parse_with_data({"--steps", "100"}).warmup_steps, 5);
    EXPECT_EQ(parse_with_data({"--steps", "1"}).warmup_steps, 0);
    EXPECT_EQ(parse_with_data({"--steps", "5", "--no-graph", "--steps=6"}).steps, 6);  // the last wins
    EXPECT_EQ(parse_with_data({"--steps", "100", "--warmup-steps", "100"}).warmup_steps, 100);
}

TEST(Config, CommandLineReachesEveryKindOfField) {
    const Config c = parse_with_data({"--lr", "3e-4", "--seed", "18446744073709551615", "--deterministic", "--no-graph",
                                      "--device", "cpu", "--recipe", "f32", "--keep", "0", "--gemm-cache", ""});
    EXPECT_EQ(c.lr, 3e-4f);
    EXPECT_EQ(c.seed, std::numeric_limits<uint64_t>::max());
    EXPECT_TRUE(c.deterministic && c.no_graph);
    EXPECT_EQ(c.recipe, "f32");
    EXPECT_EQ(c.keep, 0);
    EXPECT_EQ(c.gemm_cache, "");
    EXPECT_EQ(c.lr_schedule().peak, 3e-4f);
    EXPECT_EQ(c.adamw().beta2, 0.95f);
}

TEST(Config, ModelSizesOverrideTheRow) {
    const ModelSpec s = parse_with_data({"--dim", "512", "--n-heads", "8", "--seq-len", "256"}).model_spec();
    EXPECT_EQ(s.dim, 512);
    EXPECT_EQ(s.ffn_dim, 2048);
    EXPECT_EQ(s.n_layers, 12);
    EXPECT_EQ(s.seq_len, 256);
    EXPECT_EQ(parse_with_data({"--dim", "512", "--n-heads", "8", "--ffn-dim", "1024"}).model_spec().ffn_dim, 1024);
}

TEST(Config, FileLiesUnderTheCommandLine) {
    const TempFolder folder;
    write_file(folder / "run.toml", "# a comment\nsteps = 50\nlr = 1e-3  # another\ntrain = \"my shards/*.bin\"\n"
                                    "deterministic = true\nno-graph = false\n");
    const Config c = parse({"--config", folder / "run.toml", "--steps", "60"});
    EXPECT_EQ(c.steps, 60);
    EXPECT_EQ(c.lr, 1e-3f);
    EXPECT_EQ(c.train, "my shards/*.bin");
    EXPECT_TRUE(c.deterministic);
    EXPECT_FALSE(c.no_graph);
}

TEST(Config, TomlTextReadsBackAsTheSameRun) {
    const TempFolder folder;
    const Config c = parse_with_data({"--dim", "512", "--n-heads", "8", "--lr", "0.00123456789", "--eps", "1", "--beta1", "0",
                                      "--val", "a b/[0-9],x.bin", "--deterministic", "--seed", "18446744073709551615",
                                      "--gemm-cache", ""});
    const std::string text = to_toml(c);
    write_file(folder / "run.toml", text);
    const Config again = parse({"--config", folder / "run.toml"});
    EXPECT_EQ(to_toml(again), text);
    EXPECT_EQ(again.lr, c.lr);
    EXPECT_EQ(again.val, c.val);
    EXPECT_EQ(again.seed, c.seed);
    EXPECT_EQ(again.gemm_cache, "");
    EXPECT_EQ(again.model_spec().ffn_dim, 2048);
    EXPECT_NE(text.find("# ffn-dim = 2048\n"), std::string::npos) << text;
    // What the row decided moves with the row; what the user decided stays.
    EXPECT_EQ(parse({"--config", folder / "run.toml", "--model", "gpt2-355M"}).model_spec().n_layers, 24);
}

TEST(Config, BadFilesAreErrors) {
    const TempFolder folder;
    const std::string file = folder / "run.toml";
    const auto error_of_text = [&](const std::string& text) {
        write_file(file, text);
        return error_of([&] { parse_with_data({"--config", file}); });
    };
    EXPECT_EQ(error_of_text("lr = 1.0\nstepz = 5\n"), "--config " + file + ": line 2: unknown key stepz, did you mean steps?");
    EXPECT_NE(error_of_text("[training]\nsteps = 5\n"), "");
    EXPECT_NE(error_of_text("steps = [5, 6]\n"), "");
    EXPECT_NE(error_of_text("steps = 5\nsteps = 6\n"), "");
    const std::vector<BadCase> cases = {
        {{"steps = 1.5\n"}, {"line 1: steps: must be a whole number", "is 1.5"}},
        {{"steps = \"5\"\n"}, {"steps: must be a whole number"}},
        {{"keep = 3000000000\n"}, {"keep: must be a whole number from -2147483648 to 2147483647, is 3000000000"}},
        {{"seed = -1\n"}, {"seed: must be a whole number from 0"}},
        {{"seed = \"1x\"\n"}, {"seed: must be"}},
        {{"lr = \"fast\"\n"}, {"lr: must be a number"}},
        {{"deterministic = 1\n"}, {"deterministic: must be true or false, is 1"}},
        {{"out = x\n"}, {"line 1: "}},
        {{"[,"}, {"not valid TOML"}},
        {{"lr = 1.0  # \xC3\xA9\n\xC3\xA9 = 1\n"}, {"line 2: not ASCII"}},
        {{"out = \"\"\"a\n\\\"\"\"\xC3\xA9\"\"\"\"\"\n\xC3\xA9"}, {"line 3: not ASCII"}},
        {{"out = \"\xff\"\n"}, {"line 1: not UTF-8"}},
        {{"out = '\xED\xA0\x80'\n"}, {"line 1: not UTF-8"}},  // a surrogate
        {{"out = \"\\\xC3\xA9\"\n"}, {"line 1: "}},           // no escape
        {{"out = '\xC3\xA9\n'\n"}, {"line 1: "}},
        {{"steps = '\xC3\xA9'\n"}, {"steps: must be a whole number", "is \"\xC3\xA9\""}},
        {{"'st\xC3\xA9ps' = 1\n"}, {"line 1: unknown key st\xC3\xA9ps"}},
        {{"out = 5\n"}, {"out: must be text in quotes, is 5"}},
        {{"micro-batch = \"most\"\n"}, {"micro-batch: must be"}},
        {{"print-config = true\n"}, {"line 1: print-config: is no part of a run", "--print-config on the command line"}},
        {{"generate = \"x\"\n"}, {"line 1: generate: is no part of a run", "--generate on the command line"}},
        {{"config = \"x\"\n"}, {"line 1: config: a file cannot name another one"}},
        {{"eps = 1e-300\n"}, {"eps: must be 0 or from 1.2e-38", "is 1e-300"}},
        {{"lr = 1e39\n"}, {"lr: must be 0 or from 1.2e-38", "is 1e+39"}},
        {{"steps = 1e3\n"}, {"steps: must be a whole number without point or exponent, is 1000.0"}},
        {{"micro-batch = 0\n"}, {"micro-batch: must be at least 1, or \"auto\", is 0"}},
        {{"help = true\n"}, {"help: is for the command line"}},
        {{"[training]\nsteps = 5\n"}, {"unknown table training: every option stands on a line"}},
        {{"lr = 1.0\nlr = 2.0\n"}, {"line 2: ", "lr"}},
        {{"\n\n[training]\nsteps = 5\n"}, {"unknown table training"}},
        {{"steps = 0\n"}, {"--steps 0", "at least 1"}},
    };
    for (const BadCase& bad : cases) {
        const std::string text = error_of_text(bad.arguments[0]);
        for (const std::string& part : bad.message_holds) EXPECT_NE(text.find(part), std::string::npos) << text << " lacks " << part;
        EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    }
    EXPECT_NE(error_of([&] { parse_with_data({"--config", folder / "none.toml"}); }).find("none.toml"), std::string::npos);
}

TEST(Config, ErrorsNameOptionValueAndRule) {
    const std::vector<BadCase> cases = {
        {{"--stepz", "5"}, {"--stepz: no such option, did you mean --steps?"}},
        {{"--steps"}, {"--steps"}},
        {{"--steps", "1e5"}, {"--steps", "1e5", "whole number"}},
        {{"--steps", "010"}, {"--steps", "010", "whole number"}},
        {{"--steps", "0"}, {"--steps", "0", "at least 1"}},
        {{"--steps", "99999999999999999999"}, {"--steps", "99999999999999999999"}},
        {{"--micro-batch", "4294967296"}, {"--micro-batch", "4294967296"}},
        {{"--seed", "-1"}, {"--seed", "-1"}},
        {{"--lr", "fast"}, {"--lr", "fast", "number"}},
        {{"--lr", "0"}, {"--lr", "0", "above 0"}},
        {{"--lr", "nan"}, {"--lr", "nan"}},
        {{"--lr", "inf"}, {"--lr", "inf"}},
        {{"--min-lr-factor", "1.5"}, {"--min-lr-factor", "1.5", "0 to 1"}},
        {{"--steps", "10", "--warmup-steps", "11"}, {"--warmup-steps 11", "10"}},
        {{"--warmup-steps", "-2"}, {"--warmup-steps -2"}},
        {{"--schedule", "step"}, {"--schedule step", "cosine, linear, wsd or constant"}},
        {{"--weight-decay", "-0.1"}, {"--weight-decay -0.1", "at least 0"}},
        {{"--beta1", "1"}, {"--beta1 1", "below 1"}},
        {{"--beta2", "-0.5"}, {"--beta2 -0.5", "at least 0"}},
        {{"--eps", "0"}, {"--eps 0", "above 0"}},
        {{"--max-grad-norm", "nan"}, {"--max-grad-norm nan"}},
        {{"--model", "gpt5"}, {"--model gpt5", "gpt2-124M"}},
        {{"--dim", "100"}, {"--dim 100", "multiple of 8"}},
        {{"--n-heads", "7"}, {"--n-heads 7", "divide"}},
        {{"--n-layers", "-1"}, {"--n-layers -1", "at least 1"}},
        {{"--recipe", "fp4"}, {"--recipe fp4", "tensorwise"}},
        {{"--recipe", "f32"}, {"--recipe f32", "--device cpu"}},
        {{"--device", "tpu"}, {"--device tpu", "auto, gpu or cpu"}},
        {{"--attention", "flash"}, {"--attention flash", "auto, hopper, mma or cudnn"}},
        {{"--attention", "cudnn", "--device", "cpu", "--model", "tiny"}, {"--attention cudnn", "needs a GPU", "--device is cpu"}},
        {{"--micro-batch", "0"}, {"--micro-batch", "at least 1, or auto"}},
        {{"--micro-batch", "1", "--seq-len", "24", "--global-batch-tokens", "24"}, {"--micro-batch 1", "24", "multiple of 16"}},
        {{"--global-batch-tokens", "500000"}, {"--global-batch-tokens 500000", "multiple", "32768", "nearest: 491520"}},
        {{"--global-batch-tokens", "520000"}, {"nearest: 524288"}},
        {{"--global-batch-tokens", "5"}, {"nearest: 32768"}},
        {{"--global-batch-tokens", "0"}, {"--global-batch-tokens 0", "at least 1"}},
        {{"--eval-every", "-1"}, {"--eval-every -1", "at least 0"}},
        {{"--eval-tokens", "1023"}, {"--eval-tokens 1023", "at least a sequence, 1024"}},
        {{"--checkpoint-every", "-1"}, {"--checkpoint-every -1", "at least 0"}},
        {{"--keep", "-1"}, {"--keep -1", "at least 0"}},
        {{"--log-every", "0"}, {"--log-every 0", "at least 1"}},
        {{"--resume", "auto"}, {"--resume auto", "--out"}},
        {{"--val", "a\xff" "b"}, {"--val a", "must be UTF-8"}},
        {{"--micro-batch", "most"}, {"--micro-batch", "most"}},
        {{"--dry-run", "--verify"}, {"--dry-run and --verify: give one of them"}},
        {{"--verify", "--generate", "x"}, {"--generate and --verify: give one of them"}},
        {{"-steps", "5"}, {"-steps: no such option, did you mean --steps?"}},
        {{"--generate", ""}, {"--generate: is empty; give the folder"}},
        {{"--evaluate", ""}, {"--evaluate: is empty; give the folder"}},
        {{"--config", ""}, {"--config: is empty"}},
        {{"--config", "/tmp"}, {"--config /tmp: is a folder"}},
        {{"--config", "/dev/zero"}, {"--config /dev/zero: has more than 1048576 bytes"}},
        {{"--eps", "1e-300"}, {"--eps: must be 0 or from 1.2e-38", "is 1e-300"}},
        {{"--eps", "1e-400"}, {"--eps: must be 0 or from 1.2e-38", "is 1e-400"}},
        {{"--lr", "1e39"}, {"--lr: must be 0 or from", "is 1e39"}},
        {{"--samples", "1000000000"}, {"--samples 1000000000", "at most 1024"}},
        {{"--steps", "9000000000000000000"}, {"--steps 9000000000000000000", "at most 1000000000000"}},
        {{"--n-layers", "100000"}, {"--n-layers 100000", "at most 2048"}},
        {{"--ffn-dim", "2147483640"}, {"--ffn-dim 2147483640", "at most 262144"}},
        {{"--skip-outliers", "all"}, {"--skip-outliers all", "none, loss, norm or both"}},
        {{"--skip-outliers", "loss", "--outlier-window", "0"}, {"--skip-outliers loss", "--outlier-window"}},
        {{"--outlier-window", "7"}, {"--outlier-window 7", "from 8"}},
        {{"--outlier-z", "0"}, {"--outlier-z 0", "above 0"}},
        {{"--schedule", "wsd", "--steps", "100", "--warmup-steps", "90"}, {"--warmup-steps 90", "--decay-fraction"}},
        {{"--decay-fraction", "1.5"}, {"--decay-fraction 1.5", "0 to 1"}},
        {{"stray"}, {"stray"}},
    };
    for (const BadCase& bad : cases) {
        const std::string text = error_of([&] { parse_with_data(bad.arguments); });
        for (const std::string& part : bad.message_holds)
            EXPECT_NE(text.find(part), std::string::npos) << "\"" << text << "\" lacks \"" << part << "\"";
        EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    }
    EXPECT_NE(error_of([] { parse({}); }).find("--train"), std::string::npos);
    EXPECT_EQ(error_of([] { parse({"--print-config"}); }), "");
}

TEST(Config, AValueMayBeginWithADash) {
    EXPECT_EQ(parse_with_data({"--prompt", "-abc d"}).prompt, "-abc d");
    EXPECT_EQ(parse_with_data({"--prompt=--abc"}).prompt, "--abc");
}

TEST(Config, AnEmptyFileIsOne) {
    const TempFolder folder;
    for (const char* text : {"", "\n", "# nothing\n"}) {
        write_file(folder / "run.toml", text);
        EXPECT_EQ(to_toml(parse_with_data({"--config", folder / "run.toml", "--out", "x"})), to_toml(parse_with_data({"--out", "x"})));
    }
}

// A file tells of a run, which a mode need not use all of; what somebody has just typed deserves a word.
TEST(Config, OptionsThatAModeHasNoUseForAreNoted) {
    const TempFolder folder;
    write_file(folder / "run.toml", "steps = 5\ntrain = \"x\"\n");
    const auto note = [&](std::vector<std::string> words) { return parse(words).mode_note; };
    EXPECT_EQ(note({"--generate", "run", "--steps", "100", "--recipe", "bf16", "--deterministic", "--top-k", "5"}), "--generate has no use for --recipe, --steps");
    EXPECT_EQ(note({"--generate", "run", "--prompt", "", "--device", "cpu", "--seed", "3", "--config", folder / "run.toml"}), "");
    EXPECT_EQ(note({"--evaluate", "run", "--val", "v", "--temperature", "0"}), "--evaluate has no use for --temperature");
    EXPECT_EQ(note({"--dry-run", "--prompt", "x"}), "");
    EXPECT_EQ(note({"--train", "x", "--verify=false"}), "");
}

TEST(Config, AnyTextRoundTrips) {
    const TempFolder folder;
    for (const std::string text : {"a#b", "it's", "say \"hi\"", "back\\slash\\", "tab\there", "line\nbreak", "\x01\x1f\x7f", "häuser/中文/😀", " ", "'", "= [x]"}) {
        const Config c = parse({"--train", text, "--val", text});
        write_file(folder / "run.toml", to_toml(c));
        const Config again = parse({"--config", folder / "run.toml"});
        EXPECT_EQ(again.train, text);
        EXPECT_EQ(to_toml(again), to_toml(c));
    }
}

TEST(Config, LettersBeyondAsciiAreReadInAnyQuotes) {
    const TempFolder folder;
    const auto prompt_of = [&](const std::string& text) {
        write_file(folder / "run.toml", text + "\n");
        return parse_with_data({"--config", folder / "run.toml"}).prompt;
    };
    EXPECT_EQ(prompt_of(R"(prompt = "é\t中😀\\" # café)"), "é\t中😀\\");
    EXPECT_EQ(prompt_of(R"(prompt = 'é \n "q"')"), R"(é \n "q")");
    EXPECT_EQ(prompt_of("prompt = '''\né\\\nit''s \"\"\"'''''"), "é\\\nit''s \"\"\"''");
    EXPECT_EQ(prompt_of("prompt = \"\"\"\né \\\n   é \"\"q\"\"\"\"\""), "é é \"\"q\"\"");
    EXPECT_EQ(prompt_of("\xEF\xBB\xBF'prompt' = 'é'  # \xff"), "é");
}

// As --print-config does: what follows from the moment, the machine or the steps stays open.
TEST(Config, GivenTextHasWhatWasAskedFor) {
    const TempFolder folder;
    const auto again = [&](const std::string& text, std::vector<std::string> more) {
        write_file(folder / "run.toml", text);
        more.insert(more.end(), {"--config", folder / "run.toml"});
        return parse(more);
    };
    const std::string text = given_toml(parse_with_data({"--steps", "100", "--lr", "1e-3", "--dim", "512", "--n-heads", "8", "--seed", "18446744073709551615"}));
    for (const char* line : {"\n# out = \"runs/DATE-TIME-gpt2-124M\"\n", "\n# warmup-steps = 5\n", "\n# gemm-cache = ", "\nsteps = 100\n"})
        EXPECT_NE(text.find(line), std::string::npos) << line << text;
    EXPECT_EQ(given_toml(again(text, {})), text);
    EXPECT_EQ(again(text, {"--steps", "200"}).warmup_steps, 10);
    EXPECT_TRUE(again(text, {}).out_is_default);

    const std::string chosen = given_toml(parse_with_data({"--steps", "100", "--warmup-steps", "5", "--out", "here", "--gemm-cache", ""}));
    for (const char* line : {"\nout = \"here\"\n", "\nwarmup-steps = 5\n", "\ngemm-cache = \"\"\n"}) EXPECT_NE(chosen.find(line), std::string::npos) << line << chosen;
    EXPECT_EQ(given_toml(again(chosen, {})), chosen);
}

TEST(Config, MicroBatchCanBeAuto) {
    const TempFolder folder;
    const Config c = parse_with_data({"--micro-batch", "auto"});
    EXPECT_EQ(c.micro_batch, 0);
    EXPECT_NE(to_toml(c).find("micro-batch = \"auto\"\n"), std::string::npos);
    write_file(folder / "run.toml", to_toml(c));
    EXPECT_EQ(parse({"--config", folder / "run.toml"}).micro_batch, 0);
    EXPECT_EQ(parse({"--config", folder / "run.toml", "--micro-batch", "16"}).micro_batch, 16);
}

TEST(Config, MarkdownHoldsEveryOption) {
    const std::string text = options_markdown();
    EXPECT_NE(text.find("| `--lr` | `6e-04` | peak learning rate |"), std::string::npos) << text;
    EXPECT_NE(text.find("| `--print-config` |  |"), std::string::npos) << text;
}

TEST(Config, HelpExitsWithSuccess) { EXPECT_EXIT(parse({"--help"}), testing::ExitedWithCode(0), ""); }

}  // namespace
