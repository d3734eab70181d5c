// Why the system refused something, and what the person at the terminal can do about it: the end of an error's line.
#pragma once
#include <cerrno>
#include <cstring>
#include <string>

inline std::string reason(int error) {
    const std::string text = std::strerror(error);
    switch (error) {
        case EACCES:
        case EPERM: return text + ": change its permissions, or use another place";
        case EROFS: return text + ": use a place that can be written";
        case ENOSPC:
        case EDQUOT: return text + ": free some space, or use another place";
        case EFBIG: return text + ": raise the limit on a file's size (ulimit -f), or use another place";
        default: return text;
    }
}
