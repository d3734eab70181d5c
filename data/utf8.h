// UTF-8 as Python reads it with errors="replace".
#pragma once
#include <string>
#include <string_view>

// `text` itself when it is valid UTF-8. Otherwise a view of `repaired`: each maximal run of bytes that begins a valid
// sequence but is cut short, and each other invalid byte, becomes one U+FFFD (Unicode 15, section 3.9, "substitution of
// maximal subparts"; encoded surrogates and values above U+10FFFF are invalid).
std::string_view valid_utf8(std::string_view text, std::string& repaired);

// The number of bytes at the end of `text`, 0 to 3, that begin a valid sequence but do not complete it.
size_t cut_sequence(std::string_view text);
