#include "trainer/config.h"

#include <CLI/CLI.hpp>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "kernels/common/check.h"
#include "trainer/config_options.h"
#include "trainer/standard_output.h"

namespace {

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
    if (error == std::errc::invalid_argument || end != text.data() + text.size()) return "must be a number, is " + text;
    return error == std::errc() && is_float(value) ? "" : std::string(kFloatRule) + ", is " + text;
}

struct CommandLineBuilder {
    CLI::App& app;

    void operator()(const OptionInfo& info, bool& field) {
        app.add_flag(std::string("--") + info.name, field, info.description)->group(std::string(info.group));
    }
    void operator()(const OptionInfo& info, std::string& field) { add(info, field); }
    void operator()(const OptionInfo& info, float& field) { add(info, field)->check(CLI::Validator(check_number, "")); }
    template <typename Integer>
    void operator()(const OptionInfo& info, Integer& field) {
        CLI::Option* option = add(info, field)->check(CLI::Validator(check_whole_number<Integer>, ""));
        if (info.zero == nullptr) return;
        option->transform(CLI::Validator([zero = std::string(info.zero)](std::string& text) {
            if (text == zero) text = "0";
            else if (text == "0") return "must be at least 1, or " + zero + ", is 0";
            return std::string();
        }, ""));
    }

  private:
    template <typename T>
    CLI::Option* add(const OptionInfo& info, T& field) {
        return app.add_option(std::string("--") + info.name, field, info.description)
            ->group(std::string(info.group))
            ->capture_default_str();
    }
};

struct OptionNames {
    std::vector<std::string> names{"help", "config"};
    template <typename T>
    void operator()(const OptionInfo& info, const T&) {
        names.push_back(info.name);
    }
};

size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    std::iota(row.begin(), row.end(), size_t(0));
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = std::exchange(row[0], i);
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({change, row[j] + 1, row[j - 1] + 1});
        }
    }
    return row[b.size()];
}

std::string flag_of(const std::string& word) { return word.substr(0, word.find('=')); }

void require_known_flags(int argc, char** argv) {
    OptionNames options;
    const Config defaults;
    for_each_option(defaults, options);
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        const bool value = i > 1 && std::string(argv[i - 1]).starts_with("--");  // of --prompt, for one
        const bool one_dash = word.size() > 2 && word[0] == '-' && std::isalpha(static_cast<unsigned char>(word[1]));  // -h is an option
        REQUIRE(!one_dash || value, "%s: no such option%s", word.c_str(), suggestion(flag_of(word).substr(1), "--").c_str());
        if (!word.starts_with("--")) continue;
        const std::string name = flag_of(word).substr(2);
        REQUIRE(std::find(options.names.begin(), options.names.end(), name) != options.names.end(), "--%s: no such option%s", name.c_str(),
                suggestion(name, "--").c_str());
    }
}

// The command line's words in reverse, as CLI11 wants them, where a repeated flag counts only with its last value: so
// that a script's defaults can be overridden by what is appended.
std::vector<std::string> last_of_repeated(int argc, char** argv) {
    std::vector<std::vector<std::string>> groups;  // a flag and the words up to the next one
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (groups.empty() || word.starts_with("--") || word == "-h") groups.emplace_back();
        groups.back().push_back(word);
    }
    std::vector<std::string> words;
    std::set<std::string> seen;
    for (auto group = groups.rbegin(); group != groups.rend(); ++group)
        if (!group->at(0).starts_with("--") || seen.insert(flag_of(group->at(0))).second) words.insert(words.end(), group->rbegin(), group->rend());
    return words;
}

struct CommandLine {
    std::string file;             // of --config
    std::set<std::string> given;  // options that are on it
};

