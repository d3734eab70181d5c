#include "data/json_text.h"

#include <charconv>
#include <nlohmann/json.hpp>

#include "data/utf8.h"
#include "kernels/common/check.h"

namespace {

using Json = nlohmann::json;

constexpr const char* kLeaveOut = "leave such lines out with --skip-bad-lines";

// The code unit of the escape \uXXXX that begins at line[at], -1 when none does.
int escaped_unit(std::string_view line, size_t at) {
    if (at + 6 > line.size() || line[at] != '\\' || line[at + 1] != 'u') return -1;
    const char *digits = line.data() + at + 2, *end = digits + 4;
    uint16_t unit = 0;
    const auto [stop, error] = std::from_chars(digits, end, unit, 16);
    return error == std::errc() && stop == end ? unit : -1;
}

bool is_high_surrogate(int unit) { return unit >= 0xd800 && unit <= 0xdbff; }
bool is_low_surrogate(int unit) { return unit >= 0xdc00 && unit <= 0xdfff; }

// `line` with \ufffd for each escape of a surrogate that has no other half, as Python's json.dumps may write; no byte moves.
std::string_view whole_surrogates(std::string_view line, std::string& repaired) {
    bool copied = false;
    for (size_t at = line.find('\\'); at < line.size(); at = line.find('\\', at)) {
        const int unit = escaped_unit(line, at);
        const bool pair = is_high_surrogate(unit) && is_low_surrogate(escaped_unit(line, at + 6));
        if (!pair && (is_high_surrogate(unit) || is_low_surrogate(unit))) {
            if (!copied) repaired = line;
            copied = true;
            repaired.replace(at, 6, "\\ufffd");
        }
        at += pair ? 12 : unit >= 0 ? 6 : 2;
    }
    return copied ? repaired : line;
}

// Takes the one member out of the parser's events, without a tree of the rest.
class FieldReader final : public nlohmann::json_sax<Json> {
  public:
    FieldReader(const std::string& field, std::string& text) : field_(field), text_(text) {}

    bool null() override { return other_value(); }
    bool boolean(bool) override { return other_value(); }
    bool number_integer(number_integer_t) override { return other_value(); }
    bool number_unsigned(number_unsigned_t) override { return other_value(); }
    bool number_float(number_float_t, const string_t&) override { return other_value(); }
    bool binary(binary_t&) override { return other_value(); }
    bool string(string_t& value) override {
        if (depth_ == 0) return other_value();
        if (depth_ == 1 && wanted_) text_ = std::move(value), found_ = is_string_ = true;
        return true;
    }
    bool key(string_t& name) override {
        if (depth_ == 1) wanted_ = name == field_;
        return true;
    }
    bool start_object(size_t) override { return open(true); }
    bool start_array(size_t) override {
        if (depth_ == 0) problem_ = "one JSON object a line is expected, not an array";
        return depth_ > 0 && open(false);
    }
    bool end_object() override { return --depth_, true; }
    bool end_array() override { return --depth_, true; }
    bool parse_error(size_t position, const std::string&, const Json::exception&) override {
        problem_ = message("is not JSON at its byte %zu: mend it, or %s", position, kLeaveOut);
        return false;
    }

    std::string problem() const {
        if (!problem_.empty()) return problem_;
        if (!is_object_) return message("is not a JSON object: mend it, or %s", kLeaveOut);
        if (is_string_) return "";
        return message("%s \"%s\"%s: name the member with --text-field, or %s", found_ ? "has a member" : "has no member", field_.c_str(),
                       found_ ? " that is not a string" : "", kLeaveOut);
    }

  private:
    bool other_value() {
        if (depth_ == 1 && wanted_) found_ = true, is_string_ = false;
        return true;
    }
    bool open(bool object) {
        if (depth_ == 0) is_object_ = object;
        other_value();
        ++depth_;
        return true;
    }

    const std::string& field_;
    std::string& text_;
    std::string problem_;
    int64_t depth_ = 0;
    bool is_object_ = false, wanted_ = false, found_ = false, is_string_ = false;
};

std::string parse(std::string_view line, const std::string& field, std::string& text) {
    FieldReader reader(field, text);
    Json::sax_parse(line.begin(), line.end(), &reader);
    return reader.problem();
}

}  // namespace

std::string json_text(std::string_view line, const std::string& field, std::string& text) {
    std::string repaired, whole;
    line = valid_utf8(line, repaired);
    const std::string problem = parse(line, field, text);
    if (problem.empty()) return "";
    // To the parser a lone surrogate is an error: a line that parsed has none, and is not searched.
    const std::string_view mended = whole_surrogates(line, whole);
    return mended.data() == line.data() ? problem : parse(mended, field, text);
}
