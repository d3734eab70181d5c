#include "trainer/run/profiled_steps.h"

#include <chrono>
#include <cstdio>

#include "kernels/common/check.h"
#include "trainer/gpu_info.h"

namespace {
constexpr size_t kRows = 10;
double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

ProfiledSteps::ProfiledSteps(const Config& config) : steps_(config.profile) {
    if (steps_ == 0) return;
    REQUIRE(config.steps >= kSettling + steps_, "--profile %lld: needs --steps of at least %lld, is %lld", (long long)steps_, (long long)(kSettling + steps_),
            (long long)config.steps);
    const bool gpu = config.device != "cpu" && gpu_obstacle().empty();
    device_ = gpu ? gpu_info(0).name : "host";
    profiler_ = gpu ? make_gpu_profiler(peak_of(device_)) : make_host_profiler();
}

std::optional<Profile> ProfiledSteps::reach(int64_t steps) {
    if (steps == kSettling) {
        profiler_->begin();
        begin_s_ = now_s();
        return {};
    }
    const double step_ms = (now_s() - begin_s_) * 1e3 / double(steps_);
    const Profile profile = profiler_->end(steps_);
    profiler_.reset();
    std::printf("profile of %lld steps on %s: %.2f ms a step while traced, %.2f ms of them in %.0f marked or recorded pieces of work\n%s", (long long)steps_,
                device_.c_str(), step_ms, profile.summed_ms, profile.launches, format_profile(profile, kRows).c_str());
    std::fflush(stdout);
    return profile;
}
