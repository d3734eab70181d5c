// Makes bytes that arrive in pieces safe to print.
#pragma once
#include <string>
#include <string_view>

// What push() returns, one call after the other and then finish(), is valid UTF-8 for every input: bytes that are no UTF-8
// become U+FFFD, as utf8.h replaces them; control characters but line feed and tab become their pictures (U+241B for
// escape) or U+FFFD, so that a text cannot command a terminal. A character that is cut between two pieces waits.
class PrintableStream {
  public:
    std::string push(std::string_view bytes);
    std::string finish();

  private:
    std::string waiting_;
};

std::string printable(std::string_view bytes);
