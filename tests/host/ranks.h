// Runs a function in several processes that find each other as torchrun's would.
#pragma once
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "temp_folder.h"
#include "trainer/distributed/world.h"

struct Outcome {
    std::vector<int> statuses;  // exit status; 128 + signal when killed; -1 when it had to be killed at the end
    std::string errors;         // all ranks' stderr
    double seconds = 0;

    bool all(int status) const { return std::all_of(statuses.begin(), statuses.end(), [&](int s) { return s == status; }); }
    int lines() const { return int(std::count(errors.begin(), errors.end(), '\n')); }
};

struct RanksOptions {
    int size;
    double timeout_s = 10;
    std::vector<int> absent = {};
    int claimed_size_of_last = 0;  // what the last rank believes, when not `size`
    std::function<void(const std::vector<pid_t>&)> meanwhile = {};
};

inline int free_port() {
    int port = 0;
    const Socket listener = listen_on(port);
    return port;
}

// `work` gets a World that is there; a rank whose work throws reports it through World::fail, as the program does.
inline Outcome run_ranks(const RanksOptions& options, const std::function<void(World&)>& work) {
    const TempFolder folder;
    const std::string port = std::to_string(free_port());
    const auto start = std::chrono::steady_clock::now();
    std::vector<pid_t> children;
    for (int rank = 0; rank < options.size; ++rank) {
        if (std::find(options.absent.begin(), options.absent.end(), rank) != options.absent.end()) continue;
        const pid_t child = fork();
        if (child > 0) {
            children.push_back(child);
            continue;
        }
        const int file = open((folder / "errors").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
        dup2(file, STDERR_FILENO);
        const bool last = rank == options.size - 1;
        setenv("RANK", std::to_string(rank).c_str(), 1);
        setenv("WORLD_SIZE", std::to_string(last && options.claimed_size_of_last ? options.claimed_size_of_last : options.size).c_str(), 1);
        setenv("MASTER_ADDR", "127.0.0.1", 1);
        setenv("MASTER_PORT", port.c_str(), 1);
        std::unique_ptr<World> world;
        try {
            world = std::make_unique<World>(find_launch(getenv), options.timeout_s);
            work(*world);
            world->finish();
            _exit(0);
        } catch (const std::exception& error) {
            if (world) world->fail(error);
            std::fprintf(stderr, "error: %s\n", error.what());
            _exit(1);
        }
    }
    if (options.meanwhile) options.meanwhile(children);
    Outcome outcome;
    for (const pid_t child : children) {
        int status = 0;
        pid_t done = 0;
        while ((done = waitpid(child, &status, WNOHANG)) == 0 && std::chrono::steady_clock::now() - start < std::chrono::seconds(60)) usleep(10'000);
        if (done == 0) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            outcome.statuses.push_back(-1);
        } else {
            outcome.statuses.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
        }
    }
    outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    outcome.errors = read_file(folder / "errors");
    return outcome;
}
