#include "data/printable.h"

#include "data/utf8.h"

namespace {

// Of valid UTF-8.
std::string without_controls(std::string_view text) {
    std::string out;
    for (size_t at = 0; at < text.size(); ++at) {
        const auto byte = static_cast<unsigned char>(text[at]);
        if (byte == 0x7f || (byte < 0x20 && byte != '\n' && byte != '\t')) {
            out += "\xe2\x90";  // U+2400 and on: the pictures; that of delete is U+2421
            out += static_cast<char>(byte == 0x7f ? 0xa1 : 0x80 + byte);
        } else if (byte == 0xc2 && static_cast<unsigned char>(text[at + 1]) < 0xa0) {  // U+0080 to U+009F
            out += "\xef\xbf\xbd";
            ++at;
        } else {
            out += static_cast<char>(byte);
        }
    }
    return out;
}

}  // namespace

std::string printable(std::string_view bytes) {
    std::string repaired;
    return without_controls(valid_utf8(bytes, repaired));
}

std::string PrintableStream::push(std::string_view bytes) {
    waiting_ += bytes;
    const std::string_view ready(waiting_.data(), waiting_.size() - cut_sequence(waiting_));
    std::string text = printable(ready);
    waiting_.erase(0, ready.size());
    return text;
}

std::string PrintableStream::finish() {
    const std::string text = printable(waiting_);
    waiting_.clear();
    return text;
}
