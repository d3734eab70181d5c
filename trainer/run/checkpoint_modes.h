// What a checkpoint is good for besides going on: --generate continues a text, --evaluate measures it.
#pragma once
#include "trainer/config.h"

void generate_from_checkpoint(const Config& config);
void evaluate_checkpoint(const Config& config);
