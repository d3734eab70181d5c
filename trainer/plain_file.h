// Files of a run are regular ones. Opening a pipe would wait for its other end, and reading a device might never end.
#pragma once
#include <sys/stat.h>

#include <string>

#include "kernels/common/check.h"

// What does not exist is for whoever opens it to say.
inline void require_plain_file(const std::string& path) {
    struct stat status {};
    REQUIRE(stat(path.c_str(), &status) != 0 || S_ISREG(status.st_mode), "%s: is not a regular file", path.c_str());
}
