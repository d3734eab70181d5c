#include "data/utf8.h"

#include <cstdint>

#include "data/hash.h"

namespace {

// Unicode's table 3-7: how many bytes follow a lead byte, and what the first of them may be.
struct LeadByte {
    int following;
    uint8_t low, high;
};

LeadByte lead_byte(uint8_t lead) {
    if (lead >= 0xc2 && lead <= 0xdf) return {1, 0x80, 0xbf};
    if (lead == 0xe0) return {2, 0xa0, 0xbf};
    if (lead == 0xed) return {2, 0x80, 0x9f};
    if (lead >= 0xe1 && lead <= 0xef) return {2, 0x80, 0xbf};
    if (lead == 0xf0) return {3, 0x90, 0xbf};
    if (lead >= 0xf1 && lead <= 0xf3) return {3, 0x80, 0xbf};
    if (lead == 0xf4) return {3, 0x80, 0x8f};
    return {-1, 0, 0};  // a stray continuation byte, or a lead byte that no valid sequence has
}

struct Sequence {
    size_t bytes;
    bool valid;
};

// The sequence that begins at text[at]; when invalid, `bytes` is its maximal subpart.
Sequence sequence_at(std::string_view text, size_t at) {
    const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
    if (byte(at) < 0x80) return {1, true};
    const LeadByte lead = lead_byte(byte(at));
    if (lead.following < 0) return {1, false};
    for (int i = 1; i <= lead.following; ++i) {
        const uint8_t low = i == 1 ? lead.low : 0x80, high = i == 1 ? lead.high : 0xbf;
        if (at + i >= text.size() || byte(at + i) < low || byte(at + i) > high) return {static_cast<size_t>(i), false};
    }
    return {static_cast<size_t>(lead.following) + 1, true};
}

size_t skip_ascii(std::string_view text, size_t at) {
    while (at + 8 <= text.size() && (load_bytes(text.data() + at, 8) & 0x8080808080808080u) == 0) at += 8;
    return at;
}

}  // namespace

std::string_view valid_utf8(std::string_view text, std::string& repaired) {
    bool copying = false;
    size_t copied = 0;  // everything before this is in `repaired` already, once copying
    for (size_t at = skip_ascii(text, 0); at < text.size(); at = skip_ascii(text, at)) {
        const Sequence sequence = sequence_at(text, at);
        if (!sequence.valid) {
            if (!copying) repaired.clear();
            copying = true;
            repaired.append(text, copied, at - copied).append("\xef\xbf\xbd");
            copied = at + sequence.bytes;
        }
        at += sequence.bytes;
    }
    if (!copying) return text;
    repaired.append(text, copied);
    return repaired;
}

size_t cut_sequence(std::string_view text) {
    for (size_t tail = 1; tail <= 3 && tail <= text.size(); ++tail) {
        const size_t at = text.size() - tail;
        if (lead_byte(static_cast<uint8_t>(text[at])).following < static_cast<int>(tail)) continue;
        const Sequence sequence = sequence_at(text, at);
        if (!sequence.valid && sequence.bytes == tail) return tail;
    }
    return 0;
}
