// Whether an adapter is really active: the model's answer to a fixed input, without it and with it, in eight numbers.
// The input and the numbers are those of mobizo_compiler/format/probe.py, which writes them into `.ptd` files.
#pragma once

#include <array>
#include <filesystem>

#include "program.h"

namespace host {

struct Probe {
  static constexpr size_t kNumbers = 8;
  std::array<double, kNumbers> base, adapted;
  uint32_t asked = 0;  // CRC-32 of what describes the input; probes of other inputs are not compared

  // How far the adapter moves the answer, as a share of its length.
  double effect() const;
};

// The state of a `.ptd` file, if its adapter does here what it did where the file was written; what it does is said on
// stderr. A file without a probe, as this host writes them, is taken as it is. The program is loaded for
// `Use::evaluate`. Throws `Failure`.
State probed_state(Program& program, const std::filesystem::path& data, bool quiet);

// The same where the program itself is loaded for another use: one that is loaded for this is given back before that.
State probed_state(const std::filesystem::path& program, const std::filesystem::path& data, bool quiet);

}  // namespace host
