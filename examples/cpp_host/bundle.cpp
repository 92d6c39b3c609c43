#include "bundle.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string_view>

#include "errors.h"
#include "files.h"
#include "json.h"
#include "sha256.h"

namespace host {
namespace {

using executorch::aten::ScalarType;

constexpr double kInfinite = std::numeric_limits<double>::infinity();
constexpr char kLargest[] = "largest difference", kNorm[] = "norm of the difference", kOthers[] = "share of others";

struct Type {
  ScalarType type;
  const char* torch;  // as the checksum spells it
};

// The types of safetensors that programs take and return.
const std::map<std::string, Type> kTypes = {{"F32", {ScalarType::Float, "torch.float32"}},
                                            {"I64", {ScalarType::Long, "torch.int64"}},
                                            {"I32", {ScalarType::Int, "torch.int32"}},
                                            {"BOOL", {ScalarType::Bool, "torch.bool"}}};

Value read_tensor(const Json& described, std::string_view data) {
  const std::string dtype = described.at("dtype").string();
  if (!kTypes.count(dtype)) {
    throw std::runtime_error("it has a tensor of type " + dtype + ", which this host does not read");
  }
  Value value{kTypes.at(dtype).type, {}, {}};
  size_t bytes = executorch::runtime::elementSize(value.type);
  for (const Json& size : described.at("shape").items()) {
    value.shape.push_back(static_cast<executorch::aten::SizesType>(size.integer()));
    bytes *= static_cast<size_t>(size.integer());
  }
  const auto& span = described.at("data_offsets").items();
  const auto begin = static_cast<size_t>(span.at(0).integer()), end = static_cast<size_t>(span.at(1).integer());
  if (begin > end || end > data.size() || end - begin != bytes) {
    throw std::runtime_error("it is cut off");
  }
  value.data.assign(data.begin() + static_cast<std::ptrdiff_t>(begin), data.begin() + static_cast<std::ptrdiff_t>(end));
  return value;
}

Call read_call(const Json& json) {
  Call call{json.at("name").string(), json.at("method").string(), json.at("state").string(), {}, {}};
  for (const Json& argument : json.at("arguments").items()) {
    call.arguments.push_back(argument.string());
  }
  for (const Json& one : json.at("expected").items()) {
    call.expected.push_back({one.at("value").string(), one.at("wanted").string(), one.at("measure").string(),
                             one.at("tolerance").number()});
    if (const std::string& measure = call.expected.back().measure;
        measure != kLargest && measure != kNorm && measure != kOthers) {
      throw std::runtime_error("it has the measure " + measure + ", which this host does not know");
    }
  }
  return call;
}

std::string spelled(const Value& value) {
  std::string sizes;
  for (const auto size : value.shape) {
    sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  }
  return "[" + sizes + "]";
}

Bundle parsed(const std::string& file) {
  uint64_t length = 0;
  std::memcpy(&length, file.data(), std::min(file.size(), sizeof(length)));
  if (file.size() < sizeof(length) || length > file.size() - sizeof(length)) {
    throw std::runtime_error("it is no safetensors file, or cut off");
  }
  const Json header = Json::parse(std::string_view(file).substr(sizeof(length), length));
  const std::string_view data = std::string_view(file).substr(sizeof(length) + length);
  const Json* described = header.find("__metadata__");
  if (described == nullptr || described->find("mobizo_bundle") == nullptr) {
    throw std::runtime_error("this is no bundle");
  }
  if (const std::string version = described->at("mobizo_bundle").string(); version != "1") {
    throw std::runtime_error("it has version " + version + ", this host reads 1");
  }
  Bundle bundle;
  bundle.program = described->at("program").string();
  const std::string calls = described->at("calls").string();
  std::map<std::string, std::string> types;
  for (const auto& [name, tensor] : header.fields()) {
    if (name != "__metadata__") {
      bundle.tensors.emplace(name, read_tensor(tensor, data));
      types[name] = kTypes.at(tensor.at("dtype").string()).torch;
    }
  }
  Sha256 hash;
  const std::string begin = bundle.program + " " + calls;
  hash.update(begin.data(), begin.size());
  for (const auto& [name, value] : bundle.tensors) {
    const std::string text = name + " " + types[name] + " " + spelled(value);
    hash.update(text.data(), text.size());
    hash.update(value.data.data(), value.data.size());
  }
  if (hexadecimal(hash.digest()) != described->at("sha256").string()) {
    throw std::runtime_error("it is damaged: its checksum is another");
  }
  const Json list = Json::parse(calls);
  for (const Json& call : list.items()) {
    bundle.calls.push_back(read_call(call));
  }
  return bundle;
}

double number_at(const Value& value, size_t place) {
  switch (value.type) {
    case ScalarType::Float: {
      float number = 0;
      std::memcpy(&number, value.data.data() + place * sizeof(number), sizeof(number));
      return static_cast<double>(number);
    }
    case ScalarType::Long: return static_cast<double>(value.integer(place));
    case ScalarType::Int: {
      int32_t number = 0;
      std::memcpy(&number, value.data.data() + place * sizeof(number), sizeof(number));
      return number;
    }
    default: return value.data[place];
  }
}

// Infinite unless both are finite, or both the same infinity, or both no number.
double difference(double found, double wanted) {
  if (std::isfinite(found) && std::isfinite(wanted)) {
    return std::abs(found - wanted);
  }
  return found == wanted || (std::isnan(found) && std::isnan(wanted)) ? 0 : kInfinite;
}

}  // namespace

Bundle read_bundle(const std::filesystem::path& path) {
  try {
    return parsed(read_file(path));
  } catch (const std::exception& error) {  // a list that is too short, too
    throw Failure(Exit::bad_data, path.string() + ": " + error.what());
  }
}

double measured(const Expected& expected, const Value& found, const Value& wanted) {
  if (found.type != wanted.type || found.shape != wanted.shape) {
    return kInfinite;
  }
  const size_t count = found.data.size() / executorch::runtime::elementSize(found.type);
  double largest = 0, squares = 0, others = 0;
  for (size_t i = 0; i < count; ++i) {
    const double apart = difference(number_at(found, i), number_at(wanted, i));
    largest = std::max(largest, apart);
    squares += apart * apart;
    others += apart != 0;
  }
  if (expected.measure == kLargest) {
    return largest;
  }
  return expected.measure == kNorm ? std::sqrt(squares) : others / static_cast<double>(std::max<size_t>(1, count));
}

}  // namespace host
