#include "trainer/profile.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "kernels/common/check.h"
#include "trainer/metrics.h"

// ---------------------------------------------------------------------------------------------------------------------
// Marks

int MarkLog::enter(const MarkInfo& mark) {
    const Operation& around = operations_[size_t(stack_.empty() ? 0 : entries_[size_t(stack_.back())].operation)];
    Operation inside = around;
    if (mark.instance < 0) {
        if (!inside.name.empty()) inside.name += ' ';
        inside.name += mark.name;
        if (inside.phase.empty()) inside.phase = mark.name;
    }
    const auto [at, is_new] = index_.try_emplace(inside.name, int(operations_.size()));
    if (is_new) operations_.push_back(inside);
    entries_.push_back({at->second, mark.cost, 0});
    stack_.push_back(int(entries_.size()) - 1);
    return stack_.back();
}

void MarkLog::forget() {
    REQUIRE(stack_.empty(), "%zu marks are open", stack_.size());
    entries_.clear();
}

const std::string& MarkLog::operation(int entry) const {
    return operations_[size_t(entry == kNone ? 0 : entries_[size_t(entry)].operation)].name;
}

const std::string& MarkLog::phase(int entry) const {
    return operations_[size_t(entry == kNone ? 0 : entries_[size_t(entry)].operation)].phase;
}

double MarkLog::ideal_s(int entry, const Peak& peak) const {
    if (entry == kNone) return 0;
    const Entry& e = entries_[size_t(entry)];
    const double tflops = is_fp8(e.cost.format) ? peak.fp8_tflops : peak.bf16_tflops;
    const double compute = tflops > 0 ? e.cost.flops / (tflops * 1e12) : 0;
    const double traffic = peak.memory_tb_per_s > 0 ? e.cost.bytes / (peak.memory_tb_per_s * 1e12) : 0;
    return std::max(compute, traffic) / std::max(1, e.kernels);
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

namespace {

struct Sum {
    double calls = 0, ms = 0, ideal_ms = 0;
    std::map<std::string, double> kernels;  // ms
};

ProfileRow row_of(const std::string& operation, const Sum& sum, double summed_ms) {
    const auto longest = std::max_element(sum.kernels.begin(), sum.kernels.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    return {.operation = operation, .kernel = longest->first, .calls = sum.calls, .ms = sum.ms, .share = sum.ms / summed_ms,
            .of_ceiling = sum.ideal_ms > 0 ? sum.ideal_ms / sum.ms : std::numeric_limits<double>::quiet_NaN()};
}

std::string name_of(const std::string& operation) { return operation.empty() ? "(no mark)" : operation; }

void add_to_phase(std::vector<Profile::Phase>& phases, const std::string& name, double ms) {
    const auto at = std::find_if(phases.begin(), phases.end(), [&](const Profile::Phase& phase) { return phase.name == name; });
    if (at == phases.end()) phases.push_back({name, ms});
    else at->ms += ms;
}

// Sorted, overlapping ones joined.
std::vector<Span> joined(std::vector<Span> spans) {
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.start_ns < b.start_ns; });
    std::vector<Span> apart;
    for (const Span& s : spans) {
        if (apart.empty() || s.start_ns > apart.back().end_ns) apart.push_back(s);
        else apart.back().end_ns = std::max(apart.back().end_ns, s.end_ns);
    }
    return apart;
}

std::vector<Span> spans_of(const std::vector<ProfileRecord>& records, Work work) {
    std::vector<Span> spans;
    for (const ProfileRecord& r : records)
        if (r.work == work) spans.push_back({r.start_ns, r.end_ns});
    return spans;
}

std::vector<CommunicationRow> communication_rows(const std::vector<ProfileRecord>& records, const MarkLog& marks, double steps) {
    std::map<std::pair<std::string, std::string>, std::vector<Span>> kinds;
    for (const ProfileRecord& r : records)
        if (r.work == Work::communication) kinds[{marks.operation(r.entry), r.kernel}].push_back({r.start_ns, r.end_ns});
    const std::vector<Span> compute = spans_of(records, Work::compute);
    std::vector<CommunicationRow> rows;
    for (const auto& [kind, spans] : kinds) {
        const Covered c = covered(spans, compute);
        rows.push_back({kind.first, kind.second, double(spans.size()) / steps, double(c.total_ns) * 1e-6 / steps, double(c.exposed_ns) * 1e-6 / steps});
    }
    std::sort(rows.begin(), rows.end(), [](const CommunicationRow& a, const CommunicationRow& b) { return a.exposed_ms > b.exposed_ms; });
    return rows;
}

}  // namespace

Work work_of_kernel(const std::string& name) { return name.starts_with("nccl") ? Work::communication : Work::compute; }

Covered covered(std::vector<Span> spans, std::vector<Span> by) {
    spans = joined(std::move(spans)), by = joined(std::move(by));
    Covered sum;
    size_t first = 0;  // of `by`: those before it end before the span starts
    for (const Span& s : spans) {
        sum.total_ns += s.end_ns - s.start_ns;
        uint64_t from = s.start_ns;  // what is before it is settled
        while (first < by.size() && by[first].end_ns <= s.start_ns) ++first;
        for (size_t i = first; i < by.size() && by[i].start_ns < s.end_ns; ++i) {
            if (by[i].start_ns > from) sum.exposed_ns += by[i].start_ns - from;
            from = std::min(by[i].end_ns, s.end_ns);
        }
        sum.exposed_ns += s.end_ns - from;
    }
    return sum;
}

