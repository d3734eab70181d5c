#include "trainer/distributed/meeting.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <thread>
#include <utility>

namespace {

constexpr uint64_t kMagic = 0x7470675f66703801;  // of this protocol
constexpr double kLook = 0.5, kTimeToSpeak = 0.5, kTick = 0.02, kTimeForHello = 60;  // s
enum Channel : int32_t { kMessages, kSignsOfLife, kChannels };

template <size_t N>
void copy_text(char (&to)[N], const std::string& text) {
    std::snprintf(to, N, "%s", text.c_str());
}

// First words on a connection.
struct Hello {
    uint64_t magic;
    int32_t rank, size, channel, process;
    char job[64], host[64];
};
// Rank 0's answer, when all are there or never will be.
struct Welcome {
    uint64_t magic;
    int32_t accepted, local_rank, process;
    char host[64];
};

bool is_closed(const Socket& socket) {
    char byte = 0;
    const ssize_t got = socket ? recv(socket.file(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) : 1;
    return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
}

struct Arrived {
    Hello hello{};
    Socket connections[kChannels];

    bool complete() const { return connections[kMessages] && connections[kSignsOfLife]; }
    bool left() const { return is_closed(connections[kMessages]) || is_closed(connections[kSignsOfLife]); }
};

// Whoever has connected and not yet said who it is.
struct Stranger {
    Socket socket;
    Clock::time_point came = Clock::now();

    bool has_spoken() const {
        Hello hello;
        return recv(socket.file(), &hello, sizeof hello, MSG_PEEK | MSG_DONTWAIT) == ssize_t(sizeof hello);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Rank 0

class Host {
  public:
    Host(const Launch& launch, Meeting meeting, double timeout_s)
        : launch_(launch), meeting_(std::move(meeting)), timeout_s_(timeout_s), arrived_(size_t(launch.size)) {}

    Met wait_for_all() {
        const Clock::time_point deadline = seconds_from_now(timeout_s_);
        while (std::any_of(arrived_.begin() + 1, arrived_.end(), [](const Arrived& a) { return !a.complete(); })) {
            const bool somebody_came = accept_one(std::min(deadline, seconds_from_now(strangers_.empty() ? kLook : kTick)));
            hear_strangers();
            for (const Arrived& a : arrived_)
                if (a.left()) refuse(message("rank %d (%s, process %d) died before all ranks had met", a.hello.rank, a.hello.host, a.hello.process));
            if (!somebody_came && Clock::now() >= deadline) refuse_for_missing();
        }
        return welcome();
    }

  private:
    static void say_no(const Socket& socket) {
        const Welcome no{.magic = kMagic, .accepted = 0, .local_rank = 0, .process = getpid(), .host = {}};
        if (socket) send(socket.file(), &no, sizeof no, MSG_NOSIGNAL);
    }

    [[noreturn]] void refuse(const std::string& why) {
        for (const Arrived& a : arrived_) say_no(a.connections[kMessages]);
        throw JobError(why);
    }

    void refuse_for_missing() {
        std::string missing;
        for (int r = 1; r < launch_.size; ++r)
            if (!arrived_[size_t(r)].complete()) missing += (missing.empty() ? "" : ", ") + std::to_string(r);
        if (!missing.empty())
            refuse(message("rank %s of %d has not joined rank 0 at %s, port %d, within %g s%s", missing.c_str(), launch_.size, host_name().c_str(), meeting_.port, timeout_s_,
                           meeting_.hint.c_str()));
    }

    bool accept_one(Clock::time_point deadline) {
        Socket socket = accept_before(meeting_.listener, deadline);
        if (!socket) return false;
        strangers_.push_back({.socket = std::move(socket)});
        return true;
    }

    // Never waits for one: it may be a port scanner. Nor is it kept for ever, or there would be no file left for a rank.
    void hear_strangers() {
        for (Stranger& s : strangers_) {
            if (s.has_spoken()) receive_hello(std::exchange(s.socket, {}));
            else if (is_closed(s.socket) || seconds_since(s.came) > kTimeForHello) s.socket = {};
        }
        std::erase_if(strangers_, [](const Stranger& s) { return !s.socket; });
    }

    void receive_hello(Socket socket) {
        Hello hello{};
        socket.receive_all(&hello, sizeof hello);
        if (hello.magic != kMagic || launch_.job.substr(0, sizeof hello.job - 1) != hello.job) return;  // of another program or job
        if (hello.size != launch_.size || hello.rank < 1 || hello.rank >= launch_.size || hello.channel < 0 || hello.channel >= kChannels) {
            say_no(socket);
            refuse(message("a process on %s says that it is rank %d of %d, rank 0 is one of %d", hello.host, hello.rank, hello.size, launch_.size));
        }
        Arrived& a = arrived_[size_t(hello.rank)];
        if (a.connections[hello.channel]) {
            say_no(socket);
            refuse(message("rank %d joined twice, from %s and %s", hello.rank, a.hello.host, hello.host));
        }
        a.hello = hello;
        a.connections[hello.channel] = std::move(socket);
    }

    Met welcome() {
        Met met{.connections = std::vector<Socket>(size_t(launch_.size)), .watched = {}, .local_rank = 0};
        std::vector<std::string> hosts{host_name()};
        for (int r = 1; r < launch_.size; ++r) {
            Arrived& a = arrived_[size_t(r)];
            Welcome welcome{.magic = kMagic, .accepted = 1, .local_rank = int32_t(std::count(hosts.begin(), hosts.end(), a.hello.host)), .process = getpid(), .host = {}};
            copy_text(welcome.host, hosts[0]);
            send(a.connections[kMessages].file(), &welcome, sizeof welcome, MSG_NOSIGNAL);  // a rank that is gone by now: the watch will say so
            hosts.push_back(a.hello.host);
            met.connections[size_t(r)] = std::move(a.connections[kMessages]);
            met.watched.push_back({.rank = r, .host = a.hello.host, .process = a.hello.process, .connection = std::move(a.connections[kSignsOfLife])});
        }
        return met;
    }

    const Launch& launch_;
    const Meeting meeting_;
    const double timeout_s_;
    std::vector<Arrived> arrived_;
    std::vector<Stranger> strangers_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Others

std::string place(const Meeting& meeting) {
    std::string where;
    for (const std::string& address : meeting.addresses) where += (where.empty() ? "" : " or ") + address;
    return where + message(", port %d", meeting.port);
}

Socket connect_to_rank_0(const Launch& launch, const Meeting& meeting, double timeout_s, Speaker& speaker) {
    const Clock::time_point deadline = seconds_from_now(timeout_s);
    while (true) {
        if (Socket socket = connect_before(meeting.addresses, meeting.port, std::min(deadline, seconds_from_now(kLook)))) return socket;
        speaker.leave_if_spoken();
        if (Clock::now() >= deadline)
            throw JobError(message("rank 0 of %d does not answer at %s, for %g s (MASTER_ADDR, MASTER_PORT)%s", launch.size, place(meeting).c_str(), timeout_s,
                                   meeting.hint.c_str()));
    }
}

// Rank 0 may have died, or have ended the job: then it speaks first.
Welcome welcome_of_rank_0(const Launch& launch, const Meeting& meeting, double timeout_s, Socket& connection) {
    Welcome welcome{};
    const Clock::time_point start = Clock::now();
    connection.limit_receive(timeout_s + 2);  // it waits for others meanwhile
    try {
        connection.receive_all(&welcome, sizeof welcome);
    } catch (const Error&) {
        const bool silent = seconds_since(start) >= timeout_s;
        std::this_thread::sleep_for(std::chrono::duration<double>(kTimeToSpeak));
        throw JobError(message("rank 0 of %d at %s %s before all ranks had met", launch.size, place(meeting).c_str(), silent ? "stopped or hangs" : "died"));
    }
    connection.limit_receive(0);
    REQUIRE(welcome.magic == kMagic, "%s: is not rank 0 of this job", place(meeting).c_str());
    return welcome;
}

Met join(const Launch& launch, const Meeting& meeting, double timeout_s, Speaker& speaker) {
    Socket connections[kChannels];
    for (Socket& connection : connections) connection = connect_to_rank_0(launch, meeting, timeout_s, speaker);
    for (int channel = 0; channel < kChannels; ++channel) {  // after all are connected: rank 0 may leave with the first that it hears
        Hello hello{.magic = kMagic, .rank = launch.rank, .size = launch.size, .channel = channel, .process = getpid(), .job = {}, .host = {}};
        copy_text(hello.job, launch.job);
        copy_text(hello.host, host_name());
        send(connections[channel].file(), &hello, sizeof hello, MSG_NOSIGNAL);  // if rank 0 is gone, there is no answer
    }
    const Welcome welcome = welcome_of_rank_0(launch, meeting, timeout_s, connections[kMessages]);
    if (!welcome.accepted) _exit(1);  // rank 0 says why
    Met met{.connections = {}, .watched = {}, .local_rank = welcome.local_rank};
    met.connections.push_back(std::move(connections[kMessages]));
    met.watched.push_back({.rank = 0, .host = welcome.host, .process = welcome.process, .connection = std::move(connections[kSignsOfLife])});
    return met;
}

}  // namespace

Met meet(const Launch& launch, Meeting meeting, double timeout_s, Speaker& speaker) {
    if (launch.rank == 0) return Host(launch, std::move(meeting), timeout_s).wait_for_all();
    return join(launch, meeting, timeout_s, speaker);
}
