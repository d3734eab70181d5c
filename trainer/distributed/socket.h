// TCP connections with deadlines. Errors are exceptions that say what failed; a peer that closed is an Error too.
#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

using Clock = std::chrono::steady_clock;
Clock::time_point seconds_from_now(double seconds);
double seconds_since(Clock::time_point then);

class Socket {
  public:
    Socket() = default;
    explicit Socket(int file) : file_(file) {}
    Socket(Socket&& other) noexcept;
    Socket& operator=(Socket&& other) noexcept;
    ~Socket();

    explicit operator bool() const { return file_ >= 0; }
    int file() const { return file_; }

    void send_all(const void* data, size_t bytes);
    void receive_all(void* data, size_t bytes);  // blocks without end unless a limit is set
    void limit_receive(double seconds);          // of every receive that follows; 0: none

  private:
    int file_ = -1;
};

// Port 0: any free one. `port` returns it.
Socket listen_on(int& port);
// Invalid when nobody came before the deadline.
Socket accept_before(const Socket& listener, Clock::time_point deadline);
// Tries every address in turn, again and again, until the deadline; then invalid.
Socket connect_before(const std::vector<std::string>& addresses, int port, Clock::time_point deadline);

std::string host_name();
std::vector<std::string> own_addresses();  // IPv4, of interfaces that are up; loopback last
