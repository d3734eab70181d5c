// One run at a time in a folder: a lock of the system's on OUT/run.lock, which ends with the process, however that ends.
#pragma once
#include <string>

class RunLock {
  public:
    // Makes the folder. An Error that names it and the process that holds it, if that is not gone within wait_s: one that was
    // killed is there until its memory is given back. Where the file system has no locks, a note says so.
    RunLock(const std::string& out, double wait_s);
    // Takes the file away, and a folder that was made for nothing.
    ~RunLock();
    RunLock(const RunLock&) = delete;
    RunLock& operator=(const RunLock&) = delete;

  private:
    enum class Attempt { locked, held, gone };
    Attempt attempt();

    std::string out_, path_, holder_;
    bool made_folder_ = false;
    int file_ = -1;
};
