// What a command prints: a write that fails ends it with an error, never with a signal or in silence.
#pragma once

// First in main(). A reader that is gone, or a limit on a file's size, is an error of write() from here on; and a standard file
// that the caller closed stays unusable: else the next file that is opened, a log say, would have its number and get the text.
void guard_standard_files();

// Flushes stdout. An Error with the cause if anything that was printed is lost. Not for a training run, which has a log.
void require_written_output();
