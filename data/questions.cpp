#include "data/questions.h"

#include <charconv>
#include <nlohmann/json.hpp>
#include <sstream>

#include "data/mapped_file.h"
#include "kernels/common/check.h"

namespace {

using Json = nlohmann::json;

// -1 for what is no label.
int parse_label(const Json& value) {
    int label = -1;
    if (value.is_number_integer()) {
        const auto wide = value.get<int64_t>();
        return wide >= 0 && wide <= 1'000'000 ? int(wide) : -1;
    }
    if (!value.is_string()) return -1;
    const auto& text = value.get_ref<const std::string&>();
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), label);
    return error == std::errc() && end == text.data() + text.size() ? label : -1;
}

Question parse_question(const std::string& line, const std::string& where) {
    const Json json = Json::parse(line, nullptr, false);
    REQUIRE(json.is_object(), "%s: is not a JSON object", where.c_str());
    const auto context = json.find(json.contains("context") ? "context" : "ctx");
    REQUIRE(context != json.end() && context->is_string(), "%s: \"context\" (or \"ctx\") must be a text", where.c_str());
    const auto endings = json.find("endings");
    REQUIRE(endings != json.end() && endings->is_array() && endings->size() >= 2, "%s: \"endings\" must be a list of at least 2 texts", where.c_str());
    Question question{.context = context->get<std::string>(), .endings = {}, .label = json.contains("label") ? parse_label(json["label"]) : -1};
    for (const Json& ending : *endings) {
        REQUIRE(ending.is_string() && !ending.get_ref<const std::string&>().empty(), "%s: every ending must be a text that is not empty", where.c_str());
        question.endings.push_back(ending.get<std::string>());
    }
    REQUIRE(question.label >= 0 && size_t(question.label) < question.endings.size(), "%s: \"label\" must be the number of an ending, from 0 to %zu",
            where.c_str(), question.endings.size() - 1);
    return question;
}

}  // namespace

std::vector<Question> read_questions(const std::string& path) {
    std::istringstream file{std::string(MappedFile(path).bytes())};
    std::vector<Question> questions;
    std::string line;
    for (long long number = 1; std::getline(file, line); ++number) {
        if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
        questions.push_back(parse_question(line, message("%s line %lld", path.c_str(), number)));
    }
    REQUIRE(!questions.empty(), "%s: holds no question", path.c_str());
    return questions;
}
