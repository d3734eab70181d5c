// --dry-run: what a run would need and how long it would take, without training.
#pragma once
#include <vector>

#include "trainer/config.h"
#include "trainer/engine.h"

double total_bytes(const std::vector<MemoryRow>& rows);

// Prints the model, the precision table, the memory table and an estimate of the time. Works without a GPU: the plan is then
// one for an H100, unless --device cpu asks for the reference device.
// --micro-batch auto becomes the largest that fits. `ranks`: as many as the launcher would start; the memory is one's.
void dry_run(Config config, int ranks);
