// What all ranks of a run must have alike before they start: options, program, data, questions.
#pragma once
#include "trainer/config.h"
#include "trainer/distributed/world.h"

// Ends the job with a line that names the rank and the difference. All ranks call it. Without --out all take rank 0's.
void agree(World& world, Config& config);
