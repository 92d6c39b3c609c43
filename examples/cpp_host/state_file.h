// The state in a `.ptd` file (FlatTensor), ExecuTorch's format for tensors: `mobizo_lora_b`, float32 [S],
// `mobizo_fingerprint`, uint8 [32], of the program, and a checksum at the end. Python's `Session.export_ptd` writes
// `mobizo_probe` too, float64 [17]: what the adapter did there; see `probe.h`.
#pragma once

#include <filesystem>
#include <optional>

#include "probe.h"
#include "program.h"

namespace host {

// The bytes of such a file, without the checksum.
std::string packed_state(const State& state, const Sha256::Digest& fingerprint);

// The file appears whole or not at all. Throws `Failure`.
void save_ptd(const std::filesystem::path& path, const Program& program);

struct DataFile {
  State state;
  std::optional<Probe> probe;
};

// Throws `Failure` where there is no such tensor of as many finite numbers as the program's state has, or where the file
// is damaged, or of another program, or does not say of which.
DataFile load_ptd(const std::filesystem::path& path, const Program& program);

}  // namespace host
