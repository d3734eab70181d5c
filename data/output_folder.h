// The folder that a program writes to, and the folders that lead there, made when missing. Those that it made it takes away
// again, unless something lies in them by then: an error leaves no empty folder.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

class OutputFolder {
  public:
    explicit OutputFolder(const std::string& path);  // Error, when it is no folder that can be read and written
    OutputFolder(const OutputFolder&) = delete;
    OutputFolder& operator=(const OutputFolder&) = delete;
    ~OutputFolder();

  private:
    OutputFolder() = default;
    void make(const std::filesystem::path& folder);

    std::vector<std::filesystem::path> made_;  // outermost first
};
