#include "trainer/distributed/world.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <new>
#include <numeric>
#include <tuple>

#include "ranks.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The launcher's environment

Environment environment_of(const std::map<std::string, std::string>& values) {
    return [values](const char* name) -> const char* {
        static thread_local std::map<std::string, std::string> kept;
        kept = values;
        const auto found = kept.find(name);
        return found == kept.end() ? nullptr : found->second.c_str();
    };
}

TEST(Launch, AloneWithoutALauncher) {
    const Launch launch = find_launch(environment_of({}));
    EXPECT_EQ(launch.size, 1);
    EXPECT_EQ(launch.rank, 0);
    EXPECT_EQ(launch.launcher, "");
    // A batch script is one process, though Slurm tells it how many its steps would have.
    EXPECT_EQ(find_launch(environment_of({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "16"}})).size, 1);
}

TEST(Launch, EveryLaunchersNames) {
    const std::pair<const char*, std::map<std::string, std::string>> cases[] = {
        {"torchrun", {{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "4"}, {"MASTER_ADDR", "node1"}, {"MASTER_PORT", "1233"}, {"TORCHELASTIC_RUN_ID", "none"}}},
        {"RANK and WORLD_SIZE", {{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "4"}, {"MASTER_ADDR", "node1"}, {"MASTER_PORT", "1234"}}},
        {"Open MPI", {{"OMPI_COMM_WORLD_RANK", "5"}, {"OMPI_COMM_WORLD_SIZE", "8"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}, {"MASTER_ADDR", "node1"}, {"MASTER_PORT", "1234"}}},
        {"PMI", {{"PMI_RANK", "5"}, {"PMI_SIZE", "8"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "4"}, {"MASTER_ADDR", "node1"}, {"MASTER_PORT", "1234"}}},
        {"PMI", {{"PMI_RANK", "5"}, {"PMI_SIZE", "8"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "4"}, {"SLURM_LAUNCH_NODE_IPADDR", "node1"}, {"MASTER_PORT", "1234"}}},
        {"Slurm", {{"SLURM_PROCID", "5"}, {"SLURM_STEP_NUM_TASKS", "8"}, {"SLURM_LOCALID", "1"}, {"SLURM_LAUNCH_NODE_IPADDR", "node1"}, {"MASTER_PORT", "1234"}}},
    };
    for (const auto& [name, values] : cases) {
        const Launch launch = find_launch(environment_of(values));
        EXPECT_EQ(launch.launcher, name);
        EXPECT_EQ(launch.rank, 5) << name;
        EXPECT_EQ(launch.size, 8) << name;
        EXPECT_EQ(launch.local_rank, 1) << name;
        EXPECT_EQ(launch.local_size, name == std::string("Slurm") ? -1 : 4) << name;
        EXPECT_EQ(launch.address, "node1") << name;
        EXPECT_EQ(launch.port, 1234) << name;
    }
}

// torchrun's store listens at MASTER_PORT; others who set the same names leave it to rank 0.
TEST(Launch, TorchrunsOwnPortIsLeftAlone) {
    std::map<std::string, std::string> values = {{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "node1"}, {"MASTER_PORT", "29500"}};
    EXPECT_EQ(find_launch(environment_of(values)).port, 29500);
    values["TORCHELASTIC_RUN_ID"] = "none";
    EXPECT_EQ(find_launch(environment_of(values)).port, 29501);
    values["MASTER_PORT"] = "65535";
    EXPECT_NE(error_of([&] { find_launch(environment_of(values)); }).find("from 1 to 65534"), std::string::npos);
    values.erase("TORCHELASTIC_RUN_ID"), values["OMPI_COMM_WORLD_RANK"] = "1", values["OMPI_COMM_WORLD_SIZE"] = "2";
    EXPECT_EQ(find_launch(environment_of(values)).port, 65535);
}

TEST(Launch, MpirunInsideOfSlurmIsMpirun) {
    const Launch launch = find_launch(environment_of({{"SLURM_PROCID", "0"}, {"SLURM_STEP_NUM_TASKS", "2"}, {"OMPI_COMM_WORLD_RANK", "3"}, {"OMPI_COMM_WORLD_SIZE", "16"}}));
    EXPECT_EQ(launch.launcher, "Open MPI");
    EXPECT_EQ(launch.size, 16);
    EXPECT_EQ(launch.local_rank, -1);
}

