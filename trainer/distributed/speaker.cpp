#include "trainer/distributed/speaker.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>

#include "kernels/common/check.h"

namespace {

constexpr double kTimeToName = 3, kTimeToJoin = 1, kTick = 0.05;  // s
constexpr int kSpoken = -1;  // rank 0's word to the speaker, in place of its number
using seconds = std::chrono::duration<double>;

// Abstract: it has no file, and goes with the process.
sockaddr_un address_of(const Launch& launch, int election) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    const std::string job = message("%s %s %d %d", launch.job.c_str(), launch.address.c_str(), launch.port, election);
    std::snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "train_gpt_fp8 %lld %zx", static_cast<long long>(getuid()), std::hash<std::string>()(job));
    return address;
}

Socket unix_socket() { return Socket(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

}  // namespace

Speaker::Speaker(const Launch& launch) : launch_(launch), on_first_machine_(launch.local_rank < 0 || launch.local_rank == launch.rank) { listen_or_connect(); }

void Speaker::listen_or_connect() {
    const sockaddr_un address = address_of(launch_, election_);
    const auto* where = reinterpret_cast<const sockaddr*>(&address);
    for (int attempt = 0; attempt < 100; ++attempt) {  // another rank may be between its bind and its listen, or about to go
        Socket made = unix_socket();
        if (bind(made.file(), where, sizeof address) == 0) {
            listen(made.file(), SOMAXCONN);
            listener_ = std::move(made);
            return;
        }
        if (connect(made.file(), where, sizeof address) == 0) {
            connection_ = std::move(made);
            return;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
}

bool Speaker::hears(double within_s) const {
    pollfd entry{connection_.file(), POLLIN, 0};
    char word = 0;
    return poll(&entry, 1, int(within_s * 1000)) > 0 && recv(connection_.file(), &word, 1, MSG_PEEK | MSG_DONTWAIT) == 1;
}

void Speaker::listen_for(double duration_s) {
    const Clock::time_point end = seconds_from_now(duration_s);
    do {
        const Clock::time_point tick = std::min(end, seconds_from_now(kTick));
        while (Socket other = accept_before(listener_, tick)) others_.push_back(std::move(other));
        for (const Socket& other : others_) {
            int rank = 0;
            if (recv(other.file(), &rank, sizeof rank, MSG_DONTWAIT) != sizeof rank) continue;
            if (rank == kSpoken) rank_0_spoke_ = true;
            else waiting_.insert(rank);
        }
    } while (Clock::now() < end);
}

// Others that come soon hear it too.
void Speaker::leave() {
    for (int i = 0; listener_ && i < kTimeToJoin / kTick; ++i) {
        listen_for(kTick);
        for (const Socket& other : others_) send(other.file(), "s", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    _exit(1);
}

void Speaker::leave_if_spoken() {
    if (connection_ && hears(0)) _exit(1);
    if (listener_) listen_for(0);
    if (rank_0_spoke_) leave();
}

void Speaker::end(const Line& line) { end_after(kTimeToJoin, line); }

void Speaker::end(const std::string& line) {
    if (launch_.rank != 0) end_after(0, [&](const std::set<int>&) { return line; });
    std::fprintf(stderr, "error: %s\n", line.c_str());
    if (connection_) send(connection_.file(), &kSpoken, sizeof kSpoken, MSG_NOSIGNAL | MSG_DONTWAIT);
    leave();
}

void Speaker::end_after(double collect_s, const Line& line) {
    if (!on_first_machine_) std::this_thread::sleep_for(seconds(kTimeToName));
    while (connection_) {
        send(connection_.file(), &launch_.rank, sizeof launch_.rank, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (hears(kTimeToName)) _exit(1);
        ++election_;  // the speaker is gone, or stopped
        connection_ = {};
        listen_or_connect();
    }
    waiting_.insert(launch_.rank);
    if (listener_) listen_for(collect_s);
    if (!rank_0_spoke_) std::fprintf(stderr, "error: %s\n", line(waiting_).c_str());
    leave();
}
