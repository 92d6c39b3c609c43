#include "program.h"

#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>

#include <algorithm>

#include "checksum.h"
#include "errors.h"

namespace host {
namespace {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

constexpr char kManifest[] = "mobizo_manifest";
constexpr char kLoraA[] = "mobizo_lora_a";
constexpr char kState[] = "mobizo_lora_b";
constexpr char kTrainStep[] = "train_step";
constexpr char kReplay[] = "replay";

TensorPtr one(int32_t value) {
  return executorch::extension::make_tensor_ptr({1}, std::vector<int32_t>{value});
}

TensorPtr one(float value) {
  return executorch::extension::make_tensor_ptr({1}, std::vector<float>{value});
}

std::vector<float> floats(const EValue& value) {
  const auto tensor = value.toTensor();
  const float* data = tensor.const_data_ptr<float>();
  return {data, data + tensor.numel()};
}

}  // namespace

// The file is mapped, not read; and the methods share their planned memory, and with it the state.
Program::Program(const std::filesystem::path& path)
    : path_(path), module_(path.string(), Module::LoadMode::Mmap, nullptr, nullptr, nullptr, true) {
  try {
    check_file(path);  // before anything in it is mapped: the runtime trusts what is in a file
  } catch (const std::runtime_error& error) {
    fail(error.what());
  }
  // Without this, XNNPACK packs the weights once for each method.
  executorch::runtime::BackendOptions<1> options;
  executorch::runtime::LoadBackendOptionsMap by_backend;
  if (options.set_option("weight_cache_enabled", true) != Error::Ok ||
      by_backend.set_options("XnnpackBackend", options.view()) != Error::Ok) {
    fail("the options of the backend cannot be set");
  }
  if (const Error error = module_.load(by_backend); error != Error::Ok) {
    fail(std::string("it cannot be loaded: ") + executorch::runtime::to_string(error));
  }
  read_identity();
  load_methods();
}

void Program::read_identity() {
  const auto names = module_.method_names();
  if (!names.ok() || !names->count(kManifest)) {
    fail("this is no program of mobizo-compiler: it has no method mobizo_manifest");
  }
  const auto text = run(kManifest, {});
  if (text.size() != 1 || !text[0].isString()) {
    fail("the manifest is no text");
  }
  manifest_ = read_manifest(text[0].toString(), path_.string());
  const auto lora_a = run(kLoraA, {});
  if (lora_a.size() != 1 || !lora_a[0].isTensor()) {
    fail("A is no tensor");
  }
  Sha256 hash;
  hash.update(manifest_.identity.data(), manifest_.identity.size());
  hash.update(lora_a[0].toTensor().const_data_ptr(), lora_a[0].toTensor().nbytes());
  fingerprint_ = hash.digest();
  // Every B is zero, an A that is trained begins as the file has it, and a rule remembers nothing yet.
  initial_.assign(manifest_.state_size, 0.0f);
  const float* a = lora_a[0].toTensor().const_data_ptr<float>();
  for (const TrainedA& site : manifest_.trained_a) {
    for (size_t row = 0; row < site.r; ++row) {
      for (size_t column = 0; column < site.in; ++column) {
        initial_[site.offset + column * site.r + row] = *a++;
      }
    }
  }
  module_.unload_method(kManifest);
  module_.unload_method(kLoraA);
}

// Every load sets the shared state back, so all methods are loaded before one of them runs.
void Program::load_methods() {
  load_method(kTrainStep);
  load_method(kReplay);
  if (manifest_.state_is_passed) {
    passed_ = initial_;
    return;
  }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // the only way to the attributes of a loaded method
  const auto method = module_.method(kTrainStep);
#pragma GCC diagnostic pop
  const auto attribute = method.ok() ? (*method)->get_attribute(kState) : method.error();
  if (!attribute.ok() || static_cast<size_t>(attribute->numel()) != manifest_.state_size ||
      attribute->scalar_type() != ScalarType::Float) {
    fail("its state is not the one that the manifest describes");
  }
  shared_ = attribute->mutable_data_ptr<float>();
}

void Program::load_method(const std::string& name) {
  const auto described = module_.method_meta(name);
  if (!described.ok()) {
    fail("it has no method " + name +
         (name == kReplay ? ": its estimator has the gradient itself, whose runs this host cannot resume" : ""));
  }
  for (size_t i = 0; i < described->num_backends(); ++i) {
    const char* backend = *described->get_backend_name(i);
    if (executorch::runtime::get_backend_class(backend) == nullptr) {
      fail("it needs " + std::string(backend) + ", and this host was linked without it");
    }
  }
  if (const Error error = module_.load_method(name); error != Error::Ok) {
    fail("its method " + name + " cannot be loaded: " + executorch::runtime::to_string(error));
  }
}

StepResult Program::train_step(Batch& batch, uint32_t seed, float learning_rate, float eps) {
  Tensors arguments;
  for (Value& input : batch.inputs) {
    arguments.push_back(input.tensor());
  }
  arguments.push_back(batch.labels.tensor());
  arguments.insert(arguments.end(), {one(static_cast<int32_t>(seed)), one(learning_rate), one(eps)});
  const auto outputs = run(kTrainStep, arguments);
  if (outputs.size() < 3) {
    fail("train_step has " + std::to_string(outputs.size()) + " outputs");
  }
  return {floats(outputs[0]).at(0), floats(outputs[2])};
}

void Program::replay(uint32_t seed, std::vector<float> projected_gradient, float learning_rate) {
  const auto queries = static_cast<executorch::aten::SizesType>(projected_gradient.size());
  auto gradient = executorch::extension::make_tensor_ptr({queries}, std::move(projected_gradient));
  run(kReplay, {one(static_cast<int32_t>(seed)), gradient, one(learning_rate)});
}

State Program::state() const {
  return shared_ == nullptr ? passed_ : State(shared_, shared_ + manifest_.state_size);
}

void Program::load_state(const State& state) {
  if (state.size() != manifest_.state_size) {
    fail("its state has " + std::to_string(manifest_.state_size) + " numbers, not " + std::to_string(state.size()));
  }
  std::copy(state.begin(), state.end(), shared_ == nullptr ? passed_.data() : shared_);
}

std::vector<EValue> Program::run(const std::string& method, const Tensors& arguments) {
  std::vector<EValue> values(arguments.begin(), arguments.end());
  TensorPtr state;
  if (!passed_.empty()) {
    const auto size = static_cast<executorch::aten::SizesType>(passed_.size());
    state = executorch::extension::from_blob(passed_.data(), {size}, ScalarType::Float);
    values.emplace_back(state);
  }
  auto outputs = module_.execute(method, values);
  if (!outputs.ok()) {
    fail(method + " cannot run: " + executorch::runtime::to_string(outputs.error()));
  }
  if (!passed_.empty()) {
    if (outputs->empty() || !outputs->back().isTensor()) {
      fail(method + " does not return the state");
    }
    load_state(floats(outputs->back()));
  }
  return std::move(*outputs);
}

void Program::fail(const std::string& problem) const {
  throw Failure(Exit::bad_program, path_.string() + ": " + problem);
}

}  // namespace host
