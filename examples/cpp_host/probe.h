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

  // How far the adapter moves the answer, as a share of its length.
  double effect() const;
};

// What the adapter of a state does. The program is loaded for `Use::evaluate`, and has that state afterwards.
Probe probe_of(Program& program, const State& state);

// Give a program the state of a `.ptd` file, if its adapter does here what it did where the file was written, and say on
// stderr what it does. `file` is the program's, which is opened again for that where it is not loaded for
// `Use::evaluate`. A file without a probe, as this host writes them, is taken as it is. Throws `Failure`.
void load_adapter(Program& program, Use use, const std::filesystem::path& file, const std::filesystem::path& data,
                  bool quiet);

}  // namespace host
