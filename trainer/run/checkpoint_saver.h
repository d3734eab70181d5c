// Saves checkpoints while training goes on:
//
//   snapshot(step)   the engine starts to copy its state to the host, beside the micro-batches of the next step
//   write(...)       once the step's result is known: a thread waits for the copy and writes the files
//   finished()       what came of it, when it ended
//
// There is one copy of the state on the host, so a snapshot waits for the write before it. Its memory is touched beside the first
// steps, which takes seconds for gigabytes; a snapshot that comes sooner (an early --checkpoint-every) waits for that, and says
// so. A save that fails is reported and leaves the checkpoints that are there.
//
// Several ranks: all call the same functions in the same order. write() and the end are done together (one rank begins the
// files, all write parts of what they hold in the background, one publishes); a rank's failure is every rank's outcome.
#pragma once
#include <future>
#include <optional>

#include "trainer/checkpoint.h"
#include "trainer/distributed/world.h"
#include "trainer/engine.h"

class CheckpointSaver {
  public:
    struct Options {
        std::string out;
        int keep;
        bool in_background;  // false: memory for the state is taken at the first snapshot, not beforehand
    };
    // `scratch` gives its memory.
    CheckpointSaver(const Options& options, Engine& engine, const ParameterList& list, TrainState&& scratch, World& world, const Held& held);

    void snapshot(int64_t steps_done);  // after the step has been enqueued; finished() must have told of the one before
    // The step whose snapshot waits for write(); -1: none.
    int64_t snapshot_step() const { return snapshot_step_; }
    void write(const CheckpointInfo& info, const std::vector<RecentStep>& recent);

    struct Outcome {
        int64_t steps_done;
        std::string path;     // "" when it failed
        std::string problem;  // "" when all went well
        double seconds;       // from the snapshot to the end
    };
    bool writing() const { return running_.valid(); }
    std::optional<Outcome> finished();  // does not wait
    Outcome wait();                     // there must be one

  private:
    void touch();
    Outcome save(const CheckpointInfo& info);
    void begin_together();
    Outcome save_part();
    Outcome publish_together(Outcome part);
    std::string first_problem(const std::string& mine);

    Options options_;
    Engine& engine_;
    const ParameterList& list_;
    World& world_;
    const Held& held_;
    TrainState state_;
    CheckpointInfo info_;   // of the checkpoint that several ranks are writing
    WrittenPart part_;      // of it, written here
    std::shared_future<void> touched_;
    std::shared_future<void> copied_;
    double start_s_ = 0;
    int64_t snapshot_step_ = -1;
    std::future<Outcome> running_;  // the last member: ends before what it uses
};