// Puts what the command line says into `config`.
CommandLine parse_command_line(int argc, char** argv, Config& config) {
    std::string file;
    CLI::App app("Trains GPT models in FP8.", "train_gpt_fp8");
    app.set_help_flag("-h,--help", "print this and exit");
    app.add_option("--config", file, "TOML file of these options without the dashes; the command line wins");
    for_each_option(config, CommandLineBuilder{app});
    try {
        app.parse(last_of_repeated(argc, argv));
    } catch (const CLI::CallForHelp&) {
        std::fputs(app.help().c_str(), stdout);
        require_written_output();
        std::exit(0);
    } catch (const CLI::ParseError& error) {
        throw Error(error.what());
    }
    REQUIRE(app.count("--config") == 0 || !file.empty(), "--config: is empty; give a TOML file");
    CommandLine line{.file = file, .given = {}};
    for (const CLI::Option* option : app.get_options())
        if (option->count() > 0) line.given.insert(option->get_single_name());
    return line;
}

// A pipe, as of a shell's <(...), serves too; what never ends does not.
std::string read_text_file(const std::string& path) {
    constexpr size_t kMostBytes = size_t(1) << 20;
    REQUIRE(!std::filesystem::is_directory(path), "--config %s: is a folder; give a TOML file, such as the config.toml in a run's folder", path.c_str());
    errno = 0;
    std::ifstream in(path, std::ios::binary);
    REQUIRE(in, "--config %s: cannot open: %s", path.c_str(), std::strerror(errno));
    std::string text(kMostBytes + 1, '\0');
    in.read(text.data(), std::streamsize(text.size()));
    REQUIRE(!in.bad(), "--config %s: cannot read: %s", path.c_str(), std::strerror(errno));
    text.resize(size_t(in.gcount()));
    REQUIRE(text.size() <= kMostBytes, "--config %s: has more than %zu bytes, is no file of options", path.c_str(), kMostBytes);
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// What follows from the machine and the moment

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
// The table of OPTIONS.md

struct MarkdownWriter {
    std::string text, group;

    template <typename T>
    void operator()(const OptionInfo& info, const T& value) {
        if (group != info.group) {
            group = info.group;
            text += "\n## " + group + "\n\n| option | default | |\n|---|---|---|\n";
        }
        std::string shown = info.zero && value == T{} ? info.zero : toml_value(value);
        std::string meaning = info.description;
        for (size_t at = 0; (at = meaning.find('|', at)) != std::string::npos; at += 2) meaning.insert(at, "\\");
        text += "| `--" + std::string(info.name) + "` | " + (shown == "\"\"" || info.group == kModes ? "" : "`" + shown + "`") + " | " + meaning + " |\n";
    }
};

}  // namespace

std::string suggestion(const std::string& unknown, const char* dashes) {
    OptionNames options;
    const Config defaults;
    for_each_option(defaults, options);
    std::string best;
    size_t least = std::max<size_t>(2, unknown.size() / 3) + 1;
    for (const std::string& name : options.names) {
        const size_t distance = edit_distance(unknown, name);
        if (distance < least) least = distance, best = name;
    }
    return best.empty() ? "" : ", did you mean " + std::string(dashes) + best + "?";
}

std::string options_markdown() {
    MarkdownWriter writer;
    const Config defaults;
    for_each_option(defaults, writer);
    return "# Options\n\nMade by `make options` from the program itself (`train_gpt_fp8 --help-markdown`). The same names, without the dashes, "
           "are the keys of a TOML file for `--config`;\nthe command line wins over the file, the file over the defaults.\n" + writer.text;
}

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
    require_known_flags(argc, argv);
    Config config;
    config.gemm_cache = default_gemm_cache();
    Config words_alone = config;
    const CommandLine line = parse_command_line(argc, argv, words_alone);
    const std::string note = check_modes(words_alone, line.given);
    if (!line.file.empty()) {
        read_toml(read_text_file(line.file), "--config " + line.file, config);
        parse_command_line(argc, argv, config);
    } else {
        config = words_alone;
    }
    config.mode_note = note;
    REQUIRE(config.resume != "auto" || !config.out.empty(), "--resume auto: needs --out, the folder to look in");
    config.warmup_is_default = config.warmup_steps == -1;
    if (config.warmup_is_default) config.warmup_steps = std::min<int64_t>(700, config.steps / 20);
    config.gemm_cache_is_default = config.gemm_cache == default_gemm_cache();
    config.out_is_default = config.out.empty();
    if (config.out_is_default) config.out = default_out(config);
    validate(config);
    return config;
}
