#include "trainer/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "kernels/common/check.h"
#include "trainer/plain_file.h"

namespace {

using Json = nlohmann::ordered_json;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---------------------------------------------------------------------------------------------------------------------
// JSON lines

// JSON has no NaN and no infinity: such a value becomes null, and "nonfinite" says which it was.
void set_number(Json& record, const char* key, double value) {
    record[key] = value;
    if (std::isfinite(value)) return;
    record[key] = nullptr;
    record["nonfinite"][key] = std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

// For utilizations, where NaN just says that the device's peak is unknown.
void set_known(Json& record, const char* key, double value) {
    record[key] = value;
    if (!std::isfinite(value)) record[key] = nullptr;
}

// A path need not be UTF-8; JSON must be.
std::string dump(const Json& record) { return record.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string utc_time() {
    const std::time_t now = std::time(nullptr);
    std::tm utc{};
    gmtime_r(&now, &utc);
    char text[32];
    std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
    return text;
}

Json run_json(const RunLogOptions& options, const RunRecord& run) {
    Json record;
    record["kind"] = "run";
    record["step"] = options.first_step;
    record["time"] = utc_time();
    record["command"] = run.command;
    record["commit"] = run.commit;
    record["device"] = options.device;
    record["versions"] = Json::object();
    for (const auto& [name, version] : run.versions) record["versions"][name] = version;
    record["model"] = run.model;
    record["recipe"] = run.recipe;
    record["parameters"] = run.parameters;
    record["tokens_per_step"] = run.tokens_per_step;
    record["config"] = run.config_toml;
    return record;
}

// ---------------------------------------------------------------------------------------------------------------------
// Continuing a log

struct RecordKey {
    bool is_run;
    int64_t step;
};

// Nothing for a line that is no record of ours: one torn by a crash.
std::optional<RecordKey> record_key(const std::string& line) {
    const Json record = Json::parse(line, nullptr, false);
    if (!record.is_object() || !record.contains("kind") || !record.contains("step")) return {};
    if (!record["step"].is_number_integer()) return {};
    return RecordKey{record["kind"] == "run", record["step"].get<int64_t>()};
}

// Keeps what the checkpoint contains: records of at most `first_step` finished steps, up to the first run that started
// there or later.
// The shorter log is complete on the disk before it takes the old one's place.
void cut_log(const std::string& path, int64_t first_step) {
    const std::string temporary = path + ".tmp";
    std::ifstream in(path);
    REQUIRE(in, "%s: cannot open: %s", path.c_str(), std::strerror(errno));
    std::unique_ptr<std::FILE, int (*)(std::FILE*)> out(std::fopen(temporary.c_str(), "w"), std::fclose);
    REQUIRE(out, "%s: cannot create: %s", temporary.c_str(), std::strerror(errno));
    bool ok = true;
    for (std::string line; std::getline(in, line);) {
        const std::optional<RecordKey> key = record_key(line);
        if (key && key->is_run && key->step >= first_step) break;
        if (!key || key->step > first_step) continue;
        line += '\n';
        ok = ok && std::fwrite(line.data(), 1, line.size(), out.get()) == line.size();
    }
    ok = ok && std::fflush(out.get()) == 0 && fsync(fileno(out.get())) == 0;
    REQUIRE(ok && !in.bad(), "%s: cannot write: %s", temporary.c_str(), std::strerror(errno));
    REQUIRE(std::rename(temporary.c_str(), path.c_str()) == 0, "%s: cannot rename to %s: %s", temporary.c_str(),
            path.c_str(), std::strerror(errno));
}

std::string scaled(double value, const char* unit) {
    return message(value < 9.995 ? "%.2f%s" : value < 99.95 ? "%.1f%s" : "%.0f%s", value, unit);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Utilization

double mfu(double tokens_per_s, const TokenFlops& flops, const Peak& peak) {
    return peak.bf16_tflops > 0 ? flops.total() * tokens_per_s / (peak.bf16_tflops * 1e12) : kNan;
}

double speed_of_light(double tokens_per_s, const TokenFlops& flops, const Peak& peak, bool fp8_linears) {
    const double linears_tflops = fp8_linears ? peak.fp8_tflops : peak.bf16_tflops;
    if (!(peak.bf16_tflops > 0 && linears_tflops > 0)) return kNan;
    const double ideal_s_per_token =
        flops.block_linears / (linears_tflops * 1e12) + (flops.head + flops.attention) / (peak.bf16_tflops * 1e12);
    return ideal_s_per_token * tokens_per_s;
}

// ---------------------------------------------------------------------------------------------------------------------
// Text for people. Limits stand where rounding would otherwise print "1000k" or "1024 KiB".

std::string format_rate(double per_s) {
    if (!std::isfinite(per_s)) return "n/a";
    if (per_s < 999.5) return message("%.0f", per_s);
    if (per_s < 999.5e3) return scaled(per_s / 1e3, "k");
    if (per_s < 999.5e6) return scaled(per_s / 1e6, "M");
    if (per_s < 999.5e9) return scaled(per_s / 1e9, "G");
    return per_s < 1e18 ? scaled(per_s / 1e12, "T") : message("%.2e", per_s);
}

std::string format_bytes(double bytes) {
    if (bytes < 1023.5) return message("%.0f B", bytes);
    const char* const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    int unit = 0;
    for (bytes /= 1024; bytes >= 1023.95 && unit < 5; ++unit) bytes /= 1024;
    return message("%.1f %s", bytes, units[unit]);
}

std::string format_duration(double seconds) {
    if (!std::isfinite(seconds)) return "n/a";
    if (seconds < 0.00995) return message("%.2f ms", seconds * 1e3);
    if (seconds < 0.9995) return message("%.0f ms", seconds * 1e3);
    if (seconds < 59.95) return message("%.1f s", seconds);
    const long long whole = std::llround(std::min(seconds, 1e17)), minutes = whole / 60, hours = minutes / 60;
    if (hours == 0) return message("%lld m %02lld s", minutes, whole % 60);
    if (hours < 24) return message("%lld h %02lld m", hours, minutes % 60);
    const double days = seconds / 86400;
    if (days >= 1000) return message(days < 3.65e6 ? "%.1f years" : "%.1e years", days / 365.25);
    return message("%lld d %02lld h", hours / 24, hours % 24);
}

std::string format_percent(double fraction, int decimals) {
    return std::isfinite(fraction) ? message("%.*f %%", decimals, 100 * fraction) : "n/a";
}

std::string format_memory_table(const std::vector<MemoryRow>& rows) {
    size_t width = std::strlen("total");
    double total = 0;
    for (const MemoryRow& row : rows) width = std::max(width, row.what.size()), total += row.bytes;
    const auto line = [&](const std::string& what, double bytes) {
        return message("  %-*s %10s\n", int(width), what.c_str(), format_bytes(bytes).c_str());
    };
    std::string text;
    for (const MemoryRow& row : rows) text += line(row.what, row.bytes);
    return text + line("total", total);
}

// ---------------------------------------------------------------------------------------------------------------------
// The log

RunLog::RunLog(const RunLogOptions& options, const RunRecord& run)
    : options_(options), peak_(peak_of(options.device)), terminal_(isatty(STDOUT_FILENO) != 0) {
    if (options_.out.empty()) return;
    std::error_code error;
    std::filesystem::create_directories(options_.out, error);
    REQUIRE(!error, "--out %s: cannot make the folder: %s", options_.out.c_str(), error.message().c_str());
    path_ = options_.out + "/log.jsonl";
    if (std::filesystem::exists(path_)) {
        REQUIRE(options_.resuming, "--out %s: holds the log.jsonl of another run; continue it with --resume auto, or choose "
                "another folder", options_.out.c_str());
        require_plain_file(path_);
        cut_log(path_, options_.first_step);
    }
    file_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    REQUIRE(file_ >= 0, "%s: cannot open: %s", path_.c_str(), std::strerror(errno));
    valid_bytes_ = lseek(file_, 0, SEEK_END);
    write_line(dump(run_json(options_, run)));
    REQUIRE(unwritten_.empty(), "%s: cannot write: %s", path_.c_str(), std::strerror(errno));
}

RunLog::~RunLog() {
    if (file_ >= 0) close(file_);
}

// The file holds whole lines at all times: what a full disk tore is cut off again. The lines wait and follow when there is
// room; training goes on. Only a crash of the machine can leave a torn line, the last, which a resume drops.
void RunLog::write_line(const std::string& line) {
    constexpr size_t kMostUnwritten = size_t(64) << 20;
    if (file_ < 0) return;
    const bool waiting = !unwritten_.empty();
    unwritten_ += line + "\n";
    if (write_unwritten()) {
        if (waiting) std::fprintf(stderr, "warning: %s: written again, nothing was lost\n", path_.c_str());
        return;
    }
    const int error = errno;
    if (!waiting) std::fprintf(stderr, "warning: %s: cannot write: %s; its lines wait in memory\n", path_.c_str(), std::strerror(error));
    if (unwritten_.size() > kMostUnwritten) unwritten_.erase(0, unwritten_.find('\n', unwritten_.size() / 2) + 1);
    errno = error;
}

bool RunLog::write_unwritten() {
    const ssize_t written = write(file_, unwritten_.data(), unwritten_.size());
    if (written == ssize_t(unwritten_.size())) {
        valid_bytes_ += written;
        unwritten_.clear();
        return true;
    }
    if (written >= 0) errno = ENOSPC;
    const int error = errno;
    const bool cut = ftruncate(file_, valid_bytes_) == 0;
    errno = cut ? error : errno;
    return false;
}

// On a terminal a line takes the place of the progress that stands there.
void RunLog::print_line(const std::string& line) {
    std::printf("%s%s\n", terminal_ ? "\r\033[K" : "", line.c_str());
    std::fflush(stdout);
}

void RunLog::show_progress(int64_t steps_done, double eta_s) {
    if (!terminal_) return;
    std::printf("\r\033[K%lld/%lld %s", (long long)steps_done, (long long)options_.total_steps,
                format_percent(double(steps_done) / double(options_.total_steps), 1).c_str());
    if (eta_s >= 0) std::printf(" | ETA %s", format_duration(eta_s).c_str());
    std::fflush(stdout);
}

std::string RunLog::step_line(const StepRecord& r, double eta_s) const {
    const double tokens_per_s = double(r.tokens) / r.seconds;
    std::string text = message("step %lld/%lld | loss %.4f | norm %.2f | lr %.1e | %s | %s tok/s", (long long)r.steps_done,
                               (long long)options_.total_steps, r.loss, r.grad_norm, r.learning_rate,
                               format_duration(r.seconds).c_str(), format_rate(tokens_per_s).c_str());
    text += " | MFU " + format_percent(mfu(tokens_per_s / options_.devices, options_.flops, peak_), 1);
    text += " | SOL " + format_percent(speed_of_light(tokens_per_s / options_.devices, options_.flops, peak_, options_.fp8_linears), 0);
    if (options_.memory_bytes > 0) text += " | " + format_bytes(options_.memory_bytes);
    if (r.skipped_steps > 0) text += message(" | skipped %lld", (long long)r.skipped_steps);
    if (!r.remark.empty()) text += " (this step: " + r.remark + ")";
    if (eta_s >= 0) text += " | ETA " + format_duration(eta_s);
    return text;
}

void RunLog::step(const StepRecord& r) {
    const double tokens_per_s = double(r.tokens) / r.seconds;
    Json record;
    record["kind"] = "step";
    record["step"] = r.steps_done;
    set_number(record, "loss", r.loss);
    set_number(record, "grad_norm", r.grad_norm);
    set_number(record, "lr", r.learning_rate);
    set_number(record, "seconds", r.seconds);
    record["tokens"] = r.tokens;
    set_known(record, "tokens_per_s", tokens_per_s);
    set_known(record, "mfu", mfu(tokens_per_s / options_.devices, options_.flops, peak_));
    set_known(record, "sol", speed_of_light(tokens_per_s / options_.devices, options_.flops, peak_, options_.fp8_linears));
    record["skipped"] = r.skipped;
    record["skipped_steps"] = r.skipped_steps;
    set_known(record, "loss_z", r.loss_z);
    set_known(record, "grad_norm_z", r.grad_norm_z);
    if (!r.remark.empty()) record["remark"] = r.remark;
    write_line(dump(record));

    // The first step captures graphs and tunes, so the average starts with the second.
    const bool first = r.steps_done == options_.first_step + 1;
    if (!first) smooth_step_s_ = smooth_step_s_ > 0 ? 0.95 * smooth_step_s_ + 0.05 * r.seconds : r.seconds;
    const bool last = r.steps_done == options_.total_steps;
    const double eta_s = smooth_step_s_ > 0 ? smooth_step_s_ * double(options_.total_steps - r.steps_done) : -1;
    if (first || last || r.steps_done % options_.log_every == 0 || !r.remark.empty()) print_line(step_line(r, terminal_ ? eta_s : -1));
    else show_progress(r.steps_done, eta_s);
}

void RunLog::eval(int64_t steps_done, double loss, int64_t tokens, double seconds) {
    Json record;
    record["kind"] = "eval";
    record["step"] = steps_done;
    set_number(record, "loss", loss);
    record["tokens"] = tokens;
    set_number(record, "seconds", seconds);
    write_line(dump(record));
    print_line(message("eval %lld/%lld | val loss %.4f | %lld tokens | %s", (long long)steps_done, (long long)options_.total_steps,
                       loss, (long long)tokens, format_duration(seconds).c_str()));
}

void RunLog::sample(int64_t steps_done, int sample, const std::string& prompt, const std::string& text) {
    Json record;
    record["kind"] = "sample";
    record["step"] = steps_done;
    record["sample"] = sample;
    record["prompt"] = prompt;
    record["text"] = text;
    write_line(dump(record));
    print_line(message("sample %d after step %lld | %s%s", sample + 1, (long long)steps_done, prompt.c_str(), text.c_str()));
}

void RunLog::choices(int64_t steps_done, const ChoiceResult& result, double seconds) {
    Json record;
    record["kind"] = "choices";
    record["step"] = steps_done;
    record["questions"] = result.questions;
    for (const auto& [name, by] : {std::pair("accuracy", Normalization::none), std::pair("accuracy_by_token", Normalization::tokens), std::pair("accuracy_by_byte", Normalization::bytes)}) {
        set_number(record, name, result[by].value);
        set_number(record, (name + std::string("_stderr")).c_str(), result[by].standard_error);
    }
    set_number(record, "seconds", seconds);
    write_line(dump(record));
    print_line(message("choices %lld/%lld | %s | %s", (long long)steps_done, (long long)options_.total_steps, format_choices(result).c_str(),
                       format_duration(seconds).c_str()));
}

void RunLog::cut_short(int64_t steps_done, const char* what) {
    print_line(message("%s %lld/%lld | cut short, as a stop was asked for: no result", what, (long long)steps_done, (long long)options_.total_steps));
}

void RunLog::checkpoint(int64_t steps_done, const std::string& path, double seconds) {
    Json record;
    record["kind"] = "checkpoint";
    record["step"] = steps_done;
    record["path"] = path;
    set_number(record, "seconds", seconds);
    write_line(dump(record));
    print_line(message("saved %s | %s", path.c_str(), format_duration(seconds).c_str()));
}

// The last two: of every rank.
void RunLog::profile(int64_t steps_done, int64_t steps, const Profile& profile, const std::vector<double>& communication_ms, const std::vector<double>& exposed_ms) {
    Json record;
    record["kind"] = "profile";
    record["step"] = steps_done;
    record["steps"] = steps;
    set_number(record, "busy_ms", profile.busy_ms);
    set_number(record, "span_ms", profile.span_ms);
    record["communication_ms"] = communication_ms;
    record["exposed_ms"] = exposed_ms;
    write_line(dump(record));
    std::fputs(format_communication(communication_ms, exposed_ms).c_str(), stdout);
    std::fflush(stdout);
}

void RunLog::traffic(int64_t steps_done, const std::vector<TrafficOf>& all) {
    Json record;
    record["kind"] = "traffic";
    record["step"] = steps_done;
    record["communicators"] = Json::array();
    std::string line = "traffic that rank 0 received";
    for (const auto& [of, ranks, t] : all) {
        record["communicators"].push_back({{"of", of}, {"ranks", ranks}, {"gathered", t.gathered}, {"scattered", t.scattered}, {"reduced", t.reduced}, {"broadcast", t.broadcast}, {"calls", t.calls}});
        line += message(" | %s of %d: %s gathered, %s scattered, %s reduced in %lld calls", of.c_str(), ranks, format_bytes(double(t.gathered)).c_str(),
                        format_bytes(double(t.scattered)).c_str(), format_bytes(double(t.reduced)).c_str(), (long long)t.calls);
    }
    write_line(dump(record));
    print_line(line);
}

void RunLog::warning(int64_t steps_done, const std::string& text) {
    Json record;
    record["kind"] = "warning";
    record["step"] = steps_done;
    record["text"] = text;
    write_line(dump(record));
    if (terminal_) std::printf("\r\033[K");
    std::fflush(stdout);
    std::fprintf(stderr, "warning: %s\n", text.c_str());
}
