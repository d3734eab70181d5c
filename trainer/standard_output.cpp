#include "trainer/standard_output.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "kernels/common/check.h"

void guard_standard_files() {
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGXFSZ, SIG_IGN);
    for (const int file : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
        if (fcntl(file, F_GETFD) >= 0) continue;
        const int wrong_way = file == STDIN_FILENO ? O_WRONLY : O_RDONLY;
        REQUIRE(open("/dev/null", wrong_way) == file, "cannot open /dev/null in place of a standard file that is closed: %s", std::strerror(errno));
    }
}

void require_written_output() {
    errno = 0;
    if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return;
    if (errno == 0) {  // an earlier write failed, and its cause is forgotten: another one tells
        std::fputc('\n', stdout);
        std::fflush(stdout);
    }
    const int error = errno;
    throw Error(std::string("standard output: cannot write: ") + (error != 0 ? std::strerror(error) : "some of it is lost"));
}
