// A program file on the ExecuTorch runtime: its methods, and the state that training changes.
#pragma once

#include <executorch/extension/module/module.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "manifest.h"
#include "sha256.h"
#include "tokens.h"

namespace host {

using State = std::vector<float>;

struct StepResult {
  float loss;
  std::vector<float> projected_gradient;
};

class Program {
 public:
  // Throws `Failure` where the file is no program of this compiler, or one that this host cannot run.
  explicit Program(const std::filesystem::path& path);

  const Manifest& manifest() const { return manifest_; }

  // What two programs share if a step of one is a step of the other: model, sites, A, noise and rule.
  const Sha256::Digest& fingerprint() const { return fingerprint_; }

  StepResult train_step(Batch& batch, uint32_t seed, float learning_rate, float eps);

  // Repeat the update of a step from its seed and projected gradient, without a forward pass.
  void replay(uint32_t seed, std::vector<float> projected_gradient, float learning_rate);

  State state() const;
  void load_state(const State& state);

 private:
  using Tensors = std::vector<executorch::extension::TensorPtr>;

  void read_identity();
  void load_methods();
  void load_method(const std::string& name);
  std::vector<executorch::runtime::EValue> run(const std::string& method, const Tensors& arguments);
  [[noreturn]] void fail(const std::string& problem) const;

  std::filesystem::path path_;
  executorch::extension::Module module_;
  Manifest manifest_;
  Sha256::Digest fingerprint_{};
  State initial_;            // before the first step
  State passed_;             // the state, where it goes in and out of every method
  float* shared_ = nullptr;  // the state, where the methods share it
};

}  // namespace host
