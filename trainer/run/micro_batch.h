// --micro-batch auto: the candidate that trains fastest among the largest that fit.
#pragma once
#include "trainer/config.h"
#include "trainer/parallel.h"

// The configuration with a number in place of auto; unchanged if it has one. A run that is resumed keeps the micro-batch that
// its checkpoint was trained with. Which candidates are tried follows from the memory plan and what is free on the device; the
// choice among them is measured, so it is printed and recorded in the resolved configuration.
Config choose_micro_batch(Config config);

// The largest that divides a rank's part of the batch and fits into that many bytes of device memory. Nothing is measured.
int largest_micro_batch(const Config& config, const Parallel& parallel, double device_bytes);

// A resumed run with another micro-batch sums gradients in another order: said in one line.
void note_other_micro_batch(const Config& config, const std::string& checkpoint, const std::string& its_config_toml);
