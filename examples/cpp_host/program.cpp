#include "program.h"

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>

#include <algorithm>
#include <numeric>

#include "checksum.h"
#include "errors.h"
#include "state_file.h"

namespace host {
namespace {

using executorch::aten::ScalarType;
using executorch::extension::BufferDataLoader;
using executorch::extension::MmapDataLoader;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

constexpr char kManifest[] = "mobizo_manifest";
constexpr char kLoraA[] = "mobizo_lora_a";
constexpr char kState[] = "mobizo_lora_b";
constexpr char kTrainStep[] = "train_step";
constexpr char kReplay[] = "replay";
constexpr char kEvaluate[] = "evaluate";
constexpr char kPrefix[] = "prefix";
constexpr char kForward[] = "forward";

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

Program::Program(const std::filesystem::path& path, Use use) : path_(path) {
  try {
    check_file(path);  // before anything in it is mapped: the runtime trusts what is in a file
  } catch (const std::runtime_error& error) {
    fail(error.what());
  }
  // The file is mapped, not read; and the methods share their planned memory, and with it the state.
  module_ = std::make_unique<Module>(path.string(), Module::LoadMode::Mmap, nullptr, nullptr, nullptr, true);
  open();
  read_identity();
  if (manifest_.state == StateIn::data) {
    open_with_data();
  }
  load_methods(use);
}

void Program::open() {
  // Without this, XNNPACK packs the weights once for each method.
  executorch::runtime::BackendOptions<1> options;
  executorch::runtime::LoadBackendOptionsMap by_backend;
  if (options.set_option("weight_cache_enabled", true) != Error::Ok ||
      by_backend.set_options("XnnpackBackend", options.view()) != Error::Ok) {
    fail("the options of the backend cannot be set");
  }
  if (const Error error = module_->load(by_backend); error != Error::Ok) {
    fail(std::string("it cannot be loaded: ") + executorch::runtime::to_string(error));
  }
}

// Methods look the state up while they load. What a run or a file has is put in its place later, as everywhere.
void Program::open_with_data() {
  auto file = MmapDataLoader::from(path_.c_str(), MmapDataLoader::MlockConfig::NoMlock);
  if (!file.ok()) {
    fail(std::string("it cannot be mapped: ") + executorch::runtime::to_string(file.error()));
  }
  data_ = packed_state(initial_, fingerprint_);
  module_ = std::make_unique<Module>(std::make_unique<MmapDataLoader>(std::move(*file)), nullptr, nullptr, nullptr,
                                     std::make_unique<BufferDataLoader>(data_.data(), data_.size()), true);
  open();
}

void Program::read_identity() {
  const auto names = module_->method_names();
  if (!names.ok() || !names->count(kManifest)) {
    fail("this is no program of mobizo-compiler: it has no method mobizo_manifest");
  }
  replays_ = names->count(kReplay) > 0;
  const auto text = run(kManifest, {});
  if (text.size() != 1 || !text[0].isString()) {
    fail("the manifest is no text");
  }
  manifest_ = read_manifest(text[0].toString(), path_.string(), replays_);
  const auto lora_a = run(kLoraA, {});
  if (lora_a.size() != 1 || !lora_a[0].isTensor()) {
    fail("A is no tensor");
  }
  Sha256 hash;
  hash.update(manifest_.identity.data(), manifest_.identity.size());
  hash.update(lora_a[0].toTensor().const_data_ptr(), lora_a[0].toTensor().nbytes());
  fingerprint_ = hash.digest();
  set_initial(lora_a[0].toTensor().const_data_ptr<float>());
  module_->unload_method(kManifest);
  module_->unload_method(kLoraA);
}

// Every B is zero, an A that is trained begins as the file has it, and a rule remembers what it begins with.
void Program::set_initial(const float* lora_a) {
  initial_.assign(manifest_.parameters, 0.0f);
  for (const TrainedA& site : manifest_.trained_a) {
    for (size_t row = 0; row < site.r; ++row) {
      for (size_t column = 0; column < site.in; ++column) {
        initial_[site.offset + column * site.r + row] = *lora_a++;
      }
    }
  }
  for (const auto& [count, value] : manifest_.memory_start) {
    initial_.insert(initial_.end(), std::min(count, manifest_.state_size - initial_.size()), value);
  }
  initial_.resize(manifest_.state_size, 0.0f);
}

// Every load sets the shared state back, so all methods are loaded before one of them runs.
void Program::load_methods(Use use) {
  if (use == Use::train && !replays_) {
    fail("it has no method replay: its estimator has the gradient itself, whose runs this host cannot resume; "
         "evaluate, predict and generate take it");
  }
  if (use == Use::generate && !manifest_.generate) {
    fail("it has no method forward, which generates with a cache: compile with generate=GenerateConfig(...)");
  }
  const bool trains = use == Use::train || use == Use::verify;
  const std::string first = trains ? kTrainStep : use == Use::evaluate ? kEvaluate : kForward;
  load_method(first);
  if (use == Use::verify) {
    load_method(kEvaluate);
    if (manifest_.generate) {
      load_method(kForward);
    }
  }
  if (replays_) {
    load_method(kReplay);
  }
  if (trains && manifest_.has_prefix) {
    load_method(kPrefix);
  }
  if (manifest_.state == StateIn::call) {
    passed_ = initial_;
  } else {
    find_state(first);
  }
}

void Program::find_state(const std::string& name) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // the only way to the attributes of a loaded method
  const auto method = module_->method(name);
#pragma GCC diagnostic pop
  const auto attribute = method.ok() ? (*method)->get_attribute(kState) : method.error();
  if (!attribute.ok() || static_cast<size_t>(attribute->numel()) != manifest_.state_size ||
      attribute->scalar_type() != ScalarType::Float) {
    fail("its state is not the one that the manifest describes");
  }
  shared_ = attribute->mutable_data_ptr<float>();
}

void Program::load_method(const std::string& name) {
  const auto described = module_->method_meta(name);
  if (!described.ok()) {
    fail("it has no method " + name);
  }
  for (size_t i = 0; i < described->num_backends(); ++i) {
    const char* backend = *described->get_backend_name(i);
    if (executorch::runtime::get_backend_class(backend) == nullptr) {
      fail("it needs " + std::string(backend) + ", and this host was linked without it");
    }
  }
  if (const Error error = module_->load_method(name); error != Error::Ok) {
    fail("its method " + name + " cannot be loaded: " + executorch::runtime::to_string(error));
  }
}

Program::Tensors Program::inputs_of(Batch& batch) const {
  Tensors inputs;
  for (Value& input : batch.inputs) {
    inputs.push_back(input.tensor());
  }
  return inputs;
}

// What a step starts from: the inputs, or what `prefix` makes of them, in memory that the step does not write to.
Program::Tensors Program::start_of(Batch& batch) {
  Tensors inputs = inputs_of(batch);
  if (!manifest_.has_prefix) {
    return inputs;
  }
  inputs.push_back(batch.labels.tensor());
  Tensors start;
  for (const EValue& value : run(kPrefix, inputs)) {
    start.push_back(executorch::extension::clone_tensor_ptr(value.toTensor()));
  }
  return start;
}

StepResult Program::train_step(Batch& batch, uint32_t seed, float learning_rate, float eps) {
  Tensors arguments = start_of(batch);
  arguments.push_back(batch.labels.tensor());
  arguments.insert(arguments.end(), {one(static_cast<int32_t>(seed)), one(learning_rate), one(eps)});
  const auto outputs = update(kTrainStep, arguments);
  if (outputs.size() < 3) {
    fail("train_step has " + std::to_string(outputs.size()) + " outputs");
  }
  return {floats(outputs[0]).at(0), floats(outputs[2])};
}

Output Program::evaluate(Batch& batch) {
  if (!manifest_.output) {
    fail("it returns several values, and the manifest does not tell which of them the loss is of; return the logits "
         "alone, or first");
  }
  const auto outputs = run_with_state(kEvaluate, inputs_of(batch));
  if (*manifest_.output >= outputs.size() || !outputs[*manifest_.output].isTensor()) {
    fail("evaluate has " + std::to_string(outputs.size()) + " outputs");
  }
  const auto tensor = outputs[*manifest_.output].toTensor();
  if (tensor.scalar_type() != ScalarType::Float) {
    fail("evaluate does not return float32, and this host reads no other values");
  }
  return {{tensor.sizes().begin(), tensor.sizes().end()}, floats(outputs[*manifest_.output])};
}

std::vector<Value> Program::call(const std::string& method, const std::vector<Value*>& arguments) {
  Tensors tensors;
  for (Value* argument : arguments) {
    tensors.push_back(argument->tensor());
  }
  const bool updates = method == kTrainStep || method == kReplay;
  auto outputs = updates ? update(method, tensors)
                         : method == kEvaluate ? run_with_state(method, tensors) : run(method, tensors);
  if (updates && !passed_.empty()) {
    outputs.pop_back();  // the state
  }
  std::vector<Value> values;
  for (const EValue& output : outputs) {
    if (!output.isTensor()) {
      fail(method + " returns something that is no tensor");
    }
    const auto tensor = output.toTensor();
    const auto* bytes = static_cast<const uint8_t*>(tensor.const_data_ptr());
    values.push_back({tensor.scalar_type(), {tensor.sizes().begin(), tensor.sizes().end()}, {bytes, bytes + tensor.nbytes()}});
  }
  return values;
}

std::vector<float> Program::next_logits(std::vector<int64_t> tokens, int64_t start) {
  const auto count = static_cast<executorch::aten::SizesType>(tokens.size());
  std::vector<int64_t> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), start);
  const auto outputs = run(kForward, {executorch::extension::make_tensor_ptr({1, count}, std::move(tokens)),
                                      executorch::extension::make_tensor_ptr({count}, std::move(positions))});
  const auto vocabulary = static_cast<std::ptrdiff_t>(manifest_.generate->vocabulary);
  if (outputs.size() != 1 || !outputs[0].isTensor() || outputs[0].toTensor().scalar_type() != ScalarType::Float ||
      outputs[0].toTensor().numel() < vocabulary) {
    fail("forward does not return logits of the vocabulary in float32");
  }
  const std::vector<float> logits = floats(outputs[0]);
  return {logits.end() - vocabulary, logits.end()};
}

