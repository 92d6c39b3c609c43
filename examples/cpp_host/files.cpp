#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace host {

std::string with_reason(const std::string& message) {
  return message + ": " + std::strerror(errno);
}

std::string read_file(const std::filesystem::path& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) {
    throw std::runtime_error(with_reason(path.string() + " cannot be opened"));
  }
  std::string data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) {
    throw std::runtime_error(with_reason(path.string() + " cannot be read"));
  }
  return data;
}

void write_all(int descriptor, std::string_view data, off_t offset) {
  while (!data.empty()) {
    const ssize_t written = pwrite(descriptor, data.data(), data.size(), offset);
    if (written < 0 && errno == EINTR) {
      continue;
    }
    if (written <= 0) {
      throw std::runtime_error(written < 0 ? std::strerror(errno) : "the disk is full");
    }
    data.remove_prefix(static_cast<size_t>(written));
    offset += written;
  }
}

void write_whole_file(const std::filesystem::path& path, std::string_view data, mode_t mode) {
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  std::string temporary = (folder / ("." + path.filename().string() + ".XXXXXX")).string();
  const int file = mkstemp(temporary.data());
  if (file < 0) {
    throw std::runtime_error(with_reason(path.string() + " cannot be written"));
  }
  std::string problem;
  try {
    write_all(file, data, 0);
  } catch (const std::runtime_error& error) {
    problem = error.what();
  }
  if (problem.empty() && (fsync(file) != 0 || fchmod(file, mode) != 0)) {
    problem = std::strerror(errno);
  }
  if (close(file) != 0 && problem.empty()) {
    problem = std::strerror(errno);
  }
  if (problem.empty() && std::rename(temporary.c_str(), path.c_str()) != 0) {
    problem = std::strerror(errno);
  }
  if (!problem.empty()) {
    unlink(temporary.c_str());
    throw std::runtime_error(path.string() + " cannot be written: " + problem);
  }
  const int directory = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory >= 0) {  // the new name is on the disk, where the system can say so
    fsync(directory);
    close(directory);
  }
}

}  // namespace host
