#include "data/json_text.h"

#include <nlohmann/json.hpp>

#include "data/utf8.h"
#include "kernels/common/check.h"

namespace {

using Json = nlohmann::json;

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
    bool start_array(size_t) override { return open(false); }
    bool end_object() override { return --depth_, true; }
    bool end_array() override { return --depth_, true; }
    bool parse_error(size_t position, const std::string&, const Json::exception&) override {
        problem_ = message("is not JSON at its byte %zu", position);
        return false;
    }

    std::string problem() const {
        if (!problem_.empty()) return problem_;
        if (!is_object_) return "is not a JSON object";
        if (!found_) return message("has no member \"%s\"", field_.c_str());
        return is_string_ ? "" : message("has a member \"%s\" that is not a string", field_.c_str());
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

}  // namespace

std::string json_text(std::string_view line, const std::string& field, std::string& text) {
    std::string repaired;
    line = valid_utf8(line, repaired);
    FieldReader reader(field, text);
    Json::sax_parse(line.begin(), line.end(), &reader);
    return reader.problem();
}
