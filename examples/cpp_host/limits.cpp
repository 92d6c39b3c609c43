#include "limits.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

#include "errors.h"

namespace host {
namespace {

constexpr auto kBetweenLooks = std::chrono::seconds(5);

// The first word of a file; nothing where there is none.
std::optional<std::string> word(const std::filesystem::path& file) {
  std::ifstream stream(file);
  std::string found;
  return stream >> found ? std::optional(found) : std::nullopt;
}

std::optional<float> number(const std::filesystem::path& file) {
  const auto text = word(file);
  char* end = nullptr;
  const float found = text ? std::strtof(text->c_str(), &end) : 0;
  return text && *end == '\0' ? std::optional(found) : std::nullopt;
}

// What is in a folder; nothing where it cannot be read.
std::vector<std::filesystem::path> folders(const std::filesystem::path& parent) {
  std::vector<std::filesystem::path> found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(parent, error)) {
    found.push_back(entry.path());
  }
  return found;
}

// The lowest charge of a battery that is not being charged, in percent.
std::optional<float> charge(const std::filesystem::path& sensors) {
  std::optional<float> found;
  for (const auto& supply : folders(sensors / "power_supply")) {
    const auto status = word(supply / "status");
    if (word(supply / "type") != "Battery" || status == "Charging" || status == "Full") {
      continue;
    }
    if (const auto percent = number(supply / "capacity")) {
      found = std::min(found.value_or(*percent), *percent);
    }
  }
  return found;
}

// Of the hottest zone, in degrees Celsius.
std::optional<float> heat(const std::filesystem::path& sensors) {
  std::optional<float> found;
  for (const auto& zone : folders(sensors / "thermal")) {
    if (const auto thousandths = number(zone / "temp")) {
      found = std::max(found.value_or(*thousandths / 1000), *thousandths / 1000);
    }
  }
  return found;
}

std::string with(const char* format, float value) {
  char text[80];
  std::snprintf(text, sizeof text, format, static_cast<double>(value));
  return text;
}

}  // namespace

Watch::Watch(const Limits& limits) : limits_(limits), start_(std::chrono::steady_clock::now()) {
  const char* other = std::getenv("MOBIZO_SYS_CLASS");
  sensors_ = other != nullptr ? other : "/sys/class";
  if (limits.temperature && !heat(sensors_)) {
    throw Failure(Exit::bad_arguments, "--temperature: this machine does not say how hot it is");
  }
}

std::optional<std::string> Watch::reason() {
  const auto now = std::chrono::steady_clock::now();
  if (limits_.minutes && std::chrono::duration<float, std::ratio<60>>(now - start_).count() >= *limits_.minutes) {
    return with("%g minutes are over", *limits_.minutes);
  }
  if ((!limits_.battery && !limits_.temperature) || (looked_ && now - *looked_ < kBetweenLooks)) {
    return std::nullopt;
  }
  looked_ = now;
  if (const auto found = limits_.battery ? charge(sensors_) : std::nullopt; found && *found < *limits_.battery) {
    return with("the battery is at %.0f %%", *found);
  }
  if (const auto found = limits_.temperature ? heat(sensors_) : std::nullopt; found && *found > *limits_.temperature) {
    return with("the device is at %.0f degrees", *found);
  }
  return std::nullopt;
}

}  // namespace host
