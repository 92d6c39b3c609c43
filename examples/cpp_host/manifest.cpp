#include "manifest.h"

#include "errors.h"
#include "json.h"

namespace host {
namespace {

TensorSpec tensor_spec(const Json& json) {
  TensorSpec spec;
  spec.name = json.at("name").string();
  spec.dtype = json.at("dtype").string();
  for (const Json& axis : json.at("shape").items()) {
    spec.shape.push_back(axis.is_string() ? Axis(axis.string()) : Axis(axis.integer()));
  }
  spec.low = json.at("low").integer_or_null();
  spec.high = json.at("high").integer_or_null();
  spec.also = json.at("also").integer_or_null();
  if (json.at("choices").text() != "null") {
    for (const Json& choice : json.at("choices").items()) {
      spec.choices.push_back(choice.integer());
    }
  }
  return spec;
}

Manifest manifest(const Json& json) {
  Manifest result;
  for (const Json& item : json.at("inputs").items()) {
    result.inputs.push_back(tensor_spec(item));
  }
  result.labels = tensor_spec(json.at("labels"));
  for (const Json& size : json.at("sizes").items()) {
    result.sizes.push_back({size.at("name").string(), size.at("low").integer(), size.at("high").integer()});
  }
  result.parameters = 0;
  for (const Json& site : json.at("sites").items()) {
    const int64_t r = site.at("r").integer(), in = site.at("in_features").integer();
    const int64_t adapted = static_cast<int64_t>(site.at("outputs").items().size());
    result.parameters += static_cast<size_t>(r * (adapted ? adapted : site.at("out_features").integer()));
    if (const auto offset = site.at("a_offset").integer_or_null()) {
      result.parameters += static_cast<size_t>(r * in);
      result.trained_a.push_back({static_cast<size_t>(*offset), static_cast<size_t>(r), static_cast<size_t>(in)});
    }
  }
  result.state_size = result.parameters + static_cast<size_t>(json.at("memory").integer());
  if (!json.at("prefix").items().empty()) {
    throw std::runtime_error("the step starts from a method `prefix`, which this host does not call");
  }
  const Json& zo = json.at("zo");
  result.queries = static_cast<uint32_t>(zo.at("queries").integer());
  const std::string state = json.at("state").string();
  if (state != "shared" && state != "io") {
    throw std::runtime_error("the state is " + state + ", not shared or io");
  }
  result.state_is_passed = state == "io";
  result.eps = static_cast<float>(json.at("eps").number());
  result.first_label = static_cast<size_t>(json.at("first_label").integer());
  result.max_labels = json.at("max_labels").integer_or_null();
  // The manifest is JSON text with sorted keys and Python's separators, and so is what is hashed: its parts are copied
  // as they stand, and no number is ever written again.
  const auto text = [](const Json& value) { return std::string(value.text()); };
  result.identity = "[" + text(json.at("model")) + ", " + text(json.at("sites")) + ", [" + text(zo.at("queries")) +
                    ", " + text(zo.at("noise")) + "], " + text(json.at("rule")) + "]";
  return result;
}

}  // namespace

Manifest read_manifest(std::string_view text, const std::string& where) {
  try {
    const Json json = Json::parse(text);
    const int64_t version = json.at("format_version").integer();
    if (version != kFormatVersion) {
      throw std::runtime_error("the program has format " + std::to_string(version) + ", this host reads format " +
                               std::to_string(kFormatVersion));
    }
    return manifest(json);
  } catch (const std::runtime_error& error) {
    throw Failure(Exit::bad_program, where + ": " + error.what());
  }
}

}  // namespace host
