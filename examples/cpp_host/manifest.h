// What a program says about itself: everything that a host has to know is here, and nothing is assumed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace host {

constexpr int64_t kFormatVersion = 10;

using Axis = std::variant<int64_t, std::string>;  // a size, or the name of a dynamic one

struct TensorSpec {
  std::string name;
  std::string dtype;
  std::vector<Axis> shape;
  std::optional<int64_t> low, high;  // of token ids
  std::optional<int64_t> also;       // the label that does not count
  std::vector<int64_t> choices;      // the values allowed, where they are few
};

struct DynamicSize {
  std::string name;
  int64_t low, high;
};

// Where A of a layer lies in the state, as [in, r], where it is trained.
struct TrainedA {
  size_t offset, r, in;
};

struct Manifest {
  std::vector<TensorSpec> inputs;
  TensorSpec labels;
  std::vector<DynamicSize> sizes;
  size_t parameters;
  size_t state_size;  // parameters, then what the update rule remembers
  std::vector<TrainedA> trained_a;
  uint32_t queries;
  bool state_is_passed;  // "io": in and out of every method; else a buffer that they share
  float eps;
  size_t first_label;
  std::optional<int64_t> max_labels;
  std::string identity;  // the text that the fingerprint begins with
};

// Throws `Failure` where the text is no manifest of `kFormatVersion`.
Manifest read_manifest(std::string_view text, const std::string& where);

}  // namespace host
