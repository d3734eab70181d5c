// One of a machine's ranks speaks where they have no watch yet: before they have met, all find at the same time that somebody is
// missing, and none of them knows the others.
//
// The first rank that makes a Speaker listens at a socket of the job's name, the others connect to it. It tells them when it has
// spoken; if it does not within two seconds of them, or goes, they elect another one.
#pragma once
#include <string>

#include "trainer/distributed/launch.h"
#include "trainer/distributed/socket.h"

class Speaker {
  public:
    explicit Speaker(const Launch& launch);

    // Ends this process with status 1; the line is printed by one rank of the machine. Rank 0's machine comes first: a launcher may
    // end the others then.
    [[noreturn]] void end(const std::string& line);
    // Ends this process if another rank of the machine has spoken.
    void leave_if_spoken() const;

  private:
    void listen_or_connect();
    bool hears(double within_s) const;

    const Launch launch_;
    bool on_first_machine_;
    int election_ = 0;
    Socket listener_;    // the speaker's
    Socket connection_;  // another rank's, to the speaker
};
