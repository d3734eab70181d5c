#include "trainer/run/training_loop.h"

#include <chrono>
#include <csignal>
#include <cstdio>

#include "kernels/common/check.h"
#include "trainer/checkpoint.h"
#include "trainer/run/start.h"

namespace {

constexpr int kMostSkippedInARow = 100;  // by then it is not one bad batch

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

volatile std::sig_atomic_t stop_requested = 0;  // a signal handler can reach nothing else
void request_stop(int signal) {
    stop_requested = 1;
    std::signal(signal, SIG_DFL);
}

}  // namespace

void stop_on_signals() {
    std::signal(SIGINT, request_stop);
    std::signal(SIGTERM, request_stop);
}

TrainingLoop::TrainingLoop(const Parts& parts)
    : p_(parts), inputs_(size_t(parts.config.global_batch_tokens)), targets_(size_t(parts.config.global_batch_tokens)) {}

// Every so many steps, but not after the last one, which has its own.
bool TrainingLoop::due(int64_t every, int64_t steps_done) const {
    return every > 0 && steps_done % every == 0 && steps_done < p_.config.steps;
}

void TrainingLoop::run(TrainState& state) {
    const Config& config = p_.config;
    int64_t step = state.step;
    if (step == 0) evaluate(0);
    while (step < config.steps && !stop_requested) {
        enqueue(step++);
        const bool checkpoint = due(config.checkpoint_every, step), evaluation = due(config.eval_every, step);
        const size_t ahead = checkpoint || evaluation ? 0 : size_t(p_.engine.steps_ahead());
        while (pending_.size() > ahead) finish_one();
        if (evaluation) evaluate(step);
        if (checkpoint) save(state, step);
    }
    while (!pending_.empty()) finish_one();
    const bool stopped = step < config.steps;  // whoever asked may not wait for an evaluation
    if (!stopped) evaluate(step);
    save(state, step);
    if (stopped) std::printf("stopped after step %lld; the same command with --out %s --resume auto goes on\n", (long long)step, config.out.c_str());
}

void TrainingLoop::enqueue(int64_t step) {
    p_.train.fill(step, 0, p_.train.samples_per_step(), inputs_.data(), targets_.data());
    const StepInputs in{.step = step, .learning_rate = learning_rate(p_.config.lr_schedule(), step),
                        .inverse_valid_tokens = 1.0f / float(p_.config.global_batch_tokens)};
    pending_.push_back({step, in.learning_rate});
    p_.engine.enqueue_step(in, inputs_, targets_);
}

void TrainingLoop::finish_one() {
    const StepResult result = p_.engine.collect();
    const Pending p = pending_.front();
    pending_.pop_front();
    p_.log.step({.steps_done = p.step + 1, .loss = result.loss_sum, .grad_norm = result.grad_norm, .learning_rate = p.learning_rate,
                 .seconds = result.seconds, .tokens = p_.config.global_batch_tokens,
                 .skipped = result.skip_update != 0, .skipped_steps = result.skipped_steps});
    skipped_in_a_row_ = result.skip_update ? skipped_in_a_row_ + 1 : 0;
    REQUIRE(skipped_in_a_row_ < kMostSkippedInARow, "%d steps in a row were not finite and left the weights as they are: lower --lr and resume from an earlier checkpoint",
            kMostSkippedInARow);
}

void TrainingLoop::evaluate(int64_t steps_done) {
    if (!p_.validation) return;
    const double start = now_s();
    const Validation::Result result = p_.validation.run(p_.engine);
    p_.log.eval(steps_done, result.loss, result.tokens, now_s() - start);
}

void TrainingLoop::save(TrainState& state, int64_t steps_done) {
    const double start = now_s();
    p_.engine.save(state);
    state.step = steps_done;
    const std::string path = save_checkpoint(p_.config.out, checkpoint_info(p_.config, p_.engine, p_.train), p_.list, state);
    prune_checkpoints(p_.config.out, p_.config.keep);
    p_.log.checkpoint(steps_done, path, now_s() - start);
}
