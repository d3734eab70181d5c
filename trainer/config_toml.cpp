// TOML files: read by toml++, written by hand, because comments and the order of the options matter.
#include <charconv>
#include <cmath>
#include <limits>
#include <set>

#include "kernels/common/check.h"

// toml++ asserts what a malformed file can break ("[,"): for us that is an error like any other.
[[gnu::noinline]] static void malformed() { throw Error("not valid TOML"); }
#define TOML_ASSERT(condition) (static_cast<bool>(condition) ? void() : malformed())
#include <toml++/toml.h>

#include "trainer/ascii_toml.h"
#include "trainer/config_options.h"

namespace {

// A name that is known, but not for a file: what it is instead. "" for any other.
std::string not_for_a_file(const std::string& name) {
    if (name == "config") return "a file cannot name another one";
    std::string mode = name == "help" ? "is for the command line" : "";
    const Config defaults;
    for_each_option(defaults, [&](const OptionInfo& info, const auto&) {
        if (info.group == kModes && info.name == name) mode = "is no part of a run: give --" + name + " on the command line";
    });
    return mode;
}

// Puts one key's value into the field of its name.
class FieldReader {
  public:
    FieldReader(const std::string& file, const std::string& key, const toml::node& node) : file_(file), key_(key), node_(node) {}
    bool found() const { return found_; }

    template <typename T>
    void operator()(const OptionInfo& info, T& field) {
        if (key_ != info.name || info.group == kModes) return;
        found_ = true;
        if (info.zero && node_.value_exact<std::string>() == info.zero) {
            field = T{};
            return;
        }
        read(field);
        REQUIRE(!info.zero || field != T{}, "%s must be at least 1, or \"%s\", is 0", where().c_str(), info.zero);
    }

  private:
    void read(bool& field) { field = exact<bool>("must be true or false"); }
    void read(std::string& field) { field = exact<std::string>("must be text in quotes"); }
    void read(float& field) {
        const std::optional<double> value = node_.is_number() ? node_.value<double>() : std::nullopt;
        REQUIRE(value, "%s must be a number, is %s", where().c_str(), given().c_str());
        REQUIRE(is_float(*value), "%s %s, is %s", where().c_str(), kFloatRule, given().c_str());
        field = float(*value);
    }
    template <typename Integer>
    void read(Integer& field) {
        // TOML's whole numbers end at 2^63; what lies above is written in quotes.
        if (const auto text = node_.value_exact<std::string>(); text && std::is_same_v<Integer, uint64_t>) {
            const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), field);
            if (error == std::errc() && end == text->data() + text->size()) return;
        }
        REQUIRE(!node_.is_floating_point(), "%s must be a whole number without point or exponent, is %s", where().c_str(), given().c_str());
        const std::optional<int64_t> value = node_.value_exact<int64_t>();
        const bool fits = value && std::in_range<Integer>(*value);
        REQUIRE(fits, "%s must be a whole number from %s to %s, is %s", where().c_str(), std::to_string(std::numeric_limits<Integer>::min()).c_str(),
                std::to_string(std::numeric_limits<Integer>::max()).c_str(), given().c_str());
        field = Integer(*value);
    }

    template <typename T>
    T exact(const char* rule) {
        const std::optional<T> value = node_.value_exact<T>();
        REQUIRE(value, "%s %s, is %s", where().c_str(), rule, given().c_str());
        return *value;
    }
    std::string where() const { return message("%s: line %u: %s:", file_.c_str(), node_.source().begin.line, key_.c_str()); }
    std::string given() const {
        if (const auto text = node_.value_exact<std::string>()) return toml_value(*text);
        if (const auto number = node_.value_exact<double>()) {
            char digits[32];
            const std::string text(digits, std::to_chars(digits, digits + sizeof(digits), *number).ptr);
            return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
        }
        if (node_.is_table()) return "a table";
        if (node_.is_array()) return "an array";
        std::ostringstream text;
        node_.visit([&](const auto& value) { text << value; });
        return text.str();
    }

    const std::string& file_;
    const std::string& key_;
    const toml::node& node_;
    bool found_ = false;
};

struct Writer {
    ModelSpec spec;
    std::set<std::string> comments;  // options that are written as comments
    std::string text = "";
    std::string group = "";

    template <typename T>
    void operator()(const OptionInfo& info, const T& value) {
        if (info.group == kModes) return;
        const std::string name = info.name, shown = info.zero && value == T{} ? toml_value(std::string(info.zero)) : toml_value(value);
        if (group != info.group) text += (group.empty() ? "# " : "\n# ") + (group = info.group) + "\n";
        const SizeOption* size = std::find_if(std::begin(kSizes), std::end(kSizes), [&](const auto& s) { return s.name == name; });
        if (size != std::end(kSizes) && shown == "0") text += "# " + name + " = " + std::to_string(spec.*size->field) + "\n";
        else text += (comments.contains(name) ? "# " : "") + name + " = " + shown + "\n";
    }
};

std::string written(const Config& config, const std::set<std::string>& comments) {
    Writer writer{config.model_spec(), comments};
    for_each_option(config, writer);
    return writer.text;
}

}  // namespace

void read_toml(const std::string& text, const std::string& file, Config& config) {
    toml::table table;
    const std::string ascii = ascii_toml(text, file);
    try {
        table = toml::parse(ascii, file);
    } catch (const Error& error) {
        throw Error(file + ": " + error.what());
    } catch (const toml::parse_error& error) {
        throw Error(message("%s: line %u: %s", file.c_str(), error.source().begin.line, std::string(error.description()).c_str()));
    }
    for (const auto& [key, node] : table) {
        const std::string name(key.str());
        FieldReader reader(file, name, node);
        for_each_option(config, reader);
        const std::string other = not_for_a_file(name);
        REQUIRE(other.empty(), "%s: line %u: %s: %s", file.c_str(), node.source().begin.line, name.c_str(), other.c_str());
        REQUIRE(reader.found(), "%s: line %u: unknown %s %s%s", file.c_str(), node.source().begin.line, node.is_table() ? "table" : "key",
                name.c_str(), node.is_table() ? ": every option stands on a line of its own, in no table" : suggestion(name, "").c_str());
    }
}

std::string to_toml(const Config& config) { return written(config, {}); }

std::string given_toml(const Config& config) {
    Config given = config;
    std::set<std::string> comments;
    if (config.out_is_default) comments.insert("out"), given.out = "runs/DATE-TIME-" + config.model;
    if (config.warmup_is_default) comments.insert("warmup-steps");
    if (config.gemm_cache_is_default) comments.insert("gemm-cache");
    return written(given, comments);
}

// ---------------------------------------------------------------------------------------------------------------------
// Values

std::string toml_value(const std::string& text) {
    std::string quoted = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') quoted += '\\';
        if (static_cast<unsigned char>(c) < ' ' || c == '\x7f') quoted += message("\\u%04X", c);
        else quoted += c;
    }
    return quoted + '"';
}
std::string toml_value(bool value) { return value ? "true" : "false"; }
std::string toml_value(float value) {
    char digits[32];
    std::string text(digits, std::to_chars(digits, digits + sizeof(digits), value).ptr);  // shortest that reads back
    return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;           // e: 6e-04; n: inf, nan
}
std::string toml_value(int value) { return std::to_string(value); }
std::string toml_value(int64_t value) { return std::to_string(value); }
std::string toml_value(uint64_t value) {
    const std::string digits = std::to_string(value);
    return value <= uint64_t(std::numeric_limits<int64_t>::max()) ? digits : '"' + digits + '"';
}
