// --verify: in seconds, whether this binary, this device and these libraries compute what they should.
#pragma once
#include "trainer/config.h"

// Prints a line a check and "verify: ok"; an Error with the reason if one fails.
void verify(const Config& config);
