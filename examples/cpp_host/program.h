// A program file on the ExecuTorch runtime: its methods, and the state that training changes.
#pragma once

#include <executorch/extension/module/module.h>

#include <cstdint>
#include <filesystem>
#include <memory>
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

// What the model returns, one tensor of it.
struct Output {
  std::vector<size_t> shape;
  std::vector<float> values;
};

// What a program is loaded for: only the methods that this needs are loaded, and one that restores a run.
enum class Use { train, evaluate, generate, verify };

class Program {
 public:
  // Throws `Failure` where the file is no program of this compiler, or one that this host cannot run.
  Program(const std::filesystem::path& path, Use use);

  const Manifest& manifest() const { return manifest_; }

  // What two programs share if a step of one is a step of the other: model, sites, A, noise and rule.
  const Sha256::Digest& fingerprint() const { return fingerprint_; }

  StepResult train_step(Batch& batch, uint32_t seed, float learning_rate, float eps);

  // The output that the loss is of, with the adapter on and nothing perturbed. Labels are not read.
  Output evaluate(Batch& batch);

  // Any method with these arguments, the state not among them; what it returns is copied.
  std::vector<Value> call(const std::string& method, const std::vector<Value*>& arguments);

  // The logits of the token behind `tokens`, the first of which stands at `start`; what came before is in the cache.
  std::vector<float> next_logits(std::vector<int64_t> tokens, int64_t start);

  // Whether the update of a step can be repeated: not where a step has the gradient itself.
  bool replays() const { return replays_; }

  // Repeat the update of a step from its seed and projected gradient, without a forward pass.
  void replay(uint32_t seed, std::vector<float> projected_gradient, float learning_rate);

  State state() const;
  void load_state(const State& state);

 private:
  using Tensors = std::vector<executorch::extension::TensorPtr>;

  void open();
  void open_with_data();
  void read_identity();
  void set_initial(const float* lora_a);
  void load_methods(Use use);
  void load_method(const std::string& name);
  void find_state(const std::string& method);
  Tensors inputs_of(Batch& batch) const;
  Tensors start_of(Batch& batch);
  std::vector<executorch::runtime::EValue> run(const std::string& method, const Tensors& arguments);
  std::vector<executorch::runtime::EValue> run_with_state(const std::string& method, Tensors arguments);
  std::vector<executorch::runtime::EValue> update(const std::string& method, const Tensors& arguments);
  [[noreturn]] void fail(const std::string& problem) const;

  std::filesystem::path path_;
  std::string data_;  // the data file that methods look up the state in while they load, where they do so
  std::unique_ptr<executorch::extension::Module> module_;
  bool replays_ = false;
  Manifest manifest_;
  Sha256::Digest fingerprint_{};
  State initial_;            // before the first step
  State passed_;             // the state, where it goes in and out of every method
  float* shared_ = nullptr;  // the state, where the methods share it
};

}  // namespace host
