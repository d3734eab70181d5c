#include "trainer/run/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <thread>

#include "data/reason.h"
#include "kernels/common/check.h"

namespace {

constexpr auto kPause = std::chrono::milliseconds(100);

std::string this_process() {
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    return message("process %lld on %s", static_cast<long long>(getpid()), host);
}

std::string text_of(int file) {
    char text[512];
    const ssize_t bytes = pread(file, text, sizeof text, 0);
    return bytes > 0 ? std::string(text, size_t(bytes)) : "a process";
}

void write_holder(int file) {  // for whoever comes second; a full disk is no reason to end here
    const std::string text = this_process();
    if (ftruncate(file, 0) != 0 || pwrite(file, text.data(), text.size(), 0) < 0) return;
}

// Else another file has the name by now: the holder took its own away as it went.
bool has_its_name(int file, const std::string& path) {
    struct stat of_file{}, of_path{};
    return fstat(file, &of_file) == 0 && stat(path.c_str(), &of_path) == 0 && of_file.st_dev == of_path.st_dev && of_file.st_ino == of_path.st_ino;
}

}  // namespace

RunLock::RunLock(const std::string& out, double wait_s) : out_(out), path_(out + "/run.lock") {
    std::error_code error;
    made_folder_ = std::filesystem::create_directories(out_, error);
    REQUIRE(!error, "--out %s: cannot make the folder: %s", out_.c_str(), reason(error.value()).c_str());
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(wait_s);
    bool waiting = false;
    for (Attempt result = attempt(); result != Attempt::locked; result = attempt()) {
        if (result == Attempt::gone) continue;
        REQUIRE(std::chrono::steady_clock::now() < end, "--out %s: another run writes there (%s): stop it first, or choose another folder", out_.c_str(), holder_.c_str());
        if (!waiting) std::fprintf(stderr, "note: --out %s: another run is there (%s): waiting %.0f s for its end\n", out_.c_str(), holder_.c_str(), wait_s);
        waiting = true;
        std::this_thread::sleep_for(kPause);
    }
    write_holder(file_);
}

RunLock::~RunLock() {
    unlink(path_.c_str());  // while it is held
    close(file_);
    if (made_folder_) rmdir(out_.c_str());  // fails where anything is in it
}

RunLock::Attempt RunLock::attempt() {
    file_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    REQUIRE(file_ >= 0, "--out %s: cannot be written: run.lock: %s", out_.c_str(), reason(errno).c_str());
    const bool locked = flock(file_, LOCK_EX | LOCK_NB) == 0;
    if (!locked && errno != EWOULDBLOCK) {
        std::fprintf(stderr, "note: --out %s: cannot be locked (%s): see to it that no other run writes there\n", out_.c_str(), std::strerror(errno));
        return Attempt::locked;
    }
    if (locked && has_its_name(file_, path_)) return Attempt::locked;
    if (!locked) holder_ = text_of(file_);
    close(file_);
    return locked ? Attempt::gone : Attempt::held;
}
