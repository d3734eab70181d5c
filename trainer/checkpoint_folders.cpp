#include "trainer/checkpoint_folders.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "kernels/common/check.h"
#include "trainer/checkpoint.h"
#include "trainer/checkpoint_header.h"

namespace fs = std::filesystem;

namespace {

bool is_checkpoint_name(const std::string& name) {
    return name.starts_with("step_") && name.size() > 5 && name.find_first_not_of("0123456789", 5) == std::string::npos;
}

// Hidden first, so that a crash halfway never leaves a part of a checkpoint under its real name.
void remove_checkpoint(const std::string& out_dir, const std::string& name) {
    const std::string hidden = out_dir + "/." + name + ".deleted";
    fs::remove_all(hidden);
    rename_path(out_dir + "/" + name, hidden);
    fs::remove_all(hidden);
}

// Where two folders cannot be exchanged, replacing one is two renames. After a crash between them, the old one comes back.
void restore_replaced(const std::string& out_dir) {
    const std::string ending = ".replaced";
    std::error_code error;
    std::vector<std::string> names;
    for (const fs::directory_entry& entry : fs::directory_iterator(out_dir, error)) {
        const std::string name = entry.path().filename().string();
        if (name.starts_with(".") && name.ends_with(ending)) names.push_back(name.substr(1, name.size() - 1 - ending.size()));
    }
    for (const std::string& name : names)
        if (is_checkpoint_name(name) && !fs::exists(out_dir + "/" + name, error))
            fs::rename(out_dir + "/." + name + ending, out_dir + "/" + name, error);  // in a folder that is read-only it stays hidden
}

struct Found {
    std::string name;
    int64_t saved_ns, step;
};

// Complete checkpoints, the last saved first. Of those that are none, why, with their step.
std::vector<Found> complete_checkpoints(const std::string& out_dir, std::vector<std::pair<int64_t, std::string>>* incomplete = nullptr) {
    std::vector<Found> found;
    std::error_code missing;
    for (const fs::directory_entry& entry : fs::directory_iterator(out_dir, missing)) {
        const std::string name = entry.path().filename().string();
        if (!is_checkpoint_name(name)) continue;
        try {
            const CheckpointHeader header = read_header(entry.path().string());
            found.push_back({name, header.saved_ns, header.step});
        } catch (const Error& error) {
            if (incomplete) incomplete->emplace_back(std::strtoll(name.c_str() + std::strlen("step_"), nullptr, 10), error.what());
        }
    }
    std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
        return std::pair(a.saved_ns, a.step) > std::pair(b.saved_ns, b.step);
    });
    return found;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// One folder

void sync_folder(const std::string& path) {
    const int folder = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    REQUIRE(folder >= 0, "%s: cannot open: %s", path.c_str(), std::strerror(errno));
    const int status = fsync(folder);
    const int error = errno;
    close(folder);
    // Some network file systems can't sync a folder and say EINVAL.
    REQUIRE(status == 0 || error == EINVAL, "%s: cannot sync: %s", path.c_str(), std::strerror(error));
}

void require_space(const std::string& folder, uint64_t bytes) {
    std::error_code unknown;
    const fs::space_info space = fs::space(folder, unknown);
    REQUIRE(unknown || space.available >= bytes, "%s: needs %.1f MiB of disk, %.1f MiB are free", folder.c_str(),
            double(bytes) / (1 << 20), double(space.available) / (1 << 20));
}

void rename_path(const std::string& from, const std::string& to) {
    REQUIRE(std::rename(from.c_str(), to.c_str()) == 0, "%s: cannot rename to %s: %s", from.c_str(), to.c_str(),
            std::strerror(errno));
}

std::string hidden_folder(const std::string& out_dir, int64_t step) { return message("%s/.step_%06lld.tmp", out_dir.c_str(), static_cast<long long>(step)); }

void publish_folder(const std::string& out_dir, const std::string& name) {
    const std::string path = out_dir + "/" + name, temporary = out_dir + "/." + name + ".tmp", replaced = out_dir + "/." + name + ".replaced";
    if (!fs::exists(path)) {
        rename_path(temporary, path);
    } else if (renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, path.c_str(), RENAME_EXCHANGE) != 0) {  // not on every file system
        rename_path(path, replaced);
        rename_path(temporary, path);
    }
    sync_folder(out_dir);
    fs::remove_all(replaced);
    fs::remove_all(temporary);  // the old one, if they were exchanged
}

void remove_leftovers(const std::string& out_dir) {
    restore_replaced(out_dir);
    std::vector<fs::path> leftovers;
    for (const fs::directory_entry& entry : fs::directory_iterator(out_dir)) {
        const std::string name = entry.path().filename().string();
        const size_t dot = name.rfind('.');
        if (!name.starts_with(".") || dot == 0 || !is_checkpoint_name(name.substr(1, dot - 1))) continue;
        const std::string ending = name.substr(dot);
        if (ending == ".tmp" || ending == ".replaced" || ending == ".deleted") leftovers.push_back(entry.path());
    }
    for (const fs::path& path : leftovers) fs::remove_all(path);
}

// ---------------------------------------------------------------------------------------------------------------------
// Those of a run

void prune_checkpoints(const std::string& out_dir, int keep) {
    if (keep <= 0) return;
    const std::vector<Found> found = complete_checkpoints(out_dir);
    try {
        for (size_t i = size_t(keep); i < found.size(); ++i) remove_checkpoint(out_dir, found[i].name);
    } catch (const fs::filesystem_error& error) {
        throw Error(message("--out %s: %s", out_dir.c_str(), error.what()));
    }
}

std::string find_latest(const std::string& out_dir) {
    restore_replaced(out_dir);
    const std::vector<Found> found = complete_checkpoints(out_dir);
    return found.empty() ? "" : out_dir + "/" + found.front().name;
}

LatestIntact find_latest_intact(const std::string& out_dir) {
    restore_replaced(out_dir);
    LatestIntact latest;
    std::vector<std::pair<int64_t, std::string>> incomplete;
    int64_t step = -1;
    for (const Found& found : complete_checkpoints(out_dir, &incomplete)) try {
        const std::string path = out_dir + "/" + found.name;
        latest.verified = verify_checkpoint(path, CheckpointFiles::all);
        latest.path = path, step = found.step;
        break;
    } catch (const Error& error) {
        latest.damaged.push_back(error.what());
    }
    for (const auto& [at, problem] : incomplete)
        if (at > step) latest.damaged.push_back(problem);
    return latest;
}
