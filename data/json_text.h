// The text of one line of a .jsonl file: a string member of its object, by name.
#pragma once
#include <string>
#include <string_view>

// Puts the member `field` of the JSON object `line` into `text` and returns "", or returns what is wrong with the line
// and what helps. Only the outermost object's members count, the last of equals; bytes that are not UTF-8 are replaced
// (utf8.h), and each escaped surrogate without its other half becomes U+FFFD.
std::string json_text(std::string_view line, const std::string& field, std::string& text);