void Program::replay(uint32_t seed, std::vector<float> projected_gradient, float learning_rate) {
  const auto queries = static_cast<executorch::aten::SizesType>(projected_gradient.size());
  auto gradient = executorch::extension::make_tensor_ptr({queries}, std::move(projected_gradient));
  update(kReplay, {one(static_cast<int32_t>(seed)), gradient, one(learning_rate)});
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
  auto outputs = module_->execute(method, std::vector<EValue>(arguments.begin(), arguments.end()));
  if (!outputs.ok()) {
    fail(method + " cannot run: " + executorch::runtime::to_string(outputs.error()));
  }
  return std::move(*outputs);
}

// The state is the last input, where it is passed.
std::vector<EValue> Program::run_with_state(const std::string& method, Tensors arguments) {
  if (!passed_.empty()) {
    const auto size = static_cast<executorch::aten::SizesType>(passed_.size());
    arguments.push_back(executorch::extension::from_blob(passed_.data(), {size}, ScalarType::Float));
  }
  return run(method, arguments);
}

// And what it becomes is the last output.
std::vector<EValue> Program::update(const std::string& method, const Tensors& arguments) {
  auto outputs = run_with_state(method, arguments);
  if (!passed_.empty()) {
    if (outputs.empty() || !outputs.back().isTensor()) {
      fail(method + " does not return the state");
    }
    load_state(floats(outputs.back()));
  }
  return outputs;
}

void Program::fail(const std::string& problem) const {
  throw Failure(Exit::bad_program, path_.string() + ": " + problem);
}

}  // namespace host
