// .jsonl: the text of each line. A text that was found must be found again in a line that is made from it.
#include <nlohmann/json.hpp>
#include <string>

#include "data/json_text.h"
#include "tests/fuzz/memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string file(reinterpret_cast<const char*>(data), size);
    std::string_view rest = file;
    while (!rest.empty()) {
        const std::string line(rest.substr(0, rest.find('\n')));  // a copy, so that reading past its end is seen
        rest.remove_prefix(std::min(rest.size(), line.size() + 1));
        std::string text, again;
        if (!json_text(line, "text", text).empty()) continue;
        FUZZ_CHECK(json_text(nlohmann::json{{"text", text}}.dump(), "text", again).empty());
        FUZZ_CHECK(again == text);
    }
    return 0;
}
