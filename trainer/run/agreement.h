// What all ranks of a run must have alike before they start: options, program, data, questions.
#pragma once
#include <string>
#include <vector>

#include "trainer/config.h"
#include "trainer/distributed/world.h"

// Ends the job with a line that names the rank and the difference. All ranks call it. Without --out all take rank 0's.
void agree(World& world, Config& config);

// Ends the job with a line that names a rank whose files differ from rank 0's: in names, sizes, or contents. Of files of more than
// fingerprint.h's kReadWhole together the first rank of each machine reads every byte, others some. All ranks call it.
void require_same_files(World& world, const std::string& what, const std::vector<std::string>& files);

// Ends the job with a line that names a rank which does not see, within `patience_s`, a file that rank 0 makes in `out` (and takes
// away). The folder is there at rank 0. All ranks call it.
void require_shared_folder(World& world, const std::string& out, double patience_s);
