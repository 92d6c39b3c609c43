// The journal of a training run: what every step did. Its layout is in docs/program_format.md.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "sha256.h"

namespace host {

struct Record {
  uint32_t step, seed;
  float learning_rate, eps, loss;
  std::vector<float> projected_gradient;  // zeros if the step was void
};

// CRC-32 as in zlib, going on from `start`.
uint32_t crc32(std::string_view data, uint32_t start = 0);

// Open for appending; nobody else can open it meanwhile, in this language or another.
class Journal {
 public:
  // The file is made if there is none, or nothing in it (`was_empty`). A last record that is not whole is cut off, and
  // `cut_bytes` says so.
  // Throws `Failure` where it is no journal, of another program, damaged before its end, or open elsewhere.
  Journal(std::filesystem::path path, const Sha256::Digest& fingerprint, uint32_t queries, uint64_t parameters);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  const std::vector<Record>& records() const { return records_; }
  size_t cut_bytes() const { return cut_bytes_; }
  bool was_empty() const { return was_empty_; }

  // Write a record and wait until it is on the disk. Throws `Failure`; the journal is then what it was before.
  void append(const Record& record);

 private:
  void lock();
  void check_header(std::string_view found) const;
  void read(std::string_view data);
  bool is_whole(std::string_view data, size_t position) const;
  std::string packed(const Record& record) const;
  Record unpacked(std::string_view data) const;
  [[noreturn]] void fail(const std::string& problem) const;

  std::filesystem::path path_;
  std::string header_;
  uint32_t queries_;
  size_t record_bytes_;
  std::vector<Record> records_;
  size_t cut_bytes_ = 0;
  bool was_empty_ = false;
  off_t end_ = 0;
  int lock_ = -1;
  int file_ = -1;
};

}  // namespace host