// Containers made for PyTorch set RANK and WORLD_SIZE of one process; torchrun's processes may be inside of anything.
TEST(Launch, RankAndWorldSizeYieldToALaunchersOwnNames) {
    for (const auto& [name, rank, size] : {std::tuple("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), std::tuple("PMI", "PMI_RANK", "PMI_SIZE")}) {
        std::map<std::string, std::string> values = {{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"LOCAL_RANK", "0"}, {rank, "1"}, {size, "2"}};
        const Launch launch = find_launch(environment_of(values));
        EXPECT_EQ(launch.launcher, name);
        EXPECT_EQ(launch.rank, 1) << name;
        EXPECT_EQ(launch.size, 2) << name;
        values["TORCHELASTIC_RUN_ID"] = "none";
        EXPECT_EQ(find_launch(environment_of(values)).launcher, "torchrun") << name;
    }
    EXPECT_EQ(find_launch(environment_of({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"SLURM_PROCID", "0"}, {"SLURM_STEP_NUM_TASKS", "1"}})).launcher, "RANK and WORLD_SIZE");
}

TEST(Launch, NonsenseIsAnErrorThatNamesTheVariable) {
    for (const auto& [rank, size] : {std::pair("4", "4"), std::pair("-1", "4"), std::pair("x", "4"), std::pair("0", "0"), std::pair("1.5", "4")}) {
        const std::string error = error_of([&] { find_launch(environment_of({{"RANK", rank}, {"WORLD_SIZE", size}})); });
        EXPECT_TRUE(error.find("RANK") != std::string::npos || error.find("WORLD_SIZE") != std::string::npos) << rank << " of " << size << ": " << error;
    }
    EXPECT_NE(error_of([] { find_launch(environment_of({{"MASTER_PORT", "99999"}})); }).find("MASTER_PORT"), std::string::npos);
}

// ---------------------------------------------------------------------------------------------------------------------
// Meeting and collectives over TCP. (tests/distributed_tests.py does the same over MPI with the whole program.)

void expect(bool condition, const char* what) { REQUIRE(condition, "expectation failed: %s", what); }
#define EXPECT_IN_RANK(condition) expect((condition), #condition)

void collectives(World& world) {
    const int rank = world.rank(), size = world.size();
    Communicator& all = world.host();
    EXPECT_IN_RANK(all.rank() == rank && all.size() == size);

    std::vector<float> sums(1001);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = float(rank + 1) * 0.1f + float(i);
    std::vector<float> expected(sums.size());
    for (size_t i = 0; i < sums.size(); ++i) {
        expected[i] = 0.1f + float(i);
        for (int r = 1; r < size; ++r) expected[i] += float(r + 1) * 0.1f + float(i);  // in the order of ranks: the same bits
    }
    std::vector<float> slices(size_t(size) * 77);
    for (size_t i = 0; i < slices.size(); ++i) slices[i] = sums[i % 77] * float(i / 77 + 1);
    all.all_reduce(sums.data(), int64_t(sums.size()), Element::f32, Reduction::sum);
    EXPECT_IN_RANK(sums == expected);
    all.reduce_scatter(slices.data(), 77, Element::f32);
    for (int i = 0; i < 77; ++i) {
        float want = (0.1f + float(i)) * float(rank + 1);
        for (int r = 1; r < size; ++r) want += (float(r + 1) * 0.1f + float(i)) * float(rank + 1);
        EXPECT_IN_RANK(slices[size_t(rank * 77 + i)] == want);
    }

    std::vector<uint16_t> halves = {uint16_t(0x3f80), uint16_t(0x3f81)};  // 1 and 1 + 2^-7
    all.all_reduce(halves.data(), 2, Element::bf16, Reduction::sum);
    EXPECT_IN_RANK(size != 2 || (halves[0] == 0x4000 && halves[1] == 0x4001));
    EXPECT_IN_RANK(size != 4 || (halves[0] == 0x4080 && halves[1] == 0x4081));

    uint32_t most[2] = {uint32_t(rank), uint32_t(100 - rank)};
    all.all_reduce(most, 2, Element::u32, Reduction::max);
    EXPECT_IN_RANK(most[0] == uint32_t(size - 1) && most[1] == 100);

    std::vector<char> bytes(size_t(size) * 3, 'x');
    std::fill_n(bytes.begin() + rank * 3, 3, char('a' + rank));
    all.all_gather(bytes.data(), 3);
    for (int r = 0; r < size; ++r) EXPECT_IN_RANK(std::string(bytes.data() + r * 3, 3) == std::string(3, char('a' + r)));
    int64_t word = rank == size - 1 ? 4711 : 0;
    all.broadcast(&word, sizeof word, size - 1);
    EXPECT_IN_RANK(word == 4711);
    EXPECT_IN_RANK(all.traffic().gathered == int64_t(size - 1) * 3);

    const std::vector<std::string> texts = world.all_texts(std::string(size_t(rank), '#'));
    for (int r = 0; r < size; ++r) EXPECT_IN_RANK(texts[size_t(r)].size() == size_t(r));
}

TEST(World, CollectivesAddInTheOrderOfRanks) {
    for (const int size : {1, 2, 3, 4, 7}) {
        const Outcome outcome = run_ranks({.size = size}, collectives);
        EXPECT_TRUE(outcome.all(0)) << size << " ranks: " << outcome.errors;
    }
}

TEST(World, GroupsTalkAmongThemselves) {
    const Outcome outcome = run_ranks({.size = 6}, [](World& world) {
        for (const int groups : {1, 2, 3, 6}) {
            const std::unique_ptr<Communicator> group = world.split(world.rank() % groups);
            EXPECT_IN_RANK(group->size() == 6 / groups && group->rank() == world.rank() / groups);
            uint32_t most = uint32_t(world.rank());
            group->all_reduce(&most, 1, Element::u32, Reduction::max);
            EXPECT_IN_RANK(int(most) == 6 - groups + world.rank() % groups);
            std::vector<float> slices(size_t(group->size()), float(world.rank()));
            group->reduce_scatter(slices.data(), 1, Element::f32);
            float sum = 0;
            for (int r = world.rank() % groups; r < 6; r += groups) sum += float(r);
            EXPECT_IN_RANK(slices[size_t(group->rank())] == sum);
        }
    });
    EXPECT_TRUE(outcome.all(0)) << outcome.errors;
}

TEST(World, LocalRanksAreCountedWhenTheLauncherDoesNotSay) {
    const Outcome outcome = run_ranks({.size = 3}, [](World& world) { EXPECT_IN_RANK(world.local_rank() == world.rank()); });
    EXPECT_TRUE(outcome.all(0)) << outcome.errors;
}

void after_a_while(pid_t child, int signal) {
    usleep(700'000);
    kill(child, signal);
}

TEST(World, AMissingRankIsNamed) {
    const Outcome outcome = run_ranks({.size = 4, .timeout_s = 1, .absent = {2}}, [](World&) {});
    EXPECT_TRUE(outcome.all(1)) << outcome.errors;
    EXPECT_EQ(outcome.lines(), 1) << outcome.errors;
    EXPECT_NE(outcome.errors.find("rank 2 of 4 has not joined"), std::string::npos) << outcome.errors;
    EXPECT_LT(outcome.seconds, 5);
}

TEST(World, AMissingRankZeroIsNamedOnce) {
    for (const std::vector<int>& absent : {std::vector<int>{0}, std::vector<int>{0, 1}}) {
        const Outcome outcome = run_ranks({.size = 4, .timeout_s = 1, .absent = absent}, [](World&) {});
        EXPECT_TRUE(outcome.all(1)) << outcome.errors;
        EXPECT_EQ(outcome.lines(), 1) << outcome.errors;
        EXPECT_NE(outcome.errors.find("rank 0 of 4 does not answer"), std::string::npos) << outcome.errors;
        EXPECT_LT(outcome.seconds, 5);
    }
}

// The last rank is not there; what happens to one of those that wait for it.
Outcome while_waiting(int victim, int signal) {
    return run_ranks({.size = 4, .timeout_s = signal == SIGSTOP ? 2.0 : 6.0, .absent = {3}, .meanwhile = [&](auto& children) {
                          after_a_while(children[size_t(victim)], signal);
                          if (signal != SIGSTOP) return;
                          sleep(6);
                          kill(children[size_t(victim)], SIGKILL);  // as a launcher would
                      }}, [](World&) {});
}

TEST(World, ARankThatDiesBeforeAllHaveMetIsNamedAtOnce) {
    for (const int victim : {0, 2}) {
        const Outcome outcome = while_waiting(victim, SIGKILL);
        for (int r = 0; r < 3; ++r) EXPECT_EQ(outcome.statuses[size_t(r)], r == victim ? 128 + SIGKILL : 1) << outcome.errors;
        EXPECT_EQ(outcome.lines(), 1) << outcome.errors;
        EXPECT_NE(outcome.errors.find(message("error: rank %d ", victim)), std::string::npos) << outcome.errors;
        EXPECT_NE(outcome.errors.find("died before all ranks had met"), std::string::npos) << outcome.errors;
        EXPECT_LT(outcome.seconds, 4);
    }
}

TEST(World, ARankZeroThatIsStoppedBeforeAllHaveMetIsNamed) {
    const Outcome outcome = while_waiting(0, SIGSTOP);
    EXPECT_EQ(outcome.statuses[1], 1);
    EXPECT_EQ(outcome.statuses[2], 1);
    EXPECT_EQ(outcome.lines(), 1) << outcome.errors;
    EXPECT_NE(outcome.errors.find("stopped or hangs before all ranks had met"), std::string::npos) << outcome.errors;
}

TEST(World, RanksOfAnotherSizeAreRefused) {
    const Outcome outcome = run_ranks({.size = 3, .timeout_s = 5, .claimed_size_of_last = 4}, [](World&) {});
    EXPECT_TRUE(outcome.all(1)) << outcome.errors;
    EXPECT_EQ(outcome.lines(), 1) << outcome.errors;
    EXPECT_NE(outcome.errors.find("rank 2 of 4"), std::string::npos) << outcome.errors;
    EXPECT_LT(outcome.seconds, 4);
}

TEST(World, DisagreementNamesRankAndValues) {
    const Outcome outcome = run_ranks({.size = 3}, [](World& world) {
        world.require_agreement({{"--seed", "1"}, {"--lr", "0.1"}});
        world.require_agreement({{"--seed", "1"}, {"--lr", world.rank() == 2 ? "0.2" : "0.1"}});
    });
    EXPECT_TRUE(outcome.all(1)) << outcome.errors;
    EXPECT_EQ(outcome.lines(), 1) << outcome.errors;
    EXPECT_NE(outcome.errors.find("error: rank 2 has --lr 0.2, rank 0 has 0.1"), std::string::npos) << outcome.errors;
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults

void forever(World& world) {
    for (float x = 1;; x = 1) {
        world.host().all_reduce(&x, 1, Element::f32, Reduction::sum);
        usleep(1000);
    }
}

TEST(Faults, AKilledRankEndsTheJobAtOnce) {
    for (const int victim : {0, 1, 2}) {
        const Outcome outcome = run_ranks({.size = 3, .timeout_s = 20, .meanwhile = [&](auto& children) { after_a_while(children[size_t(victim)], SIGKILL); }}, forever);
        for (int r = 0; r < 3; ++r) EXPECT_EQ(outcome.statuses[size_t(r)], r == victim ? 128 + SIGKILL : 1) << outcome.errors;
        EXPECT_EQ(outcome.lines(), 1) << outcome.errors;
        EXPECT_NE(outcome.errors.find(message("rank %d (", victim)), std::string::npos) << outcome.errors;
        EXPECT_NE(outcome.errors.find("died"), std::string::npos) << outcome.errors;
        EXPECT_LT(outcome.seconds, 5);
    }
}

TEST(Faults, AStoppedRankEndsTheJobWithinTheTimeOut) {
    for (const int victim : {0, 2}) {
        const Outcome outcome = run_ranks({.size = 3, .timeout_s = 2, .meanwhile = [&](auto& children) {
                                               after_a_while(children[size_t(victim)], SIGSTOP);
                                               sleep(4);
                                               kill(children[size_t(victim)], SIGCONT);  // a launcher would kill it
                                           }}, forever);
        EXPECT_TRUE(outcome.all(1)) << outcome.errors;
        EXPECT_NE(outcome.errors.find(message("rank %d (", victim)), std::string::npos) << outcome.errors;
        EXPECT_NE(outcome.errors.find("no sign of life for 1.7 s"), std::string::npos) << outcome.errors;
    }
}

TEST(Faults, AHangingRankIsNamed) {
    for (const int victim : {0, 1}) {
        const Outcome outcome = run_ranks({.size = 3, .timeout_s = 2}, [&](World& world) {
            float x = 1;
            for (int i = 0; i < 100; ++i) world.host().all_reduce(&x, 1, Element::f32, Reduction::sum);
            if (world.rank() == victim) sleep(30);  // its watch lives
            forever(world);
        });
        EXPECT_TRUE(outcome.all(1)) << outcome.errors;
        EXPECT_EQ(outcome.lines(), 1) << outcome.errors;
        EXPECT_NE(outcome.errors.find(message("error: rank %d (", victim)), std::string::npos) << outcome.errors;
        EXPECT_NE(outcome.errors.find("hangs"), std::string::npos) << outcome.errors;
        EXPECT_LT(outcome.seconds, 8);
    }
}

TEST(Faults, WorkWithoutWaitingIsNotAHang) {
    const Outcome outcome = run_ranks({.size = 2, .timeout_s = 1}, [](World& world) {
        sleep(3);  // both compute
        float x = 1;
        world.host().all_reduce(&x, 1, Element::f32, Reduction::sum);
    });
    EXPECT_TRUE(outcome.all(0)) << outcome.errors;
}

TEST(Faults, AFailingRanksMessageIsPrintedOnce) {
    for (const int victim : {0, 2}) {
        const Outcome outcome = run_ranks({.size = 3}, [&](World& world) {
            if (world.rank() == victim) throw Error("the disk is full");
            forever(world);
        });
        EXPECT_TRUE(outcome.all(1)) << outcome.errors;
        EXPECT_EQ(outcome.errors, message("error: rank %d: the disk is full\n", victim));
        EXPECT_LT(outcome.seconds, 4);
    }
}

// As a device does that waits for ranks which wait for this one.
struct HangsWhenItGoes {
    ~HangsWhenItGoes() { sleep(30); }
};

TEST(Faults, AnErrorIsPrintedBeforeWhatHangsWhenItGoes) {
    for (const int victim : {0, 2}) {
        const Outcome outcome = run_ranks({.size = 3, .timeout_s = 2}, [&](World& world) {
            const HangsWhenItGoes device;
            world.report_first([&] {
                if (world.rank() == victim) throw Error("the disk is full");
                forever(world);
            });
        });
        EXPECT_TRUE(outcome.all(1)) << outcome.errors;
        EXPECT_EQ(outcome.errors, message("error: rank %d: the disk is full\n", victim));
        EXPECT_LT(outcome.seconds, 4);
    }
}

TEST(Faults, AnErrorOfOneRankAloneIsPrintedOnceAndFirst) {
    struct Device {
        std::string& printed_before;
        ~Device() { printed_before = testing::internal::GetCapturedStderr(); }
    };
    std::string printed;
    World world(Launch{}, 1);
    const auto run = [&] {
        world.report_first([&] {
            const Device device{printed};
            world.report_first([] { throw std::bad_alloc(); });
        });
    };
    testing::internal::CaptureStderr();
    EXPECT_THROW(run(), Reported);
    EXPECT_EQ(printed, "error: not enough host memory: choose a smaller --model or --micro-batch\n");
}

TEST(Faults, OutOfMemoryIsNamed) {
    const Outcome outcome = run_ranks({.size = 2}, [](World& world) {
        if (world.rank() == 1) throw std::bad_alloc();
        forever(world);
    });
    EXPECT_TRUE(outcome.all(1));
    EXPECT_NE(outcome.errors.find("rank 1: not enough host memory"), std::string::npos) << outcome.errors;
}

}  // namespace
