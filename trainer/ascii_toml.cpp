#include "trainer/ascii_toml.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "kernels/common/check.h"

namespace {

bool is_ascii(char c) { return static_cast<unsigned char>(c) < 0x80; }

struct Character {
    uint32_t code;
    size_t bytes;  // 0: not UTF-8
};

Character character_at(std::string_view text, size_t at) {
    static constexpr uint32_t kFirstOfLength[] = {0, 0, 0x80, 0x800, 0x10000};
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned char lead = byte(at);
    if (lead < 0x80) return {lead, 1};
    const size_t bytes = lead >> 5 == 0x6 ? 2 : lead >> 4 == 0xe ? 3 : lead >> 3 == 0x1e ? 4 : 0;
    if (bytes == 0 || at + bytes > text.size()) return {0, 0};
    uint32_t code = lead & (0x7fu >> bytes);
    for (size_t i = at + 1; i < at + bytes; ++i) {
        if (byte(i) >> 6 != 0x2) return {0, 0};
        code = code << 6 | (byte(i) & 0x3fu);
    }
    const bool surrogate = code >= 0xd800 && code < 0xe000;
    return {code, code < kFirstOfLength[bytes] || surrogate || code > 0x10ffff ? 0 : bytes};
}

struct Quoted {
    size_t end;    // behind it
    size_t quotes; // 1, or 3 around several lines
    bool closed;
};

Quoted quoted_at(std::string_view text, size_t begin) {
    const char quote = text[begin];
    const std::string three(3, quote);
    const size_t quotes = text.substr(begin, 3) == three ? 3 : 1;
    for (size_t i = begin + quotes; i < text.size(); ++i) {
        if (quote == '"' && text[i] == '\\') ++i;
        else if (quotes == 1 && text[i] == '\n') return {i, quotes, false};
        else if (text.substr(i, quotes) == std::string_view(three).substr(0, quotes)) {
            i += quotes;
            // Up to two quotes may stand before the three that end it.
            for (int more = 0; quotes == 3 && more < 2 && i < text.size() && text[i] == quote; ++more) ++i;
            return {i, quotes, true};
        }
    }
    return {text.size(), quotes, false};
}

// In double quotes, as '...' knows no escapes. `text` is UTF-8.
std::string escaped(std::string_view text, const Quoted& form) {
    const bool literal = text[0] == '\'';
    const size_t body = form.quotes, body_end = text.size() - (form.closed ? form.quotes : 0);
    std::string out;
    for (size_t i = 0; i < text.size();) {
        const Character c = character_at(text, i);
        i += c.bytes;
        if (c.code >= 0x80) {
            out += message("\\U%08X", c.code);
        } else if (!literal && c.code == '\\' && i < text.size()) {
            const Character next = character_at(text, i);
            out += {'\\', next.code < 0x80 ? char(next.code) : '?'};  // neither is an escape
            i += next.bytes;
        } else if (literal && (i <= body || i > body_end)) {
            out += '"';
        } else {
            if (literal && (c.code == '\\' || c.code == '"')) out += '\\';
            out += char(c.code);
        }
    }
    return out;
}

}  // namespace

bool is_utf8(std::string_view text) {
    for (size_t i = 0, bytes; i < text.size(); i += bytes)
        if ((bytes = character_at(text, i).bytes) == 0) return false;
    return true;
}

std::string ascii_toml(const std::string& text, const std::string& file) {
    std::string out;
    const auto require = [&](bool condition, size_t at, const char* problem) {
        REQUIRE(condition, "%s: line %d: not %s", file.c_str(), int(1 + std::count(text.begin(), text.begin() + ptrdiff_t(at), '\n')), problem);
    };
    for (size_t i = text.starts_with("\xEF\xBB\xBF") ? 3 : 0, end; i < text.size(); i = end) {
        end = i + 1;
        const char c = text[i];
        if (c == '#') {
            end = std::min(text.find('\n', i), text.size());
            std::replace_copy_if(text.begin() + ptrdiff_t(i), text.begin() + ptrdiff_t(end), std::back_inserter(out), [](char x) { return !is_ascii(x); }, '?');
            continue;
        }
        require(is_ascii(c), i, "ASCII, outside of quotes and comments");
        if (c != '"' && c != '\'') {
            out += c;
            continue;
        }
        const Quoted form = quoted_at(text, i);
        end = form.end;
        const std::string_view quoted(text.data() + i, end - i);
        require(is_utf8(quoted), i, "UTF-8");
        out += std::all_of(quoted.begin(), quoted.end(), is_ascii) ? std::string(quoted) : escaped(quoted, form);
    }
    return out;
}
