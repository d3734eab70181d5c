#include "trainer/run/checkpoint_saver.h"

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <utility>

#include "kernels/common/check.h"

namespace {
constexpr double kWorthANote = 0.25;  // seconds
double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// 3.2 GB/s a thread instead of 1.8, where the system has huge pages; advice that it does not take changes nothing else.
void resize_in_huge_pages(std::vector<float>& flat, size_t elements) {
    flat.reserve(elements);
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(flat.data());
    const uintptr_t first = (begin + page - 1) / page * page, end = (begin + flat.capacity() * sizeof(float)) / page * page;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
    flat.resize(elements);
}
}  // namespace

CheckpointSaver::CheckpointSaver(const Options& options, Engine& engine, const ParameterList& list, TrainState&& scratch, World& world, const Held& held)
    : options_(options), engine_(engine), list_(list), world_(world), held_(held), state_(std::move(scratch)) {
    if (!options_.in_background) return;
    touched_ = std::async(std::launch::async, [this] { touch(); }).share();
}

// The first touch of gigabytes takes longer than their copy: not while a step waits for it.
void CheckpointSaver::touch() {
    std::vector<std::future<void>> touched;
    for (std::vector<float>* flat : {&state_.params, &state_.m, &state_.v})
        touched.push_back(std::async(std::launch::async, [this, flat] { resize_in_huge_pages(*flat, size_t(held_.elements)); }));
    for (std::future<void>& array : touched) array.get();
}

void CheckpointSaver::snapshot(int64_t steps_done) {
    REQUIRE(!running_.valid() && snapshot_step_ < 0, "checkpoint of step %lld: the one before it is not finished", (long long)steps_done);
    start_s_ = now_s();
    if (touched_.valid()) touched_.get();
    if (const double waited = now_s() - start_s_; waited > kWorthANote && world_.rank() == 0)
        std::fprintf(stderr, "note: the checkpoint of step %lld waited %.1f s for its memory on the host, which is made ready beside the first steps\n",
                     (long long)steps_done, waited);
    copied_ = engine_.snapshot(state_);
    snapshot_step_ = steps_done;
}

void CheckpointSaver::write(const CheckpointInfo& info, const std::vector<RecentStep>& recent) {
    REQUIRE(snapshot_step_ >= 0, "checkpoint: write without a snapshot");
    state_.step = std::exchange(snapshot_step_, -1);
    state_.recent = recent;
    if (world_.alone()) {
        running_ = std::async(std::launch::async, [this, info] { return save(info); });
        return;
    }
    info_ = info;
    begin_together();
}

CheckpointSaver::Outcome CheckpointSaver::save(const CheckpointInfo& info) {
    Outcome outcome{.steps_done = state_.step, .path = "", .problem = "", .seconds = 0};
    try {
        copied_.get();
        outcome.path = save_checkpoint(options_.out, info, list_, state_);
        prune_checkpoints(options_.out, options_.keep);
    } catch (const std::exception& error) {
        outcome.problem = described(error);
    }
    outcome.seconds = now_s() - start_s_;
    return outcome;
}

std::optional<CheckpointSaver::Outcome> CheckpointSaver::finished() {
    if (!running_.valid()) return {};
    uint32_t busy = running_.wait_for(std::chrono::seconds(0)) != std::future_status::ready;
    world_.host().all_reduce(&busy, 1, Element::u32, Reduction::max);
    if (busy) return {};
    return wait();
}

CheckpointSaver::Outcome CheckpointSaver::wait() {
    REQUIRE(running_.valid(), "checkpoint: none is being written");
    Outcome outcome = running_.get();
    return world_.alone() ? outcome : publish_together(outcome);
}

// ---------------------------------------------------------------------------------------------------------------------
// Several ranks

// Of all ranks', with the rank's number; "" when there is none.
std::string CheckpointSaver::first_problem(const std::string& mine) {
    const std::vector<std::string> all = world_.all_texts(mine);
    for (size_t r = 0; r < all.size(); ++r)
        if (!all[r].empty()) return message("rank %zu: %s", r, all[r].c_str());
    return "";
}

void CheckpointSaver::begin_together() {
    std::string problem;
    try {
        if (world_.rank() == 0) begin_checkpoint(options_.out, list_, state_.step);
    } catch (const std::exception& error) {
        problem = described(error);
    }
    const bool begun = first_problem(problem).empty();
    running_ = std::async(std::launch::async, [this, begun, problem] {  // this rank's: which one's it is is said at the end
        if (begun) return save_part();
        return Outcome{.steps_done = state_.step, .path = "", .problem = problem, .seconds = now_s() - start_s_};
    });
}

CheckpointSaver::Outcome CheckpointSaver::save_part() {
    Outcome outcome{.steps_done = state_.step, .path = "", .problem = "", .seconds = 0};
    try {
        copied_.get();
        const int replicas = world_.size() / list_.ranks;
        const PartOfRank part{.replica = world_.rank() / list_.ranks, .replicas = replicas, .rank = world_.rank(), .ranks = world_.size()};
        part_ = write_part(options_.out, list_, held_, part, state_);
    } catch (const std::exception& error) {
        outcome.problem = described(error);
    }
    return outcome;
}

CheckpointSaver::Outcome CheckpointSaver::publish_together(Outcome outcome) {
    outcome.problem = first_problem(outcome.problem);
    const std::vector<std::string> written = world_.all_texts(format_part(part_));
    std::string problem;
    if (world_.rank() == 0) try {
        WrittenPart whole;
        for (const std::string& text : written) whole += parse_part(text);
        if (outcome.problem.empty()) outcome.path = complete_checkpoint(options_.out, info_, list_, state_, whole);
        else abandon_checkpoint(options_.out, state_.step);
        prune_checkpoints(options_.out, options_.keep);
    } catch (const std::exception& error) {
        problem = described(error);
        if (outcome.path.empty()) abandon_checkpoint(options_.out, state_.step);
    }
    outcome.path = world_.all_texts(outcome.path)[0];
    problem = first_problem(problem);
    if (outcome.problem.empty()) outcome.problem = problem;
    outcome.seconds = now_s() - start_s_;
    return outcome;
}
