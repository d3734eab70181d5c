// How the ranks meet at rank 0: each connects to it twice, says who it is, and is told when all are there, or that they never will be.
#pragma once
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "trainer/distributed/launch.h"
#include "trainer/distributed/socket.h"
#include "trainer/distributed/speaker.h"
#include "trainer/distributed/watch.h"

// A message about the job as a whole, to be printed as it is.
struct JobError : Error {
    using Error::Error;
};

struct Meeting {
    std::vector<std::string> addresses;
    int port = 0;
    Socket listener;   // rank 0's
    std::string hint;  // for the line about a rank that is missing
};

struct Met {
    std::vector<Socket> connections;  // for messages: rank 0 has one of every other rank (by rank, its own empty), the others rank 0's
    std::vector<Peer> watched;        // rank 0: all others; the others: rank 0
    int local_rank = 0;               // counted by rank 0
};

// After `timeout_s`, or as soon as a rank is known to be gone, a JobError that names who is missing. A rank that rank 0 tells so ends
// without a word.
Met meet(const Launch& launch, Meeting meeting, double timeout_s, Speaker& speaker);
