#include "probe.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "errors.h"
#include "journal.h"
#include "state_file.h"

namespace host {
namespace {

using executorch::aten::ScalarType;
using Numbers = std::array<double, Probe::kNumbers>;

// As in Python: how far apart what an adapter does may be, as a share of it, rounding of the answer, and what counts.
constexpr double kMostApart = 0.5, kRounding = 1e-6;
constexpr float kLargest = 1e30f;

uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The sign of a number of the answer in one of the directions: Rademacher noise of the seed 0.
double sign(size_t direction, size_t place) {
  const uint32_t key = mix(mix(0x9E3779B9u) ^ (static_cast<uint32_t>(direction) * 0x85EBCA6Bu + 1));
  const uint32_t word = mix(mix((static_cast<uint32_t>(place) * 0x9E3779B9u) ^ key) + mix(key + 0x5851F42Du));
  return word >> 31 ? -1.0 : 1.0;
}

template <class Number>
void append(std::vector<uint8_t>& data, Number value) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  data.insert(data.end(), bytes, bytes + sizeof(value));
}

int64_t integer_at(const TensorSpec& spec, int64_t place) {
  if (spec.dtype == "bool" || spec.name.find("mask") != std::string::npos) {
    return 1;
  }
  if (!spec.choices.empty()) {
    return spec.choices[static_cast<size_t>(place) % spec.choices.size()];
  }
  if (!spec.low || !spec.high) {
    return 0;
  }
  const auto range = static_cast<uint64_t>(*spec.high) - static_cast<uint64_t>(*spec.low) + 1;
  const auto step = static_cast<uint64_t>(place) * 7919 + 11;
  return *spec.low + static_cast<int64_t>(range == 0 ? step : step % range);
}

int64_t size_of(const Axis& axis, const Manifest& manifest) {
  if (const auto* size = std::get_if<int64_t>(&axis)) {
    return *size;
  }
  const std::string& name = std::get<std::string>(axis);
  const auto named = [&name](const DynamicSize& size) { return size.name == name; };
  const auto found = std::find_if(manifest.sizes.begin(), manifest.sizes.end(), named);
  if (found == manifest.sizes.end()) {
    throw Failure(Exit::bad_program, "the manifest does not say how large the size " + name + " is");
  }
  return found->low;
}

Value input_of(const TensorSpec& spec, const Manifest& manifest) {
  Value value;
  int64_t count = 1;
  for (const Axis& axis : spec.shape) {
    const int64_t size = size_of(axis, manifest);
    value.shape.push_back(static_cast<executorch::aten::SizesType>(size));
    count *= size;
  }
  value.type = scalar_type(spec);
  for (int64_t place = 0; place < count; ++place) {
    switch (value.type) {
      case ScalarType::Float: append(value.data, std::cos(static_cast<float>(place))); break;
      case ScalarType::Long: append(value.data, integer_at(spec, place)); break;
      case ScalarType::Int: append(value.data, static_cast<int32_t>(integer_at(spec, place))); break;
      default: append(value.data, static_cast<uint8_t>(integer_at(spec, place) != 0));
    }
  }
  return value;
}

std::string shown(const std::optional<int64_t>& value) {
  return value ? std::to_string(*value) : "None";
}

uint32_t asked_of(const Manifest& manifest) {
  std::string text = "probe 2";
  for (const TensorSpec& spec : manifest.inputs) {
    text += "\n" + spec.name + " " + spec.dtype + " ";
    for (size_t axis = 0; axis < spec.shape.size(); ++axis) {
      text += (axis == 0 ? "" : " ") + std::to_string(size_of(spec.shape[axis], manifest));
    }
    text += " " + shown(spec.low) + " " + shown(spec.high) + " [";
    for (size_t i = 0; i < spec.choices.size(); ++i) {
      text += (i == 0 ? "" : ", ") + std::to_string(spec.choices[i]);
    }
    text += "]";
  }
  return crc32(text);
}

// Of the last rows of all outputs in float32.
Numbers answer(Program& program) {
  std::vector<Value> inputs;
  std::vector<Value*> arguments;
  for (const TensorSpec& spec : program.manifest().inputs) {
    inputs.push_back(input_of(spec, program.manifest()));
  }
  for (Value& input : inputs) {
    arguments.push_back(&input);
  }
  Numbers found{};
  size_t place = 0;
  for (const Value& output : program.call("evaluate", arguments)) {
    if (output.type != ScalarType::Float || output.data.empty()) {
      continue;
    }
    const std::vector<float> values = output.floats();
    const size_t width = output.shape.empty() ? 1 : static_cast<size_t>(output.shape.back());
    for (size_t i = values.size() - width; i < values.size(); ++i, ++place) {
      const double tamed = std::abs(values[i]) <= kLargest ? static_cast<double>(values[i]) : 0.0;
      const double value = tamed / std::sqrt(static_cast<double>(width));
      for (size_t direction = 0; direction < found.size(); ++direction) {
        found[direction] += sign(direction, place) * value;
      }
    }
  }
  return found;
}

double length(const Numbers& of, const Numbers& from) {
  double sum = 0;
  for (size_t i = 0; i < of.size(); ++i) {
    sum += (of[i] - from[i]) * (of[i] - from[i]);
  }
  return std::sqrt(sum);
}

// The state with every B zero: the model as it was compiled.
State without_adapter(const Manifest& manifest, State state) {
  std::vector<bool> is_a(manifest.parameters, false);
  for (const TrainedA& site : manifest.trained_a) {
    const auto first = is_a.begin() + static_cast<std::ptrdiff_t>(site.offset);
    std::fill(first, first + static_cast<std::ptrdiff_t>(site.r * site.in), true);
  }
  for (size_t i = 0; i < manifest.parameters; ++i) {
    state[i] = is_a[i] ? state[i] : 0.0f;
  }
  return state;
}

void check(const Probe& then, const Probe& now, const std::filesystem::path& data) {
  if (then.asked != now.asked) {
    return;
  }
  Numbers before{}, found{};
  for (size_t i = 0; i < before.size(); ++i) {
    before[i] = then.adapted[i] - then.base[i];
    found[i] = now.adapted[i] - now.base[i];
  }
  const double rounding = length(then.base, now.base) + kRounding * length(then.base, {});
  if (!(length(before, found) <= kMostApart * length(before, {}) + rounding)) {
    char text[160];
    std::snprintf(text, sizeof(text), "the adapter moves the model's answer to the probe by %.1f %% here; when it was "
                                      "exported, it did so by %.1f %%, and elsewhere", 100 * now.effect(), 100 * then.effect());
    throw Failure(Exit::bad_data, data.string() + ": " + text);
  }
}

// What the adapter of a state does; the program has that state afterwards.
Probe probe_of(Program& program, const State& state) {
  Probe probe{};
  probe.asked = asked_of(program.manifest());
  program.load_state(without_adapter(program.manifest(), state));
  probe.base = answer(program);
  program.load_state(state);
  probe.adapted = answer(program);
  return probe;
}

}  // namespace

double Probe::effect() const {
  return length(base, adapted) / std::max(length(base, {}), 1e-30);
}

State probed_state(Program& program, const std::filesystem::path& data, bool quiet) {
  const DataFile found = load_ptd(data, program);
  if (!found.probe) {
    return found.state;
  }
  const Probe now = probe_of(program, found.state);
  check(*found.probe, now, data);
  if (now.effect() == 0) {
    std::fprintf(stderr, "warning: the adapter changes nothing of the model's answer to a fixed input; is it trained?\n");
  } else if (!quiet) {
    std::fprintf(stderr, "the adapter moves the model's answer to a fixed input by %.2f %%\n", 100 * now.effect());
  }
  return found.state;
}

State probed_state(const std::filesystem::path& program, const std::filesystem::path& data, bool quiet) {
  Program loaded(program, Use::evaluate);
  return probed_state(loaded, data, quiet);
}

}  // namespace host
