// The folders of checkpoints in OUT: written under a hidden name, on the disk before they get their own, whole or not there after a
// crash at any moment. (Which of them are complete, and the last: checkpoint.h.)
#pragma once
#include <cstdint>
#include <string>

std::string hidden_folder(const std::string& out_dir, int64_t step);

// A full disk is better found before the last byte of it is taken.
void require_space(const std::string& folder, uint64_t bytes);
// A renamed file is on the disk only once its folder is.
void sync_folder(const std::string& path);
void rename_path(const std::string& from, const std::string& to);

// From its hidden name to its real one, OUT/`name`. A checkpoint of that step, if there is one, is there until the new one is.
void publish_folder(const std::string& out_dir, const std::string& name);
// What a crash left: ".step_000123.tmp", ".replaced" or ".deleted".
void remove_leftovers(const std::string& out_dir);
