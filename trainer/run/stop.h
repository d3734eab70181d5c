// A run that is asked to stop: by Ctrl-C, SIGTERM or SIGHUP (a terminal that closes).
#pragma once

// From here on such a signal does not end the program, but asks it to finish the step, save and leave, which rank 0 says at once
// on stderr. What comes within a second of it is the same request; a later signal ends the program, without saving. One that
// was ignored, as nohup does, stays so.
void stop_on_signals(int rank);

// The program is asked to stop when the one that started it dies. Of torchrun's ranks, which nobody else would end: a launcher killed by
// SIGKILL can't, and its ranks would hold the GPUs. Not of a shell's, which may leave.
void stop_without_parent();

// Of this rank: a signal reaches every rank at another time, or only one.
bool stop_requested();

// Thrown between the micro-batches of what is only looked at, an evaluation or a sample, to abandon it.
struct StopAskedFor {};
