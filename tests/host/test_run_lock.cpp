#include "trainer/run/run_lock.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <future>
#include <optional>
#include <thread>

#include "tests/host/temp_folder.h"

namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;

TEST(RunLock, OneAtATimeAndTheErrorSaysWhatToDo) {
    const TempFolder folder;
    const std::string out = folder / "run";
    {
        const RunLock first(out, 0);
        const std::string error = error_of([&] { RunLock second(out, 0); });
        for (const std::string& part : {"--out " + out, std::to_string(getpid()), std::string("another folder")}) EXPECT_NE(error.find(part), std::string::npos) << error;
        EXPECT_NE(error_of([&] { RunLock third(out, 0); }), "") << "a refused one took the lock away";
    }
    EXPECT_EQ(error_of([&] { RunLock next(out, 0); }), "");
}

TEST(RunLock, LeavesNothingBehind) {
    const TempFolder folder;
    const std::string out = folder / "run";
    { const RunLock lock(out, 0); }
    EXPECT_FALSE(fs::exists(out)) << "a run that fails before it begins";
    {
        const RunLock lock(out, 0);
        write_file(out + "/log.jsonl", "{}\n");
    }
    EXPECT_TRUE(fs::exists(out + "/log.jsonl"));
    EXPECT_FALSE(fs::exists(out + "/run.lock"));
    fs::create_directories(folder / "empty");
    { const RunLock lock(folder / "empty", 0); }
    EXPECT_TRUE(fs::exists(folder / "empty")) << "the user's";
}

TEST(RunLock, EndsWithAProcessThatIsKilled) {
    const TempFolder folder;
    int ready[2];
    ASSERT_EQ(pipe(ready), 0);
    const pid_t child = fork();
    if (child == 0) {
        const RunLock lock(folder.path(), 0);
        [[maybe_unused]] const ssize_t written = write(ready[1], "x", 1);
        pause();
        _exit(0);
    }
    char byte;
    ASSERT_EQ(read(ready[0], &byte, 1), 1);
    EXPECT_NE(error_of([&] { RunLock lock(folder.path(), 0); }).find(std::to_string(child)), std::string::npos);
    kill(child, SIGKILL);
    EXPECT_EQ(error_of([&] { RunLock lock(folder.path(), 10); }), "") << "at once, as after a crash";
    EXPECT_EQ(waitpid(child, nullptr, 0), child);
}

TEST(RunLock, WaitsForOneThatEnds) {
    const TempFolder folder;
    std::optional<RunLock> first(std::in_place, folder.path(), 0);
    std::future<std::string> refused = std::async(std::launch::async, [&] {
        RunLock second(folder.path(), 30);
        return error_of([&] { RunLock third(folder.path(), 0); });  // the second has the lock of the file that is there
    });
    EXPECT_EQ(refused.wait_for(milliseconds(300)), std::future_status::timeout);
    first.reset();
    EXPECT_NE(refused.get(), "");
}

}  // namespace
