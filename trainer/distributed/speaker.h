// One of a machine's ranks speaks where they have no watch yet: before they have met, all find at the same time that somebody is
// missing, and none of them knows the others.
//
// The first rank that makes a Speaker listens at a socket of the job's name, the others connect to it. When they are to end they
// tell it so, and it tells them when it has spoken; if it does not within three seconds, or goes, they elect another one.
#pragma once
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "trainer/distributed/launch.h"
#include "trainer/distributed/socket.h"

class Speaker {
  public:
    explicit Speaker(const Launch& launch);

    // Of the ranks of this machine that have found the same, within a second of each other.
    using Line = std::function<std::string(const std::set<int>& ranks)>;
    // Ends this process with status 1; the line is printed by one rank of the machine. Rank 0's machine comes first: a launcher may
    // end the others then.
    [[noreturn]] void end(const Line& line);
    // The same, of what is known without the others; rank 0's line is printed at once, and is the only one.
    [[noreturn]] void end(const std::string& line);
    // Ends this process if another rank of the machine has spoken.
    void leave_if_spoken();

  private:
    void listen_or_connect();
    bool hears(double within_s) const;
    void listen_for(double duration_s);
    [[noreturn]] void leave();
    [[noreturn]] void end_after(double collect_s, const Line& line);

    const Launch launch_;
    bool on_first_machine_;
    int election_ = 0;
    Socket listener_;              // the speaker's
    std::vector<Socket> others_;   // its connections
    std::set<int> waiting_;        // who has said over them that it is to end
    bool rank_0_spoke_ = false;
    Socket connection_;            // another rank's, to the speaker
};
