// Where a step's time goes: records of work, each with the mark (kernels/common/mark.h) it belongs to, become a table of
// operations with their share and their part of the ceiling.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kernels/common/mark.h"
#include "kernels/common/peak.h"

// The marks that were entered. An operation is a mark's name below the names of the marks around it; marks with an instance
// (layer 3, step 12) are left out of it, so that what they have in common is added up.
class MarkLog {
  public:
    static constexpr int kNone = -1;

    int enter(const MarkInfo& mark);  // returns the entry
    void leave() { stack_.pop_back(); }
    int current() const { return stack_.empty() ? kNone : stack_.back(); }
    void forget();  // every entry; no mark may be open

    // Several kernels may belong to one entry: they share its cost.
    void count_kernel(int entry) { if (entry != kNone) ++entries_[size_t(entry)].kernels; }

    const std::string& operation(int entry) const;       // "" for kNone
    const std::string& phase(int entry) const;           // the outermost name of the operation, "" for kNone
    double ideal_s(int entry, const Peak& peak) const;   // of one of the entry's kernels; 0 when there is no cost or no peak
    int kernels(int entry) const { return entry == kNone ? 0 : entries_[size_t(entry)].kernels; }

  private:
    struct Operation {
        std::string name, phase;
    };
    struct Entry {
        int operation;
        MarkCost cost;
        int kernels;
    };
    std::vector<Operation> operations_{{"", ""}};
    std::map<std::string, int> index_{{"", 0}};
    std::vector<Entry> entries_;
    std::vector<int> stack_;
};

// What keeps the GPU's multiprocessors busy for its own sake, what moves data between GPUs, and what is neither (copies, fills).
enum class Work : uint8_t { compute, communication, other };

struct ProfileRecord {
    std::string kernel;  // "" when only the operation is known
    int entry;           // of the MarkLog
    uint64_t start_ns, end_ns;
    double ideal_s;
    Work work = Work::compute;
    uint32_t stream = 0;
};
// Of a kernel by its name: NCCL's move data between GPUs.
Work work_of_kernel(const std::string& name);

// Time of a set of spans (their union), and of its part that no span of another set covers. Any order; spans may overlap.
struct Span {
    uint64_t start_ns, end_ns;
};
struct Covered {
    uint64_t total_ns = 0, exposed_ns = 0;
};
Covered covered(std::vector<Span> spans, std::vector<Span> by);

struct ProfileRow {
    std::string operation, kernel;  // the kernel that took the most of the operation's time
    double calls, ms, share;        // of a step; share of the summed time
    double of_ceiling;              // ideal time over measured time, NaN when nothing is known about the operation
};

// Communication of one kind: what of it no compute covers.
struct CommunicationRow {
    std::string operation, kernel;
    double calls, ms, exposed_ms;  // of a step
};

struct TimelineEvent {
    std::string operation, kernel;
    Work work;
    uint32_t stream;
    uint64_t start_ns, end_ns;  // since the first one started
};

struct Profile {
    double busy_ms = 0, span_ms = 0, summed_ms = 0;  // of a step: union of the records, first start to last end, sum
    double launches = 0;
    // Of a step: union of communication, and its part with no compute beside it. Copy engines' collectives wait for other ranks
    // before and after their copies without a record: a rank that only waits is idle, here and in busy_ms.
    double communication_ms = 0, exposed_ms = 0;
    std::vector<ProfileRow> rows;  // longest first
    struct Phase {
        std::string name;
        double ms;
    };
    std::vector<Phase> phases;     // in order of first appearance
    std::vector<CommunicationRow> communication;  // most exposed first
    std::vector<TimelineEvent> timeline;          // of all steps, in order of their starts
};

Profile summarize(std::vector<ProfileRecord> records, const MarkLog& marks, double steps);

// The table for people: one line a row, at most `rows` of them, then the phases, then what was communicated.
std::string format_profile(const Profile& profile, size_t rows);
// Of every rank, one line; "" where nobody communicated.
std::string format_communication(const std::vector<double>& communication_ms, const std::vector<double>& exposed_ms);
// Chrome's trace format (ui.perfetto.dev, chrome://tracing): a process a rank, a thread a stream, times in microseconds.
std::string format_timeline(const Profile& profile, int rank);
