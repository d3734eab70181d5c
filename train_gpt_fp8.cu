// train_gpt_fp8: trains GPT models in FP8 on Hopper GPUs. This file is the program: options -> objects -> step loop.
//
//   options                 trainer/config               what a step computes    trainer/gpu_model, block, linear
//   model and recipe rows   trainer/model_spec, recipe   how it is launched      trainer/gpu_engine
//   tokens                  data/loader                  the same on the CPU     trainer/reference
//   log, checkpoints        trainer/metrics, checkpoint  kernels                 kernels/
//   start-up, the loop      trainer/run/start, training_loop
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>

#include "kernels/common/check.h"
#include "trainer/config.h"
#include "trainer/distributed/world.h"
#include "trainer/metrics.h"
#include "trainer/parallel.h"
#include "trainer/run/agreement.h"
#include "trainer/run/checkpoint_modes.h"
#include "trainer/run/choices.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/micro_batch.h"
#include "trainer/run/plan.h"
#include "trainer/run/profiled_steps.h"
#include "trainer/run/run_lock.h"
#include "trainer/run/samples.h"
#include "trainer/run/start.h"
#include "trainer/run/stop.h"
#include "trainer/run/training_loop.h"
#include "trainer/run/verify.h"
#include "trainer/standard_output.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr double kCrashedRunIsGone_s = 10;  // whose memory takes seconds to be given back

void train_on(const Parallel& parallel, const Config& config, World& world, const RunRecord& record, Clock::time_point program_start) {
    const ParameterList list = make_parameters(config.model_spec(), parallel.group->size());
    const Held held = held_by(list, parallel.group->rank(), parallel.group->size());
    const DataLoader data = training_data(config);
    const Validation validation(config);

    const std::string tokenizer = tokenizer_name(data.info().tokenizer);
    require_same_tokenizer({"--val " + config.val, validation.tokenizer()}, {"--train " + config.train, tokenizer});
    const EngineOptions shape = engine_options(config, parallel);
    std::optional<Samples> samples;
    std::optional<Choices> choices;
    if (config.sample_every > 0) samples.emplace(config, shape, text_tokenizer(tokenizer, config, "--sample-every"));
    if (!config.multiple_choice.empty()) choices.emplace(config.multiple_choice, shape, *text_tokenizer(tokenizer, config, "--multiple-choice"));

    std::optional<RunLock> lock;
    if (world.rank() == 0) lock.emplace(config.out, config.resume.empty() ? 0 : kCrashedRunIsGone_s);
    StartPoint start = start_point(config, list, held, data, world);
    ProfiledSteps profile(config);
    EngineOptions options = shape;
    options.pinned_gemms = start.gemm_choices;
    std::unique_ptr<Engine> engine;
    std::optional<RunLog> log;
    std::optional<TrainingLoop> loop;
    world.report_first([&] {
        engine = make_engine(config, options);
        engine->load(start.state);
        print_start({config, *engine, list, data, start, world});
        log.emplace(log_options(config, *engine, start.state.step, world), record);
        if (world.rank() == 0) save_configuration(config);
        stop_on_signals(world.rank());
        std::printf("ready after %s\n", format_duration(std::chrono::duration<double>(Clock::now() - program_start).count()).c_str());
        std::fflush(stdout);  // the first step, or an evaluation, may take long
        loop.emplace(TrainingLoop::Parts{.config = config, .engine = *engine, .list = list, .train = data, .validation = validation, .log = *log,
                                         .choices = choices ? &*choices : nullptr, .samples = samples ? &*samples : nullptr, .profile = profile,
                                         .state = start.state, .world = world, .held = held, .parallel = parallel});
        loop->run();
    });
}

void train(const Config& config, World& world, const RunRecord& record, Clock::time_point program_start) {
    const Parallel parallel = make_ranks(config, world);
    world.report_first([&] { train_on(parallel, config, world, record, program_start); });
}

// What concerns no other rank. False: nothing of that was asked for.
bool print_alone(const Config& config, const Launch& launch) {
    if (!config.mode_note.empty() && launch.rank == 0) std::fprintf(stderr, "note: %s\n", config.mode_note.c_str());
    if (config.print_config) std::fputs(given_toml(config).c_str(), stdout);
    else if (config.help_markdown) std::fputs(options_markdown().c_str(), stdout);
    else if (config.verify) verify(config);
    else if (!config.dry_run) return false;
    else if (launch.rank == 0) dry_run(config, launch.size);
    require_written_output();
    return true;
}

// Ranks meet before anything can fail, so that a failure of any of them ends all.
void run(int argc, char** argv) {
    const Clock::time_point program_start = Clock::now();
    const Launch launch = find_launch([](const char* name) -> const char* { return std::getenv(name); });
    if (launch.launcher == "torchrun" && !launch.job.empty()) stop_without_parent();
    Config config;
    std::unique_ptr<Error> bad_options;
    try {
        config = parse_config(argc, argv);
    } catch (const Error& error) {
        bad_options = std::make_unique<Error>(error);
    }
    if (!bad_options && print_alone(config, launch)) return;
    World world(launch, config.timeout);
    world.report_first([&] {
        if (bad_options) throw Error(*bad_options);
        const bool of_checkpoint = !config.generate.empty() || !config.evaluate.empty();
        REQUIRE(world.alone() || !of_checkpoint, "--generate and --evaluate run on one rank: start one process");
        if (!config.generate.empty()) return generate_from_checkpoint(config);
        if (!config.evaluate.empty()) return evaluate_checkpoint(config);
        REQUIRE(world.alone() || config.micro_batch > 0, "--micro-batch auto: measures on one rank; give %d ranks a number", world.size());
        config = choose_micro_batch(config);
        agree(world, config);
        if (world.rank() != 0 && !std::freopen("/dev/null", "w", stdout)) throw Error("cannot open /dev/null");
        train(config, world, run_record(config, make_parameters(config.model_spec()), argc, argv), program_start);
        world.finish();
    });
}

}  // namespace

int main(int argc, char** argv) {
    try {
        guard_standard_files();
        run(argc, argv);
        return 0;
    } catch (const Reported&) {
        return 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", described(error).c_str());
        return 1;
    }
}
