#include "trainer/distributed/socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "kernels/common/check.h"

Clock::time_point seconds_from_now(double seconds) {
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}
double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

namespace {

int milliseconds_to(Clock::time_point deadline) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    return int(std::clamp<int64_t>(left, 0, 1 << 30));
}

bool wait_for(int file, short events, Clock::time_point deadline) {
    pollfd entry{file, events, 0};
    int status;
    do status = poll(&entry, 1, milliseconds_to(deadline));
    while (status < 0 && errno == EINTR);
    return status > 0;
}

void send_at_once(int file) {
    const int on = 1;
    setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// One attempt; -1 when it fails or takes longer than two seconds.
int try_connect(const addrinfo& to) {
    const int file = socket(to.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (file < 0) return -1;
    bool connected = connect(file, to.ai_addr, to.ai_addrlen) == 0;
    if (!connected && errno == EINPROGRESS && wait_for(file, POLLOUT, seconds_from_now(2))) {
        int error = 0;
        socklen_t size = sizeof error;
        connected = getsockopt(file, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0;
    }
    if (connected && fcntl(file, F_SETFL, 0) == 0) {
        send_at_once(file);
        return file;
    }
    close(file);
    return -1;
}

int try_address(const std::string& address, int port) {
    const addrinfo hints{.ai_flags = AI_NUMERICSERV, .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    addrinfo* found = nullptr;
    if (getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return -1;
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
    for (const addrinfo* a = found; a; a = a->ai_next)
        if (const int file = try_connect(*a); file >= 0) return file;
    return -1;
}

}  // namespace

Socket::Socket(Socket&& other) noexcept : file_(std::exchange(other.file_, -1)) {}
Socket& Socket::operator=(Socket&& other) noexcept {
    std::swap(file_, other.file_);
    return *this;
}
Socket::~Socket() {
    if (file_ >= 0) close(file_);
}

void Socket::send_all(const void* data, size_t bytes) {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
        const ssize_t sent = send(file_, from, bytes, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        REQUIRE(sent > 0, "cannot send to another rank: %s", std::strerror(errno));
        from += sent, bytes -= size_t(sent);
    }
}

void Socket::receive_all(void* data, size_t bytes) {
    char* to = static_cast<char*>(data);
    while (bytes > 0) {
        const ssize_t got = recv(file_, to, bytes, 0);
        if (got < 0 && errno == EINTR) continue;
        REQUIRE(got != 0, "another rank closed its connection");
        REQUIRE(got > 0, "cannot receive from another rank: %s", std::strerror(errno));
        to += got, bytes -= size_t(got);
    }
}

void Socket::limit_receive(double seconds) {
    const timeval limit{.tv_sec = time_t(seconds), .tv_usec = suseconds_t((seconds - double(time_t(seconds))) * 1e6)};
    setsockopt(file_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
}

Socket listen_on(int& port) {
    Socket listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    REQUIRE(listener, "cannot make a socket: %s", std::strerror(errno));
    const int on = 1;
    setsockopt(listener.file(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(uint16_t(port));
    address.sin_addr.s_addr = htonl(INADDR_ANY);
    const bool bound = bind(listener.file(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 && listen(listener.file(), SOMAXCONN) == 0;
    REQUIRE(bound, "MASTER_PORT %d: cannot listen on it: %s", port, std::strerror(errno));
    socklen_t size = sizeof address;
    getsockname(listener.file(), reinterpret_cast<sockaddr*>(&address), &size);
    port = ntohs(address.sin_port);
    return listener;
}

Socket accept_before(const Socket& listener, Clock::time_point deadline) {
    if (!wait_for(listener.file(), POLLIN, deadline)) return {};
    Socket peer(accept4(listener.file(), nullptr, nullptr, SOCK_CLOEXEC));
    if (peer) send_at_once(peer.file());
    return peer;
}

Socket connect_before(const std::vector<std::string>& addresses, int port, Clock::time_point deadline) {
    while (true) {
        for (const std::string& address : addresses)
            if (const int file = try_address(address, port); file >= 0) return Socket(file);
        if (Clock::now() >= deadline) return {};
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
}

std::string host_name() {
    char name[256] = "unknown";
    gethostname(name, sizeof name - 1);
    return name;
}

std::vector<std::string> own_addresses() {
    ifaddrs* all = nullptr;
    if (getifaddrs(&all) != 0) return {"127.0.0.1"};
    const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(all, freeifaddrs);
    std::vector<std::string> addresses;
    for (const ifaddrs* a = all; a; a = a->ifa_next) {
        if (!a->ifa_addr || a->ifa_addr->sa_family != AF_INET || !(a->ifa_flags & IFF_UP) || (a->ifa_flags & IFF_LOOPBACK)) continue;
        char text[INET_ADDRSTRLEN];
        if (inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(a->ifa_addr)->sin_addr, text, sizeof text)) addresses.push_back(text);
    }
    addresses.push_back("127.0.0.1");
    return addresses;
}
