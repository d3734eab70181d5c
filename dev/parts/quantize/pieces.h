// The parts of quantize_weights one by one: scales, pieces of matrices, transposed copies, bit for bit, and their speed.
#pragma once
#include "dev/harness.h"
#include "kernels/common/dtype.h"

void check_pieces(Report& report, Dtype format);
void check_scales(Report& report);
void check_transposes(Report& report);
void bench_pieces(Report& report, const char* model, int layers, int C);
