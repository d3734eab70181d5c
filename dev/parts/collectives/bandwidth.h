// How fast collectives are by size and by what may carry them (so many CTAs of NCCL's, copy engines), and what they take from GEMMs
// that run beside them.
#pragma once
#include "dev/harness.h"
#include "trainer/distributed/world.h"

// Every way of gathering by copies that promises arrival, against what the slices hold. Several ranks.
void check_copy_gathers(Report& report, World& world);
// Prints a table of microseconds and bus bandwidth. Several ranks, all of which call it.
void bench_bandwidth(Report& report, World& world);
