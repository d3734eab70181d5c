// TOML in ASCII alone: toml++ 3.3 meets some letters beyond it with undefined behaviour (found by fuzz_config), so it never
// gets any. They stand in comments, where they become "?", and in quotes, where they become escapes: the same document, line
// by line.
#pragma once
#include <string>
#include <string_view>

// Throws Error naming `file` and the line where the text is not UTF-8, or not ASCII outside of quotes and comments.
std::string ascii_toml(const std::string& text, const std::string& file);

bool is_utf8(std::string_view text);
