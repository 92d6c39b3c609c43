#include "files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <system_error>

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

namespace {

constexpr std::string_view kPartial = ".partial";

// Temporary files of the same name whose process is dead: it holds no lock. Python's `whole_file` names and locks them alike.
void remove_partial(const std::filesystem::path& folder, const std::string& name) {
  const std::string front = "." + name + ".";
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string found = entry.path().filename().string();
    if (found.size() <= front.size() + kPartial.size() || found.compare(0, front.size(), front) != 0 ||
        found.compare(found.size() - kPartial.size(), kPartial.size(), kPartial) != 0) {
      continue;
    }
    const std::string middle = found.substr(front.size(), found.size() - front.size() - kPartial.size());
    if (!std::all_of(middle.begin(), middle.end(), [](unsigned char c) { return std::isalnum(c) != 0; })) {
      continue;  // of a file with a longer name
    }
    const int file = open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) {
      continue;
    }
    if (flock(file, LOCK_EX | LOCK_NB) == 0) {
      unlink(entry.path().c_str());
    }
    close(file);
  }
}

// A new file that is locked for as long as it is open.
int open_partial(const std::filesystem::path& path, std::string& temporary, mode_t mode) {
  std::random_device random;
  for (;;) {
    char number[9];
    std::snprintf(number, sizeof(number), "%08x", static_cast<unsigned>(random()));
    temporary = (path.parent_path() / ("." + path.filename().string() + "." + number + std::string(kPartial))).string();
    const int file = open(temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (file < 0) {
      if (errno == EEXIST) {
        continue;
      }
      return file;
    }
    flock(file, LOCK_EX);  // where a file system has no locks, nothing is taken for dead there either
    if (access(temporary.c_str(), F_OK) == 0) {
      return file;
    }
    close(file);  // another process took it for a dead one's before it was locked
  }
}

}  // namespace

void write_whole_file(const std::filesystem::path& path, std::string_view data, mode_t mode) {
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  remove_partial(folder, path.filename().string());
  std::string temporary;
  const int file = open_partial(path, temporary, mode);
  if (file < 0) {
    throw std::runtime_error(with_reason(path.string() + " cannot be written"));
  }
  std::string problem;
  try {
    write_all(file, data, 0);
  } catch (const std::runtime_error& error) {
    problem = error.what();
  }
  if (problem.empty() && (fsync(file) != 0 || std::rename(temporary.c_str(), path.c_str()) != 0)) {
    problem = std::strerror(errno);
  }
  if (close(file) != 0 && problem.empty()) {
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
