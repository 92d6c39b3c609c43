#include "journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "errors.h"
#include "files.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the journal is little-endian, and numbers are written as they are");

namespace host {
namespace {

constexpr std::string_view kMagic = "MBZJRNL\n";
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 64;

template <class Number>
void put(std::string& data, Number value) {
  data.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

template <class Number>
Number get(std::string_view data, size_t position) {
  Number value;
  std::memcpy(&value, data.data() + position, sizeof(value));
  return value;
}

std::string header(const Sha256::Digest& fingerprint, uint32_t queries, uint64_t parameters) {
  std::string data(kMagic);
  put(data, kVersion);
  put(data, queries);
  data.append(reinterpret_cast<const char*>(fingerprint.data()), fingerprint.size());
  put(data, parameters);
  put(data, uint32_t{0});
  put(data, crc32(data));
  return data;
}

}  // namespace

uint32_t crc32(std::string_view data, uint32_t start) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t i = 0; i < 256; ++i) {
      made[i] = i;
      for (int bit = 0; bit < 8; ++bit) {
        made[i] = made[i] >> 1 ^ (made[i] & 1 ? 0xedb88320 : 0);
      }
    }
    return made;
  }();
  uint32_t value = ~start;
  for (const char byte : data) {
    value = table[(value ^ static_cast<uint8_t>(byte)) & 0xff] ^ value >> 8;
  }
  return ~value;
}

Journal::Journal(std::filesystem::path path, const Sha256::Digest& fingerprint, uint32_t queries, uint64_t parameters)
    : path_(std::move(path)),
      header_(header(fingerprint, queries, parameters)),
      queries_(queries),
      record_bytes_(24 + 4 * size_t{queries}) {
  lock();
  try {
    was_empty_ = std::filesystem::exists(path_) && std::filesystem::file_size(path_) == 0;
    if (was_empty_ || !std::filesystem::exists(path_)) {
      write_whole_file(path_, header_);
    }
    read(read_file(path_));
  } catch (const std::runtime_error& error) {
    const auto* failure = dynamic_cast<const Failure*>(&error);
    close(lock_);
    if (failure != nullptr) {
      throw;
    }
    throw Failure(Exit::bad_run, error.what());
  }
  file_ = open(path_.c_str(), O_RDWR | O_CLOEXEC);
  if (file_ < 0 || (cut_bytes_ > 0 && (ftruncate(file_, end_) != 0 || fsync(file_) != 0))) {
    const std::string problem = with_reason("it cannot be opened for writing");
    close(lock_);
    fail(problem);
  }
}

Journal::~Journal() {
  close(file_);
  close(lock_);  // which also ends the lock
}

// The lock of Python's filelock: flock on a file beside the journal, which stays there.
void Journal::lock() {
  const std::string name = path_.string() + ".lock";
  lock_ = open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_ < 0) {
    fail(with_reason("its lock cannot be made"));
  }
  if (flock(lock_, LOCK_EX | LOCK_NB) == 0) {
    return;
  }
  const int reason = errno;
  const std::string problem = with_reason("it cannot be locked");
  close(lock_);
  if (reason == EWOULDBLOCK || reason == EACCES) {
    throw Failure(Exit::locked, path_.string() + ": another session is training with this journal");
  }
  fail(problem);
}

void Journal::check_header(std::string_view found) const {
  if (found == header_) {
    return;
  }
  if (found.size() < kHeaderBytes || found.substr(0, kMagic.size()) != kMagic) {
    fail("this is no journal");
  }
  if (get<uint32_t>(found, kHeaderBytes - 4) != crc32(found.substr(0, kHeaderBytes - 4))) {
    fail("the header of the journal is damaged");
  }
  if (const auto version = get<uint32_t>(found, kMagic.size()); version != kVersion) {
    fail("the journal has version " + std::to_string(version) + ", this host reads version " +
         std::to_string(kVersion));
  }
  fail("the journal is of another program; give each program a folder of its own");
}

void Journal::read(std::string_view data) {
  check_header(data.substr(0, kHeaderBytes));
  size_t position = kHeaderBytes;
  while (is_whole(data, position)) {
    records_.push_back(unpacked(data.substr(position, record_bytes_)));
    if (records_.back().step != records_.size() - 1) {
      fail("record " + std::to_string(records_.size() - 1) + " says that it is step " +
           std::to_string(records_.back().step));
    }
    position += record_bytes_;
  }
  for (size_t later = position + record_bytes_; later < data.size(); later += record_bytes_) {
    if (is_whole(data, later)) {
      fail("step " + std::to_string(records_.size()) +
           " is damaged, and steps after it are not; truncate the file to " + std::to_string(position) +
           " bytes to go on from there");
    }
  }
  end_ = static_cast<off_t>(position);
  cut_bytes_ = data.size() - position;
}

bool Journal::is_whole(std::string_view data, size_t position) const {
  if (data.size() < position + record_bytes_) {
    return false;
  }
  const std::string_view body = data.substr(position, record_bytes_ - 4);
  return get<uint32_t>(data, position + body.size()) == crc32(body, crc32(header_));
}

std::string Journal::packed(const Record& record) const {
  std::string data;
  put(data, record.step);
  put(data, record.seed);
  put(data, record.learning_rate);
  put(data, record.eps);
  put(data, record.loss);
  for (const float g : record.projected_gradient) {
    put(data, g);
  }
  put(data, crc32(data, crc32(header_)));
  return data;
}

Record Journal::unpacked(std::string_view data) const {
  Record record{get<uint32_t>(data, 0), get<uint32_t>(data, 4), get<float>(data, 8),
                get<float>(data, 12),   get<float>(data, 16),   {}};
  for (size_t query = 0; query < queries_; ++query) {
    record.projected_gradient.push_back(get<float>(data, 20 + 4 * query));
  }
  return record;
}

void Journal::append(const Record& record) {
  const std::string data = packed(record);
  std::string problem;
  try {
    write_all(file_, data, end_);
    if (fsync(file_) != 0) {
      problem = std::strerror(errno);
    }
  } catch (const std::runtime_error& error) {
    problem = error.what();
  }
  if (!problem.empty()) {
    const bool whole = ftruncate(file_, end_) == 0;
    fail("step " + std::to_string(record.step) + " could not be written: " + problem + "; " +
         (whole ? "the journal is whole and holds " : "the journal holds ") + std::to_string(records_.size()) +
         " steps");
  }
  end_ += static_cast<off_t>(data.size());
  records_.push_back(record);
}

void Journal::fail(const std::string& problem) const {
  throw Failure(Exit::bad_run, path_.string() + ": " + problem);
}

}  // namespace host
