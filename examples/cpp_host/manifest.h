// What a program says about itself: everything that a host has to know is here, and nothing is assumed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace host {

constexpr int64_t kFormatVersion = 12;

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

// What the method `forward` takes: tokens, so many of them that the cache has room, and what ends a text.
struct Generation {
  int64_t context, vocabulary;
  std::vector<int64_t> stop_ids;
};

enum class StateIn {
  program,  // "shared": a buffer that the methods share
  data,     // "data": the same, with its initial value in a data file
  call,     // "io": in and out of every method
};

struct Manifest {
  std::vector<TensorSpec> inputs;
  TensorSpec labels;
  std::vector<DynamicSize> sizes;
  size_t parameters;
  size_t state_size;  // parameters, then what the update rule remembers
  std::vector<std::pair<size_t, float>> memory_start;  // what that is before the first step: how many, and which
  std::vector<TrainedA> trained_a;
  uint32_t queries;
  StateIn state;
  bool has_prefix;  // a step starts from the outputs of the method `prefix`
  float eps;
  size_t first_label;
  std::optional<int64_t> max_labels;
  std::string loss;                        // its name
  std::optional<size_t> output;            // the output of `evaluate` that it is of; nothing where nobody can tell
  std::vector<std::string> answers;        // names of the classes or choices; empty where they have none
  std::optional<Generation> generate;
  std::string identity;  // the text that the fingerprint begins with
};

// Throws `Failure` where the text is no manifest of `kFormatVersion`. `replays`: whether the program has the method.
Manifest read_manifest(std::string_view text, const std::string& where, bool replays);

}  // namespace host
