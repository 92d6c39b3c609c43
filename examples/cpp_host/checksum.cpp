#include "checksum.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <vector>

#include "files.h"
#include "sha256.h"

namespace host {
namespace {

constexpr std::string_view kTrailerMagic = "MBZSHA2\n";
constexpr size_t kTrailerBytes = kTrailerMagic.size() + std::tuple_size_v<Sha256::Digest>;
constexpr size_t kBlockBytes = 1 << 20;

std::string trailer(Sha256& hash) {
  const Sha256::Digest digest = hash.digest();
  return std::string(kTrailerMagic).append(digest.begin(), digest.end());
}

}  // namespace

void check_file(const std::filesystem::path& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file || std::filesystem::is_directory(path)) {
    throw std::runtime_error(with_reason("it cannot be read"));
  }
  const auto size = static_cast<uint64_t>(file.tellg());
  file.seekg(0);
  Sha256 hash;
  std::vector<char> block(kBlockBytes);
  for (uint64_t left = size < kTrailerBytes ? 0 : size - kTrailerBytes; left > 0;) {
    const size_t count = std::min<uint64_t>(left, block.size());
    if (!file.read(block.data(), static_cast<std::streamsize>(count))) {
      throw std::runtime_error("it became shorter while it was read");
    }
    hash.update(block.data(), count);
    left -= count;
  }
  std::string found(kTrailerBytes, '\0');
  if (!file.read(found.data(), kTrailerBytes) || found.compare(0, kTrailerMagic.size(), kTrailerMagic) != 0) {
    throw std::runtime_error("it has no checksum at its end: it was cut off, or mobizo-compiler did not write it");
  }
  if (found != trailer(hash)) {
    throw std::runtime_error("it is damaged: its checksum is not that of its contents");
  }
}

std::string content_digest(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  Sha256::Digest digest{};
  file.seekg(-static_cast<std::streamoff>(digest.size()), std::ios::end);
  if (!file.read(reinterpret_cast<char*>(digest.data()), static_cast<std::streamsize>(digest.size()))) {
    throw std::runtime_error(path.string() + ": it became shorter while it was read");
  }
  return hexadecimal(digest);
}

std::string sealed(std::string data) {
  Sha256 hash;
  hash.update(data.data(), data.size());
  return data += trailer(hash);
}

}  // namespace host
