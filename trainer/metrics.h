// What a run reports: one line a step on the terminal, one JSON object a line in OUT/log.jsonl, two utilizations.
//
// The number `step` of every record and line counts finished steps: the first step is logged as 1, an evaluation after
// it has step 1, and the checkpoint step_000001 holds what both describe.
#pragma once
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/common/peak.h"
#include "trainer/distributed/communicator.h"
#include "trainer/engine.h"
#include "trainer/model_spec.h"
#include "trainer/multiple_choice.h"
#include "trainer/profile.h"

// ---------------------------------------------------------------------------------------------------------------------
// Utilization: fractions of 1; NaN when the device's peak is unknown

// Model FLOPs over the dense BF16 peak, whatever the recipe.
double mfu(double tokens_per_s, const TokenFlops& flops, const Peak& peak);

// The time the same FLOPs take with each GEMM at the dense peak of its own format, over the measured time: blocks'
// linears at the FP8 peak when the recipe quantizes them, head and attention at the BF16 peak.
double speed_of_light(double tokens_per_s, const TokenFlops& flops, const Peak& peak, bool fp8_linears);

// ---------------------------------------------------------------------------------------------------------------------
// Text for people

std::string format_rate(double per_s);         // 950, 41.2k, 1.27M, 2.10G, 1.00T
std::string format_bytes(double bytes);        // 512 B, 1.5 MiB, 12.3 GiB
std::string format_duration(double seconds);   // 412 ms, 3.2 s, 5 m 12 s, 2 h 05 m, 3 d 04 h, 12.5 years
std::string format_percent(double fraction, int decimals);  // 46.1 %, n/a for NaN
std::string format_memory_table(const std::vector<MemoryRow>& rows);  // one line a row and the sum

// ---------------------------------------------------------------------------------------------------------------------
// The log

struct RunLogOptions {
    std::string out;             // folder, made if needed; "": terminal only
    bool resuming = false;       // the log in `out`, if any, is continued; otherwise one there is an Error
    int64_t first_step = 0;      // steps finished before this run: later records of the log are cut off
    int64_t total_steps = 0;
    int64_t log_every = 1;       // terminal line every so many steps, and for the last; JSON holds every step
    TokenFlops flops{};
    bool fp8_linears = false;    // recipe.quantizes()
    int devices = 1;             // utilizations are of all their peaks
    double memory_bytes = 0;     // shown on the step line; 0: not shown
    std::string device;          // Engine::device_name(): decides the peak
};

// What makes a run replayable: written as the {"kind": "run"} record, first in the log and again after each resume.
struct RunRecord {
    std::string command, config_toml, commit;
    std::vector<std::pair<std::string, std::string>> versions;  // name, version
    std::string model, recipe;
    int64_t parameters = 0, tokens_per_step = 0;
};

struct StepRecord {
    int64_t steps_done;  // StepState::in.step + 1
    double loss, grad_norm, learning_rate;
    double seconds;
    int64_t tokens;         // of the global batch
    bool skipped;           // no update
    int64_t skipped_steps;  // since step 0
    double loss_z = std::numeric_limits<double>::quiet_NaN();  // standard deviations above the last steps; NaN: not known
    double grad_norm_z = std::numeric_limits<double>::quiet_NaN();
    std::string remark = "";  // what is special about this step
};

struct TrafficOf {
    std::string of;  // group of ranks
    int ranks;
    Traffic traffic;
};

class RunLog {
  public:
    RunLog(const RunLogOptions& options, const RunRecord& run);
    ~RunLog();
    RunLog(const RunLog&) = delete;
    RunLog& operator=(const RunLog&) = delete;

    void step(const StepRecord& record);
    void eval(int64_t steps_done, double loss, int64_t tokens, double seconds);  // mean loss a token
    void sample(int64_t steps_done, int sample, const std::string& prompt, const std::string& text);  // valid UTF-8
    void choices(int64_t steps_done, const ChoiceResult& result, double seconds);
    void cut_short(int64_t steps_done, const char* what);  // by a stop: on the terminal only
    void checkpoint(int64_t steps_done, const std::string& path, double seconds);
    void profile(int64_t steps_done, int64_t steps, const Profile& profile, const std::vector<double>& communication_ms, const std::vector<double>& exposed_ms);
    void traffic(int64_t steps_done, const std::vector<TrafficOf>& all);  // what rank 0 received in the run; a captured call counts once
    void warning(int64_t steps_done, const std::string& text);  // also on stderr

    // The terminal's text for a record, without line end; `eta_s` < 0: none.
    std::string step_line(const StepRecord& record, double eta_s) const;

  private:
    void write_line(const std::string& line);
    bool write_unwritten();
    void print_line(const std::string& line);
    void show_progress(int64_t steps_done, double eta_s);

    RunLogOptions options_;
    Peak peak_;
    bool terminal_;
    double smooth_step_s_ = 0;  // for the ETA
    std::string path_;
    std::string unwritten_;   // lines that found the disk full
    int64_t valid_bytes_ = 0;  // of the file: whole lines
    int file_ = -1;
};
