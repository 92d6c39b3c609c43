#include "manifest.h"

#include <algorithm>

#include "errors.h"
#include "json.h"

namespace host {
namespace {

constexpr char kNoise[] = "2";  // version of the noise

bool is_null(const Json& json) {
  return json.text() == "null";
}

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
  if (!is_null(json.at("choices"))) {
    for (const Json& choice : json.at("choices").items()) {
      spec.choices.push_back(choice.integer());
    }
  }
  return spec;
}

size_t leaves(const Json& nesting) {
  const auto& children = nesting.at("children_spec").items();
  size_t count = children.empty() && is_null(nesting.at("type"));
  for (const Json& child : children) {
    count += leaves(child);
  }
  return count;
}

// The place of an output by name among those that are tensors. `nesting` is how outputs nest, as PyTorch writes it.
std::optional<size_t> place_of_output(const Json& nesting, const Json& fixed, const std::string& name) {
  if (is_null(nesting.at("context"))) {
    return std::nullopt;
  }
  const std::string context = nesting.at("context").string();  // JSON again: the names of a dict or of a class
  const Json names = Json::parse(context);
  size_t leaf = 0;
  for (size_t i = 0; names.is_array() && i < names.items().size(); ++i) {
    if (names.items()[i].string() == name) {
      const auto& values = fixed.fields();
      return leaf - static_cast<size_t>(std::count_if(values.begin(), values.end(), [leaf](const auto& value) {
               return std::stoul(value.first) < leaf;
             }));
    }
    leaf += leaves(nesting.at("children_spec").items().at(i));
  }
  return std::nullopt;
}

// The named output, the logits, the only output or the first of a tuple, as the losses in Python choose it.
std::optional<size_t> output_of_loss(const Json& json) {
  const Json* name = json.at("loss").find("output");
  const bool named = name != nullptr && !is_null(*name);
  if (!named && json.at("outputs").items().size() == 1) {
    return 0;
  }
  if (is_null(json.at("nesting"))) {
    return std::nullopt;
  }
  const std::string text = json.at("nesting").string();
  const Json nesting = Json::parse(text);
  const std::string spec = nesting.at("spec").string();
  const Json tree = Json::parse(spec);  // the version of what follows, and that
  const Json& top = tree.items().at(1);
  const bool plain = !is_null(top.at("type")) && (top.at("type").string() == "builtins.tuple" ||
                                                  top.at("type").string() == "builtins.list");
  if (!named && plain) {
    return 0;
  }
  return place_of_output(top, nesting.at("fixed"), named ? name->string() : "logits");
}

Generation generation(const Json& json) {
  Generation result{json.at("context").integer(), json.at("vocabulary").integer(), {}};
  for (const Json& stop : json.at("stop_ids").items()) {
    result.stop_ids.push_back(stop.integer());
  }
  if (result.context < 2 || result.vocabulary < 1) {
    throw std::runtime_error("it generates with a cache for " + std::to_string(result.context) + " tokens");
  }
  return result;
}

StateIn state_in(const std::string& name) {
  if (name == "shared") {
    return StateIn::program;
  }
  if (name == "data") {
    return StateIn::data;
  }
  if (name == "io") {
    return StateIn::call;
  }
  throw std::runtime_error("the state is " + name + ", not shared, data or io");
}

Manifest manifest(const Json& json, bool replays) {
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
  for (const Json& run : json.at("memory_start").items()) {
    const int64_t count = run.items().at(0).integer();
    result.memory_start.emplace_back(static_cast<size_t>(count), static_cast<float>(run.items().at(1).number()));
  }
  result.has_prefix = !json.at("prefix").items().empty();
  const Json& zo = json.at("zo");
  result.queries = static_cast<uint32_t>(zo.at("queries").integer());
  result.state = state_in(json.at("state").string());
  result.eps = static_cast<float>(json.at("eps").number());
  result.first_label = static_cast<size_t>(json.at("first_label").integer());
  result.max_labels = json.at("max_labels").integer_or_null();
  result.loss = json.at("loss").at("name").string();
  result.output = output_of_loss(json);
  if (!is_null(json.at("answers"))) {
    for (const Json& answer : json.at("answers").items()) {
      result.answers.push_back(answer.string());
    }
  }
  if (!is_null(json.at("generate"))) {
    result.generate = generation(json.at("generate"));
  }
  // The manifest is JSON text with sorted keys and Python's separators, and so is what is hashed: its parts are copied
  // as they stand, and no number is ever written again.
  const auto text = [](const Json& value) { return std::string(value.text()); };
  const std::string gradient = replays ? "" : "[\"differentiates\", " + text(zo.at("clip")) + "], ";
  result.identity = "[" + text(json.at("model")) + ", " + text(json.at("sites")) + ", " + gradient + "[" +
                    text(zo.at("queries")) + ", " + text(zo.at("noise")) + ", " + kNoise + "], " + text(json.at("rule")) + "]";
  return result;
}

}  // namespace

Manifest read_manifest(std::string_view text, const std::string& where, bool replays) {
  try {
    const Json json = Json::parse(text);
    const int64_t version = json.at("format_version").integer();
    if (version != kFormatVersion) {
      throw std::runtime_error("the program has format " + std::to_string(version) + ", this host reads format " +
                               std::to_string(kFormatVersion));
    }
    return manifest(json, replays);
  } catch (const std::exception& error) {  // a list that is too short, too
    throw Failure(Exit::bad_program, where + ": " + error.what());
  }
}

}  // namespace host
