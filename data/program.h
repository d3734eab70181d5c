// What the programs of data/ share: every error is one line, and the status says whether all output has arrived.
#pragma once
#include <CLI/CLI.hpp>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <new>
#include <string>

#include "data/reason.h"
#include "kernels/common/check.h"

// CLI11 alone would read 010 as eight and a number that does not fit as the nearest one that does.
template <typename Integer>
CLI::Validator whole_number(Integer least, Integer most) {
    const std::string from = std::to_string(least), to = std::to_string(most);
    const auto check = [=](const std::string& text) {
        Integer value;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        if (error == std::errc() && end == text.data() + text.size() && std::to_string(value) == text && value >= least && value <= most) return std::string();
        return message("must be a whole number in plain digits from %s to %s, is %s", from.c_str(), to.c_str(), text.c_str());
    };
    return CLI::Validator(check, "in [" + from + " - " + to + "]");
}

// The parser's errors in the words of ours: what, the value, what is allowed.
inline std::string described(const CLI::ParseError& error) {
    const std::string text = error.what();
    const auto after = [&](const std::string& words) { return text.substr(text.rfind(words) + words.size()); };
    if (dynamic_cast<const CLI::ExtrasError*>(&error)) return after(": ") + ": no such option, see --help";
    if (!dynamic_cast<const CLI::ConversionError*>(&error)) return text + ", see --help";
    std::string option = after("convert: ");
    if (const size_t at = option.find(" = "); at != std::string::npos) option.replace(at, 3, " ");
    return option + ": is not a value that this option takes, see --help";
}

inline std::string described(const std::filesystem::filesystem_error& error) {
    return error.path1().string() + ": " + reason(error.code().value());
}

// Parses, works, and returns the status of the process.
template <typename Work>
int run_program(CLI::App& app, int argc, char** argv, Work&& work) {
    std::signal(SIGXFSZ, SIG_IGN);  // a write past the limit on a file's size fails and says why, where the signal would end us
    std::string error;
    try {
        app.parse(argc, argv);
        work();
    } catch (const CLI::Success& help) {
        app.exit(help);
    } catch (const CLI::ParseError& wrong) {
        error = described(wrong);
    } catch (const std::filesystem::filesystem_error& refused) {
        error = described(refused);
    } catch (const std::bad_alloc&) {
        error = "not enough memory";
    } catch (const std::exception& other) {
        error = other.what();
    }
    std::cout.flush();
    const bool arrived = std::fflush(stdout) == 0 && !std::ferror(stdout) && std::cout;
    if (error.empty() && !arrived) error = "standard output: cannot write: " + reason(errno);
    if (!error.empty()) std::fprintf(stderr, "error: %s\n", error.c_str());
    return error.empty() ? 0 : 1;
}
