// The loop over steps: batches in, log lines out, evaluation and checkpoints in between.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "data/loader.h"
#include "trainer/config.h"
#include "trainer/engine.h"
#include "trainer/metrics.h"
#include "trainer/outliers.h"
#include "trainer/parallel.h"
#include "trainer/parameters.h"
#include "trainer/run/batch_check.h"
#include "trainer/run/checkpoint_saver.h"
#include "trainer/run/choices.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/profiled_steps.h"
#include "trainer/run/samples.h"

class TrainingLoop {
  public:
    struct Parts {
        const Config& config;
        Engine& engine;  // holds the state to begin with
        const ParameterList& list;
        const DataLoader& train;
        const Validation& validation;
        RunLog& log;
        const Choices* choices;  // or null
        const Samples* samples;  // or null
        ProfiledSteps& profile;
        TrainState& state;  // the same; emptied: its memory serves for checkpoints
        World& world;
        const Held& held;
        const Parallel& parallel;
    };
    explicit TrainingLoop(const Parts& parts);

    // From the step of the state that the engine holds to config.steps, or to the step in which a stop is asked for.
    void run();

  private:
    struct Pending {
        int64_t step;
        float learning_rate;
    };

    bool stop_agreed() const;
    void throw_if_stopped() const;
    bool due(int64_t every, int64_t steps_done) const;
    void note_closed_output();
    void enqueue(int64_t step);
    void finish_one();
    void reach_profile();
    void write_timeline(const Profile& profile) const;
    void log_traffic();
    void unless_stopped(int64_t steps_done, const char* what, const std::function<void()>& look) const;
    void evaluate(int64_t steps_done);
    void sample(int64_t steps_done);
    std::string remark(const StepResult& result, const OutlierDetector::Statistics& losses, const OutlierDetector::Statistics& norms) const;
    void start_save(int64_t steps_done);
    void report_save(const CheckpointSaver::Outcome& outcome);
    void save_last(int64_t steps_done);

    const Parts p_;
    const int64_t first_step_;
    int64_t step_;  // enqueued so far
    OutlierDetector outliers_;
    CheckpointSaver saver_;
    std::vector<int> inputs_, targets_;  // the batch being made
    BatchCheck batch_check_;
    std::deque<Pending> pending_;
    int skipped_in_a_row_ = 0;
    bool output_closed_ = false;
};
