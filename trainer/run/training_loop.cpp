#include "trainer/run/training_loop.h"

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "data/printable.h"
#include "kernels/common/check.h"
#include "trainer/checkpoint.h"
#include "trainer/run/start.h"
#include "trainer/run/stop.h"

namespace {

constexpr int kMostSkippedInARow = 100;  // by then it is not one bad batch

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

TrainingLoop::TrainingLoop(const Parts& parts)
    : p_(parts), first_step_(parts.state.step), step_(first_step_), outliers_(parts.config.outlier_window, parts.state.recent),
      saver_({.out = parts.config.out, .keep = parts.config.keep, .in_background = parts.config.checkpoint_every > 0}, parts.engine,
             parts.list, std::move(parts.state), parts.world, parts.held),
      inputs_(size_t(parts.config.global_batch_tokens / parts.world.size())), targets_(inputs_.size()),
      batch_check_(parts.train, parts.world, parts.train.samples_per_step() / parts.world.size()) {}

// A signal reaches every rank at another time, or only one: all stop after the same step.
bool TrainingLoop::stop_agreed() const {
    uint32_t stop = uint32_t(stop_requested());
    p_.world.host().all_reduce(&stop, 1, Element::u32, Reduction::max);
    return stop != 0;
}

// Whoever asked may not wait for an evaluation.
void TrainingLoop::throw_if_stopped() const {
    if (stop_agreed()) throw StopAskedFor();
}

// Every so many steps, but not after the last one, which has its own.
bool TrainingLoop::due(int64_t every, int64_t steps_done) const {
    return every > 0 && steps_done % every == 0 && steps_done < p_.config.steps;
}

void TrainingLoop::run() {
    const Config& config = p_.config;
    if (step_ == 0 && config.eval_every > 0) evaluate(0);
    while (step_ < config.steps && !stop_agreed()) {
        enqueue(step_++);
        if (due(config.checkpoint_every, step_)) start_save(step_);
        const bool evaluation = due(config.eval_every, step_), sampling = due(config.sample_every, step_);
        const bool profile = p_.profile.due(step_ - first_step_);
        while (pending_.size() > (evaluation || sampling || profile ? 0 : size_t(p_.engine.steps_ahead()))) finish_one();
        if (profile) reach_profile();
        if (evaluation) evaluate(step_);
        if (sampling) sample(step_);
        if (const auto outcome = saver_.finished()) report_save(*outcome);
        note_closed_output();
    }
    while (!pending_.empty()) finish_one();
    log_traffic();
    const bool stopped = step_ < config.steps;
    if (!stopped) evaluate(step_), sample(step_);
    save_last(step_);
    if (stopped) std::printf("stopped after step %lld; the same command with --out %s --resume auto goes on\n", (long long)step_, config.out.c_str());
}

void TrainingLoop::note_closed_output() {
    if (output_closed_ || !std::ferror(stdout)) return;
    output_closed_ = true;
    p_.log.warning(step_, "standard output cannot be written (closed, or a full disk): training goes on, " + p_.config.out + "/log.jsonl has every step");
}

void TrainingLoop::enqueue(int64_t step) {
    const Config& config = p_.config;
    const int64_t samples = p_.train.samples_per_step() / p_.world.size();  // this rank's of the global batch
    p_.train.fill(step, samples * p_.world.rank(), samples, inputs_.data(), targets_.data());
    batch_check_.compare(step, inputs_, targets_);
    StepInputs in{.step = step, .learning_rate = learning_rate(config.lr_schedule(), step),
                  .inverse_valid_tokens = 1.0f / float(config.global_batch_tokens)};
    if (config.skips_loss_outliers()) in.loss_limit = outliers_.losses(step).limit(config.outlier_z);
    if (config.skips_norm_outliers()) in.grad_norm_limit = outliers_.norms(step).limit(config.outlier_z);
    pending_.push_back({step, in.learning_rate});
    p_.engine.enqueue_step(in, inputs_, targets_);
}

void TrainingLoop::finish_one() {
    const StepResult result = [&] {
        const Watch::Waiting waiting(p_.world.watch(), "a step");  // devices wait for each other
        return p_.engine.collect();
    }();
    const Pending p = pending_.front();
    pending_.pop_front();
    const OutlierDetector::Statistics losses = outliers_.losses(p.step), norms = outliers_.norms(p.step);
    p_.log.step({.steps_done = p.step + 1, .loss = result.loss_sum, .grad_norm = result.grad_norm, .learning_rate = p.learning_rate,
                 .seconds = result.seconds, .tokens = p_.config.global_batch_tokens,
                 .skipped = result.skip_update != 0, .skipped_steps = result.skipped_steps,
                 .loss_z = losses.z(result.loss_sum), .grad_norm_z = norms.z(result.grad_norm), .remark = remark(result, losses, norms)});
    if (!result.skip_update) outliers_.add({p.step, result.loss_sum, result.grad_norm});
    if (saver_.snapshot_step() == p.step + 1) saver_.write(checkpoint_info(p_.config, p_.engine, p_.train), outliers_.recent());
    skipped_in_a_row_ = result.skip_update ? skipped_in_a_row_ + 1 : 0;
    REQUIRE(skipped_in_a_row_ < kMostSkippedInARow, "%d steps in a row were not finite, or outliers, and left the weights as they are: lower --lr and resume from an earlier checkpoint",
            kMostSkippedInARow);
}

std::string TrainingLoop::remark(const StepResult& result, const OutlierDetector::Statistics& losses, const OutlierDetector::Statistics& norms) const {
    if (result.nonfinite) return "not finite, skipped";
    const double z = p_.config.outlier_z;
    std::string text;
    if (losses.z(result.loss_sum) > z) text = message("loss is an outlier, z %.1f", losses.z(result.loss_sum));
    if (norms.z(result.grad_norm) > z) text += (text.empty() ? "" : ", ") + message("norm is an outlier, z %.1f", norms.z(result.grad_norm));
    return text + (result.skip_update ? ", skipped" : "");
}

// Every rank's communication, in rank 0's log.
void TrainingLoop::reach_profile() {
    const std::optional<Profile> profile = p_.profile.reach(step_ - first_step_);
    if (!profile) return;
    const size_t size = size_t(p_.world.size()), rank = size_t(p_.world.rank());
    std::vector<double> communication(size), exposed(size);
    communication[rank] = profile->communication_ms, exposed[rank] = profile->exposed_ms;
    p_.world.host().all_gather(communication.data(), sizeof(double));
    p_.world.host().all_gather(exposed.data(), sizeof(double));
    p_.log.profile(step_, p_.profile.steps(), *profile, communication, exposed);
    write_timeline(*profile);
}

// A run does not end for want of it.
void TrainingLoop::write_timeline(const Profile& profile) const {
    std::string path = p_.config.profile_trace;
    if (path.empty()) return;
    const int rank = p_.world.rank();
    if (rank > 0) path += message(".rank%d", rank);
    std::ofstream file(path);
    file << format_timeline(profile, rank) << "\n";
    file.close();
    if (!file) std::fprintf(stderr, "warning: --profile-trace %s: cannot be written: %s\n", path.c_str(), std::strerror(errno));
}

// What this rank received, by group of ranks; groups that are the same object are one.
void TrainingLoop::log_traffic() {
    if (p_.world.alone()) return;
    std::vector<TrafficOf> all;
    const auto add = [&](const char* of, const std::shared_ptr<Communicator>& c) {
        if (c && c->size() > 1) all.push_back({.of = of, .ranks = c->size(), .traffic = c->traffic()});
    };
    const Parallel& p = p_.parallel;
    add("world", p.world);
    if (p.group != p.world) add("group", p.group);
    if (p.replicas != p.world && p.replicas != p.group) add("replicas", p.replicas);
    p_.log.traffic(step_, all);
}

// The log has nothing of what was cut short.
void TrainingLoop::unless_stopped(int64_t steps_done, const char* what, const std::function<void()>& look) const {
    try {
        look();
    } catch (const StopAskedFor&) {
        p_.log.cut_short(steps_done, what);
    }
}

void TrainingLoop::evaluate(int64_t steps_done) {
    if (p_.validation && p_.config.eval_every > 0) unless_stopped(steps_done, "eval", [&] {
        const double start = now_s();
        const Validation::Result result = p_.validation.run(p_.engine, p_.world.host(), [this] { throw_if_stopped(); });
        p_.log.eval(steps_done, result.loss, result.tokens, now_s() - start);
    });
    if (p_.choices) unless_stopped(steps_done, "choices", [&] {
        const double start = now_s();
        const ChoiceResult result = p_.choices->run(p_.engine, [this] { throw_if_stopped(); });
        p_.log.choices(steps_done, result, now_s() - start);
    });
}

void TrainingLoop::sample(int64_t steps_done) {
    if (p_.samples) unless_stopped(steps_done, "sample", [&] {
        const std::vector<std::string> texts = p_.samples->run(p_.engine, steps_done, p_.world.host(), {.on_text = {}, .before_each = [this] { throw_if_stopped(); }});
        for (size_t i = 0; i < texts.size(); ++i) p_.log.sample(steps_done, int(i), printable(p_.config.prompt), texts[i]);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints

void TrainingLoop::start_save(int64_t steps_done) {
    while (saver_.snapshot_step() >= 0) finish_one();
    if (saver_.writing()) report_save(saver_.wait());
    saver_.snapshot(steps_done);
}

void TrainingLoop::report_save(const CheckpointSaver::Outcome& outcome) {
    if (!outcome.path.empty()) p_.log.checkpoint(outcome.steps_done, outcome.path, outcome.seconds);
    if (outcome.problem.empty()) return;
    const std::string latest = find_latest(p_.config.out);
    p_.log.warning(outcome.steps_done, outcome.problem + "; training goes on, the newest checkpoint is " + (latest.empty() ? "none" : latest));
}

// Nothing goes on after it: here a failure is one.
void TrainingLoop::save_last(int64_t steps_done) {
    if (saver_.writing()) report_save(saver_.wait());
    saver_.snapshot(steps_done);
    saver_.write(checkpoint_info(p_.config, p_.engine, p_.train), outliers_.recent());
    const CheckpointSaver::Outcome outcome = saver_.wait();
    if (!outcome.path.empty()) p_.log.checkpoint(outcome.steps_done, outcome.path, outcome.seconds);
    if (!outcome.problem.empty()) throw JobError(outcome.problem);  // of all ranks, and names the one
}
