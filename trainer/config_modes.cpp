// What is asked for instead of training, and which options it has a use for.
#include <algorithm>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/common/check.h"
#include "trainer/config_options.h"

namespace {

// The options of a checkpoint's use; those of its model and recipe come from the checkpoint.
constexpr std::string_view kDevice[] = {"device", "attention", "deterministic", "no-graph", "gemm-cache", "gpt2-ranks", "timeout"};
constexpr std::string_view kGenerate[] = {"prompt", "samples", "max-tokens", "temperature", "top-k", "seed"};
constexpr std::string_view kEvaluate[] = {"val", "eval-tokens", "multiple-choice", "micro-batch"};

// The modes of the command line, and the other options of it.
struct Sorter {
    const std::set<std::string>& given;
    std::vector<std::string> modes, others;

    void operator()(const OptionInfo& info, const std::string& value) {
        if (!given.contains(info.name)) return;
        if (info.group == kModes) REQUIRE(!value.empty(), "--%s: is empty; give the folder of a checkpoint, or of a run", info.name);
        (info.group == kModes ? modes : others).push_back(info.name);
    }
    void operator()(const OptionInfo& info, const bool& value) {
        if (given.contains(info.name) && (info.group != kModes || value)) (info.group == kModes ? modes : others).push_back(info.name);
    }
    template <typename T>
    void operator()(const OptionInfo& info, const T&) {
        if (given.contains(info.name)) others.push_back(info.name);
    }
};

bool is_in(const std::string& name, std::span<const std::string_view> names) { return std::find(names.begin(), names.end(), name) != names.end(); }

}  // namespace

std::string check_modes(const Config& config, const std::set<std::string>& given) {
    Sorter sorter{given, {}, {}};
    for_each_option(config, sorter);
    if (sorter.modes.empty()) return "";
    const std::string& mode = sorter.modes[0];
    REQUIRE(sorter.modes.size() == 1, "--%s and --%s: give one of them at a time", mode.c_str(), sorter.modes[1].c_str());
    if (mode != "generate" && mode != "evaluate") return "";  // the others tell of a run with all its options
    std::string unused;
    for (const std::string& name : sorter.others)
        if (!is_in(name, kDevice) && !is_in(name, mode == "generate" ? std::span<const std::string_view>(kGenerate) : kEvaluate))
            unused += (unused.empty() ? "--" : ", --") + name;
    return unused.empty() ? "" : message("--%s has no use for %s", mode.c_str(), unused.c_str());
}
