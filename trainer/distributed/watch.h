// The watch over a job of several ranks: one thread a rank that sends signs of life to rank 0's, so that a rank that
// dies, stops, hangs or fails ends the whole job within the time-out, with one line that names it.
//
//   a rank's connection closes without a goodbye       it died
//   no message from a rank for 0.85 `timeout`          it is stopped, or its machine is gone
//   a rank waited 0.85 `timeout` for the others        the ranks that made the least progress hang
//   a rank reports a failure                           its message is printed
//
// Rank 0's watch prints the line and tells the others to leave; rank 1's prints what happens to rank 0. The process is
// ended from this thread (the main one may be blocked in a collective), with status 1.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "trainer/distributed/socket.h"

struct Peer {
    int rank = 0;
    std::string host;
    int process = 0;
    Socket connection;
};

class Watch {
  public:
    // Rank 0: all others as peers; other ranks: rank 0.
    Watch(int rank, std::vector<Peer> peers, double timeout_s);
    ~Watch();  // after goodbye()

    // The main thread waits for others from here until the object goes: a collective, or a device that may wait for others.
    class Waiting {
      public:
        Waiting(Watch* watch, const char* what) : watch_(watch) {
            if (watch_) watch_->begin_waiting(what);
        }
        ~Waiting() {
            if (watch_) watch_->end_waiting();
        }
        Waiting(const Waiting&) = delete;
        Waiting& operator=(const Waiting&) = delete;

      private:
        Watch* watch_;
    };

    // Ends the job with this message. `whole_job`: the message is about the job, not about this rank.
    [[noreturn]] void fail(const std::string& message, bool whole_job);
    // Nothing that happens to other ranks matters any more. Every rank has finished its work before any calls this.
    void goodbye();

  private:
    struct Message;
    struct Seen;
    void begin_waiting(const char* what);
    void end_waiting();

    void watch_all();
    void send_signs_of_life();
    void receive(Seen& seen);
    static void note_progress(Seen& seen, uint64_t progress, bool waiting);
    void handle(Seen& seen, const Message& message);
    void check_silence(const Seen& seen);
    void check_progress();
    void peer_is_gone(const Seen& seen, const std::string& what);
    [[noreturn]] void end_job(const std::string& line);

    const int rank_;
    const double patience_s_;
    std::vector<Seen> peers_;
    std::unique_ptr<Seen> self_;
    Clock::time_point last_sent_;

    std::atomic<uint64_t> progress_{0};
    std::atomic<bool> waiting_{false}, leaving_{false};
    std::atomic<const char*> waiting_for_{""};
    std::mutex failure_lock_;
    std::string failure_;  // of this rank, to be reported
    std::optional<Clock::time_point> overslept_;  // when the watching thread went on after a long stop
    std::atomic<bool> failed_{false};

    std::thread thread_;
};
