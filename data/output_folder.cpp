#include "data/output_folder.h"

#include <sys/stat.h>
#include <unistd.h>

#include "data/reason.h"
#include "kernels/common/check.h"

// Made by way of the other constructor, so that the destructor runs when only some of the folders could be made.
OutputFolder::OutputFolder(const std::string& path) : OutputFolder() {
    make(path);
    std::error_code error;
    REQUIRE(std::filesystem::is_directory(path, error), "--out %s: is not a folder: choose another name", path.c_str());
    REQUIRE(access(path.c_str(), R_OK | W_OK | X_OK) == 0, "--out %s: cannot write there: %s", path.c_str(), reason(errno).c_str());
}

OutputFolder::~OutputFolder() {
    for (; !made_.empty(); made_.pop_back()) rmdir(made_.back().c_str());  // refuses a folder that holds something
}

void OutputFolder::make(const std::filesystem::path& folder) {
    int status = mkdir(folder.c_str(), 0777);
    if (status != 0 && errno == ENOENT && folder.has_parent_path() && folder.parent_path() != folder) {
        make(folder.parent_path());
        status = mkdir(folder.c_str(), 0777);
    }
    if (status == 0) made_.push_back(folder);
    REQUIRE(status == 0 || errno == EEXIST, "--out %s: cannot make this folder: %s", folder.c_str(), reason(errno).c_str());
}
