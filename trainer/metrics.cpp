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
    return scaled(per_s / 1e9, "G");
}

std::string format_bytes(double bytes) {
    if (bytes < 1023.5) return message("%.0f B", bytes);
    const char* const units[] = {"KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    for (bytes /= 1024; bytes >= 1023.95 && unit < 3; ++unit) bytes /= 1024;
    return message("%.1f %s", bytes, units[unit]);
}

std::string format_duration(double seconds) {
    if (!std::isfinite(seconds)) return "n/a";
    if (seconds < 0.00995) return message("%.2f ms", seconds * 1e3);
    if (seconds < 0.9995) return message("%.0f ms", seconds * 1e3);
    if (seconds < 59.95) return message("%.1f s", seconds);
    const long long whole = std::llround(seconds), minutes = whole / 60, hours = minutes / 60;
    if (hours == 0) return message("%lld m %02lld s", minutes, whole % 60);
    if (hours < 24) return message("%lld h %02lld m", hours, minutes % 60);
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
        cut_log(path_, options_.first_step);
    }
    file_.reset(std::fopen(path_.c_str(), "a"));
    REQUIRE(file_, "%s: cannot open: %s", path_.c_str(), std::strerror(errno));
    write_line(dump(run_json(options_, run)));
}

// One line, one write: a reader, or a crash, meets at most one torn line, the last.
void RunLog::write_line(const std::string& line) {
    if (!file_) return;
    const std::string text = line + "\n";
    const bool ok = std::fwrite(text.data(), 1, text.size(), file_.get()) == text.size() && std::fflush(file_.get()) == 0;
    REQUIRE(ok, "%s: cannot write: %s", path_.c_str(), std::strerror(errno));
}

std::string RunLog::step_line(const StepRecord& r, double eta_s) const {
    const double tokens_per_s = double(r.tokens) / r.seconds;
    std::string text = message("step %lld/%lld | loss %.4f | norm %.2f | lr %.1e | %s | %s tok/s", (long long)r.steps_done,
                               (long long)options_.total_steps, r.loss, r.grad_norm, r.learning_rate,
                               format_duration(r.seconds).c_str(), format_rate(tokens_per_s).c_str());
    text += " | MFU " + format_percent(mfu(tokens_per_s, options_.flops, peak_), 1);
    text += " | SOL " + format_percent(speed_of_light(tokens_per_s, options_.flops, peak_, options_.fp8_linears), 0);
    if (options_.memory_bytes > 0) text += " | " + format_bytes(options_.memory_bytes);
    if (r.skipped_steps > 0) text += message(" | skipped %lld", (long long)r.skipped_steps);
    if (r.skipped) text += " (this step: not finite)";
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
    set_known(record, "mfu", mfu(tokens_per_s, options_.flops, peak_));
    set_known(record, "sol", speed_of_light(tokens_per_s, options_.flops, peak_, options_.fp8_linears));
    record["skipped"] = r.skipped;
    record["skipped_steps"] = r.skipped_steps;
    write_line(dump(record));

    // The first step captures graphs and tunes, so the average starts with the second.
    const bool first = r.steps_done == options_.first_step + 1;
    if (!first) smooth_step_s_ = smooth_step_s_ > 0 ? 0.95 * smooth_step_s_ + 0.05 * r.seconds : r.seconds;
    const bool last = r.steps_done == options_.total_steps;
    if (!first && !last && r.steps_done % options_.log_every != 0) return;
    const double eta_s = terminal_ && smooth_step_s_ > 0 ? smooth_step_s_ * double(options_.total_steps - r.steps_done) : -1;
    std::printf("%s\n", step_line(r, eta_s).c_str());
    std::fflush(stdout);
}

void RunLog::eval(int64_t steps_done, double loss, int64_t tokens, double seconds) {
    Json record;
    record["kind"] = "eval";
    record["step"] = steps_done;
    set_number(record, "loss", loss);
    record["tokens"] = tokens;
    set_number(record, "seconds", seconds);
    write_line(dump(record));
    std::printf("eval %lld/%lld | val loss %.4f | %lld tokens | %s\n", (long long)steps_done, (long long)options_.total_steps,
                loss, (long long)tokens, format_duration(seconds).c_str());
    std::fflush(stdout);
}

void RunLog::checkpoint(int64_t steps_done, const std::string& path, double seconds) {
    Json record;
    record["kind"] = "checkpoint";
    record["step"] = steps_done;
    record["path"] = path;
    set_number(record, "seconds", seconds);
    write_line(dump(record));
    std::printf("saved %s | %s\n", path.c_str(), format_duration(seconds).c_str());
    std::fflush(stdout);
}
