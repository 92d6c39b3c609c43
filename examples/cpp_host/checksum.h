// The checksum at the end of programs and data files: "MBZSHA2\n", then SHA-256 of everything before it.
#pragma once

#include <filesystem>
#include <string>

namespace host {

// Throws `std::runtime_error` where a file has no checksum, or is not what it was when it was written. The file is read
// once, in blocks. An app does this when a file has arrived, not every time it starts.
void check_file(const std::filesystem::path& path);

// SHA-256 of a file's contents as its checksum has it, in hexadecimal; `check_file` says whether it is so.
std::string content_digest(const std::filesystem::path& path);

// The contents of a file, with their checksum.
std::string sealed(std::string data);

}  // namespace host