Profile summarize(std::vector<ProfileRecord> records, const MarkLog& marks, double steps) {
    REQUIRE(!records.empty(), "the profiler recorded nothing");
    std::sort(records.begin(), records.end(), [](const ProfileRecord& a, const ProfileRecord& b) { return a.start_ns < b.start_ns; });
    Profile profile;
    std::map<std::pair<std::string, std::string>, Sum> sums;  // what has no cost of its own is told apart by its kernel
    uint64_t busy = 0, covered_to = records.front().start_ns;
    for (const ProfileRecord& r : records) {
        if (r.end_ns > covered_to) busy += r.end_ns - std::max(r.start_ns, covered_to), covered_to = r.end_ns;
        const double ms = double(r.end_ns - r.start_ns) * 1e-6 / steps;
        Sum& sum = sums[{marks.operation(r.entry), r.ideal_s > 0 ? "" : r.kernel}];
        sum.calls += 1 / steps;
        sum.ms += ms;
        sum.ideal_ms += r.ideal_s * 1e3 / steps;
        sum.kernels[r.kernel] += ms;
        profile.summed_ms += ms;
        const std::string& phase = marks.phase(r.entry);
        add_to_phase(profile.phases, phase.empty() ? "other" : phase, ms);
        const uint64_t origin = records.front().start_ns;
        profile.timeline.push_back({marks.operation(r.entry), r.kernel, r.work, r.stream, r.start_ns - origin, r.end_ns - origin});
    }
    profile.busy_ms = double(busy) * 1e-6 / steps;
    profile.span_ms = double(covered_to - records.front().start_ns) * 1e-6 / steps;
    profile.launches = double(records.size()) / steps;
    const Covered communication = covered(spans_of(records, Work::communication), spans_of(records, Work::compute));
    profile.communication_ms = double(communication.total_ns) * 1e-6 / steps;
    profile.exposed_ms = double(communication.exposed_ns) * 1e-6 / steps;
    profile.communication = communication_rows(records, marks, steps);
    for (const auto& [key, sum] : sums) profile.rows.push_back(row_of(key.first, sum, profile.summed_ms));
    std::sort(profile.rows.begin(), profile.rows.end(), [](const ProfileRow& a, const ProfileRow& b) { return a.ms > b.ms; });
    return profile;
}

std::string format_profile(const Profile& profile, size_t rows) {
    const size_t shown = std::min(rows, profile.rows.size());
    size_t width = 0;
    for (size_t i = 0; i < shown; ++i) width = std::max(width, name_of(profile.rows[i].operation).size());
    std::string text = message("%9s %7s %8s %11s  %-*s  %s\n", "ms", "share", "calls", "of ceiling", int(width), "operation", "kernel");
    for (size_t i = 0; i < shown; ++i) {
        const ProfileRow& r = profile.rows[i];
        text += message("%9.3f %7s %8.1f %11s  %-*s  %.60s\n", r.ms, format_percent(r.share, 1).c_str(), r.calls,
                        format_percent(r.of_ceiling, 0).c_str(), int(width), name_of(r.operation).c_str(), r.kernel.c_str());
    }
    text += "phases";
    for (const Profile::Phase& phase : profile.phases)
        text += message(" | %s %.3f ms, %s", phase.name.c_str(), phase.ms, format_percent(phase.ms / profile.summed_ms, 1).c_str());
    text += "\n";
    if (!profile.communication.empty()) text += message("%9s %9s %8s  communication (exposed: no compute beside it)\n", "ms", "exposed", "calls");
    for (const CommunicationRow& r : profile.communication)
        text += message("%9.3f %9.3f %8.1f  %s  %.60s\n", r.ms, r.exposed_ms, r.calls, name_of(r.operation).c_str(), r.kernel.c_str());
    return text;
}

std::string format_communication(const std::vector<double>& communication_ms, const std::vector<double>& exposed_ms) {
    std::string text;
    for (size_t r = 0; r < communication_ms.size(); ++r) {
        if (communication_ms[r] <= 0) continue;
        text += message("%s rank %zu %.3f ms, %.3f ms (%s) with no compute beside it", text.empty() ? "communication |" : " |", r, communication_ms[r], exposed_ms[r],
                        format_percent(exposed_ms[r] / communication_ms[r], 1).c_str());
    }
    return text.empty() ? "" : text + "\n";
}

std::string format_timeline(const Profile& profile, int rank) {
    constexpr const char* kWork[] = {"compute", "communication", "copy or fill"};
    nlohmann::ordered_json events = nlohmann::ordered_json::array();
    events.push_back({{"ph", "M"}, {"name", "process_name"}, {"pid", rank}, {"args", {{"name", message("rank %d", rank)}}}});
    for (const TimelineEvent& e : profile.timeline)
        events.push_back({{"ph", "X"}, {"name", name_of(e.operation)}, {"cat", kWork[int(e.work)]}, {"pid", rank}, {"tid", e.stream}, {"ts", double(e.start_ns) * 1e-3},
                          {"dur", double(e.end_ns - e.start_ns) * 1e-3}, {"args", {{"kernel", e.kernel}}}});
    return nlohmann::ordered_json{{"traceEvents", events}}.dump(-1, ' ', true, nlohmann::ordered_json::error_handler_t::replace);
}
