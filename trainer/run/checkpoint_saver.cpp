#include "trainer/run/checkpoint_saver.h"

#include <chrono>
#include <utility>

#include "kernels/common/check.h"

namespace {
double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

CheckpointSaver::CheckpointSaver(const Options& options, Engine& engine, const ParameterList& list, TrainState&& scratch)
    : options_(options), engine_(engine), list_(list), state_(std::move(scratch)) {
    if (!options_.in_background) return;
    // The first touch of gigabytes takes longer than their copy: not while a step waits for it.
    prepared_ = std::async(std::launch::async, [this] {
        for (std::vector<float>* flat : {&state_.params, &state_.m, &state_.v}) flat->resize(size_t(list_.flat_elements));
    });
}

void CheckpointSaver::snapshot(int64_t steps_done) {
    REQUIRE(!running_.valid() && snapshot_step_ < 0, "checkpoint of step %lld: the one before it is not finished", (long long)steps_done);
    if (prepared_.valid()) prepared_.get();
    start_s_ = now_s();
    copied_ = engine_.snapshot(state_);
    snapshot_step_ = steps_done;
}

void CheckpointSaver::write(const CheckpointInfo& info, const std::vector<RecentStep>& recent) {
    REQUIRE(snapshot_step_ >= 0, "checkpoint: write without a snapshot");
    state_.step = std::exchange(snapshot_step_, -1);
    state_.recent = recent;
    running_ = std::async(std::launch::async, [this, info] { return save(info); });
}

CheckpointSaver::Outcome CheckpointSaver::save(const CheckpointInfo& info) {
    Outcome outcome{.steps_done = state_.step, .path = "", .problem = "", .seconds = 0};
    try {
        copied_.get();
        outcome.path = save_checkpoint(options_.out, info, list_, state_);
        prune_checkpoints(options_.out, options_.keep);
    } catch (const std::exception& error) {
        outcome.problem = error.what();
    }
    outcome.seconds = now_s() - start_s_;
    return outcome;
}

std::optional<CheckpointSaver::Outcome> CheckpointSaver::finished() {
    if (!running_.valid() || running_.wait_for(std::chrono::seconds(0)) != std::future_status::ready) return {};
    return running_.get();
}

CheckpointSaver::Outcome CheckpointSaver::wait() {
    REQUIRE(running_.valid(), "checkpoint: none is being written");
    return running_.get();
}
