// Times every backend side by side and prints a table of TFLOP/s with the ratio to cuDNN.
#pragma once
#include "dev/harness.h"

void benchmark_attention(Report& report);
