// Files that appear whole or not at all. Failures are `std::runtime_error`; callers say which exit code that is.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <string>
#include <string_view>

namespace host {

std::string read_file(const std::filesystem::path& path);

// Write to a temporary name beside `path`, flush it, and rename it; then flush the folder. What dead processes have left of
// the same file is removed first. The permissions are `mode` less what the process masks.
void write_whole_file(const std::filesystem::path& path, std::string_view data, mode_t mode = 0666);

// Write everything at an offset of an open file; throws with the system's reason.
void write_all(int descriptor, std::string_view data, off_t offset);

// "message: the system's reason for errno"
std::string with_reason(const std::string& message);

}  // namespace host
