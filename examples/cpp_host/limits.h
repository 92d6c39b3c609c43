#pragma once

#include <chrono>
#include <filesystem>
#include <optional>
#include <string>

namespace host {

// What ends a call between two steps; the same call goes on with the run later. None is set at first.
struct Limits {
  std::optional<float> minutes;      // of this call
  std::optional<float> battery;      // percent, where it is not being charged
  std::optional<float> temperature;  // degrees Celsius, of the hottest part
};

// Looks at what Linux and Android say of themselves in /sys/class, every five seconds; the variable MOBIZO_SYS_CLASS names
// another folder. `Failure` where a temperature is limited and nothing says how hot the machine is.
class Watch {
 public:
  explicit Watch(const Limits& limits);

  // Why a limit is reached, in words; nothing as long as none is.
  std::optional<std::string> reason();

 private:
  Limits limits_;
  std::filesystem::path sensors_;
  std::chrono::steady_clock::time_point start_;
  std::optional<std::chrono::steady_clock::time_point> looked_;
};

}  // namespace host
