// The state in a `.ptd` file (FlatTensor), ExecuTorch's format for tensors: one tensor `mobizo_lora_b`, float32 [P].
#pragma once

#include <filesystem>

#include "program.h"

namespace host {

// The file appears whole or not at all. Throws `Failure`.
void save_ptd(const std::filesystem::path& path, const State& state);

// Throws `Failure` where there is no such tensor of `parameters` finite numbers.
State load_ptd(const std::filesystem::path& path, size_t parameters);

}  // namespace host
