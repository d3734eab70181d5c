#include <chrono>

#include "kernels/common/check.h"
#include "trainer/profiler.h"

namespace {

uint64_t now_ns() { return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count()); }

class HostProfiler final : public Profiler, public MarkListener {
  public:
    HostProfiler() { Mark::listen(this); }
    ~HostProfiler() override { Mark::listen(nullptr); }

    void enter(const MarkInfo& mark) override {
        charge();
        open_.push_back({marks_.enter(mark), 0});
    }
    void leave() override {
        charge();
        const Open mark = open_.back();
        if (!marks_.operation(mark.entry).empty()) records_.push_back({"", mark.entry, since_ns_ - mark.own_ns, since_ns_, 0});
        open_.pop_back();
        marks_.leave();
    }

    void begin() override {
        records_.clear();
        marks_.forget();
    }
    Profile end(int64_t steps) override { return summarize(records_, marks_, double(steps)); }

  private:
    struct Open {
        int entry;
        uint64_t own_ns;  // without the marks inside
    };
    // The time since the last enter or leave belongs to the innermost mark.
    void charge() {
        const uint64_t now = now_ns();
        if (!open_.empty()) open_.back().own_ns += now - since_ns_;
        since_ns_ = now;
    }

    MarkLog marks_;
    std::vector<Open> open_;
    std::vector<ProfileRecord> records_;
    uint64_t since_ns_ = 0;
};

}  // namespace

std::unique_ptr<Profiler> make_host_profiler() { return std::make_unique<HostProfiler>(); }
