// All ranks of the run: how they find each other, agree and end.
//
// Every rank connects to rank 0 twice (meeting.h): one connection carries small messages of the main threads, the other the signs
// of life of the watch. Where Open MPI started the ranks and the plugin was built, MPI tells them rank 0's address and
// carries the host collectives; otherwise they find it at MASTER_ADDR:MASTER_PORT (rules in world.cpp; under torchrun, whose
// store holds that port, at the next one) and TCP does.
#pragma once
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "trainer/distributed/communicator.h"
#include "trainer/distributed/launch.h"
#include "trainer/distributed/meeting.h"
#include "trainer/distributed/watch.h"

struct MpiFunctions;
class Transport;

// The line for the person at the terminal.
std::string described(const std::exception& error);
// Thrown on when an error has been printed.
struct Reported {};

class World {
  public:
    // Waits until all ranks are there. If that fails, or takes longer than `timeout_s`, ends the process, one rank a machine with a line
    // that names the missing ones. Alone: nothing to do.
    World(const Launch& launch, double timeout_s);
    ~World();

    int rank() const { return launch_.rank; }
    int size() const { return launch_.size; }
    int local_rank() const { return local_rank_; }
    bool alone() const { return size() == 1; }
    const char* transport() const;  // of the host collectives, "" when alone

    Communicator& host() { return *host_; }  // of all ranks
    // Of the ranks that give the same color; all ranks call it. Its ranks are in the order of these ones.
    std::unique_ptr<Communicator> split(int color);
    Watch* watch() { return watch_.get(); }

    // Text of every rank, in order; all ranks call it.
    std::vector<std::string> all_texts(const std::string& mine);
    // JobError that names the first rank with another value than rank 0's, and both values. All ranks call it.
    using Fact = std::pair<std::string, std::string>;  // what, value
    void require_agreement(const std::vector<Fact>& facts);

    [[noreturn]] void fail(const std::exception& error);  // prints the error (in one of the ranks) and ends the job with status 1
    // Does the work; what it throws is printed before anything that was made outside of it goes: devices and communicators may hang when
    // they do, and would hide why. Several ranks end with that, one alone throws Reported.
    template <typename Work>
    void report_first(Work&& work) {
        try {
            work();
        } catch (const std::exception& error) {
            report(error);
        }
    }
    void finish();                                        // after the last collective

  private:
    class TcpTransport;
    class MpiTransport;

    [[noreturn]] void report(const std::exception& error);
    void load_mpi();
    Meeting arrange_meeting(double timeout_s, Speaker& speaker);
    Meeting meeting_of_environment() const;
    Meeting meeting_over_mpi();
    std::vector<std::string> exchange_texts(const std::string& mine);
    std::unique_ptr<Transport> transport_of(const std::vector<int>& members, int color);

    Launch launch_;
    int local_rank_ = 0;
    const MpiFunctions* mpi_ = nullptr;
    std::vector<Socket> peers_;  // messages: rank 0 has one of every other rank (by rank, its own empty), the others rank 0's
    std::unique_ptr<Watch> watch_;
    std::unique_ptr<Communicator> host_;
};
