#include "trainer/run/stop.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <string_view>

namespace {

constexpr double kOneRequest_s = 1;  // timeout signals the process and its group, a terminal its group, a launcher its ranks
constexpr std::string_view kClearLine = "\r\033[K";  // of the progress, on a terminal
constexpr std::string_view kNote = "stopping after this step, which is saved; a signal again ends at once, without saving\n";

// A signal handler can reach nothing else.
volatile std::sig_atomic_t requested = 0, announced = 0, on_terminal = 0;
double first_request_s = 0;

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void say(std::string_view text) {  // a handler must not print otherwise; that nobody reads it is no error
    if (write(STDERR_FILENO, text.data(), text.size()) < 0) return;
}

void request_stop(int signal) {
    const int error = errno;
    if (requested == 0) {
        first_request_s = now_s();
        requested = 1;
        if (announced && on_terminal) say(kClearLine);
        if (announced) say(kNote);
    } else if (now_s() - first_request_s > kOneRequest_s) {
        std::signal(signal, SIG_DFL);
        std::raise(signal);
    }
    errno = error;
}

}  // namespace

void stop_on_signals(int rank) {
    announced = rank == 0;
    on_terminal = isatty(STDERR_FILENO);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP})
        if (std::signal(signal, request_stop) == SIG_IGN) std::signal(signal, SIG_IGN);  // nohup's is to stay
}

void stop_without_parent() { prctl(PR_SET_PDEATHSIG, SIGTERM); }

bool stop_requested() { return requested != 0; }
