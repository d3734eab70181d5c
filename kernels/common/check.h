// Errors: one type, one macro. Host only (no CUDA), so that data/ can use it too.
//
// A message is one line for the person at the terminal: what is wrong, the value, what is allowed.
// The program's main() catches Error, prints "error: <message>" on stderr and exits with status 1.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// printf into a std::string.
[[gnu::format(printf, 1, 2)]] inline std::string message(const char* pattern, ...) {
    std::va_list args, counting;
    va_start(args, pattern);
    va_copy(counting, args);
    std::string text(static_cast<size_t>(std::vsnprintf(nullptr, 0, pattern, counting)), '\0');
    std::vsnprintf(text.data(), text.size() + 1, pattern, args);
    va_end(counting);
    va_end(args);
    return text;
}

// REQUIRE(n % 8 == 0, "gelu: n=%lld must be a multiple of 8", n) throws Error with that line.
#define REQUIRE(condition, ...)                        \
    do {                                               \
        if (!(condition)) throw Error(message(__VA_ARGS__)); \
    } while (0)
