#include "trainer/distributed/speaker.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>

#include "kernels/common/check.h"

namespace {

constexpr double kTimeToName = 2, kLinger = 1;  // s
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

void Speaker::leave_if_spoken() const {
    if (connection_ && hears(0)) _exit(1);
}

void Speaker::end(const std::string& line) {
    if (!on_first_machine_) std::this_thread::sleep_for(seconds(kTimeToName));
    while (connection_) {
        if (hears(kTimeToName)) _exit(1);
        ++election_;  // the speaker is gone, or stopped
        connection_ = {};
        listen_or_connect();
    }
    std::fprintf(stderr, "error: %s\n", line.c_str());
    for (const Clock::time_point end = seconds_from_now(kLinger); listener_ && Clock::now() < end;) {
        const Socket other = accept_before(listener_, end);
        if (other) send(other.file(), "s", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    _exit(1);
}
