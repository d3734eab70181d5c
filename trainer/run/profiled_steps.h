// --profile N: where the time of N steps goes, after two that capture graphs and settle.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "trainer/config.h"
#include "trainer/profiler.h"

class ProfiledSteps {
  public:
    explicit ProfiledSteps(const Config& config);  // before the engine is made

    // Whether the profile begins or ends when this run has made so many steps. No step may be in flight then.
    bool due(int64_t steps) const { return profiler_ && (steps == kSettling || steps == kSettling + steps_); }
    std::optional<Profile> reach(int64_t steps);  // begins, or ends and prints: then what was found
    int64_t steps() const { return steps_; }

  private:
    static constexpr int64_t kSettling = 2;
    int64_t steps_;
    std::string device_;
    std::unique_ptr<Profiler> profiler_;
    double begin_s_ = 0;
};
