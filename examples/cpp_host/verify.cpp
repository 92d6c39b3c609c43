#include "verify.h"

#include <cstdio>

#include "arguments.h"
#include "bundle.h"
#include "checksum.h"
#include "errors.h"
#include "program.h"
#include "quiet.h"
#include "threads.h"

namespace host {
namespace {

Value& at(std::map<std::string, Value>& values, const std::string& name, const std::string& bundle) {
  const auto found = values.find(name);
  if (found == values.end()) {
    throw Failure(Exit::bad_data, bundle + ": it has no value " + name);
  }
  return found->second;
}

State state_of(const Value& value) {
  return value.floats();
}

Value value_of(const State& state) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(state.data());
  return {executorch::aten::ScalarType::Float,
          {static_cast<executorch::aten::SizesType>(state.size())},
          {bytes, bytes + state.size() * sizeof(float)}};
}

void run(Program& program, const Call& call, std::map<std::string, Value>& values, const std::string& bundle) {
  program.load_state(state_of(at(values, call.state, bundle)));
  std::vector<Value*> arguments;
  for (const std::string& name : call.arguments) {
    arguments.push_back(&at(values, name, bundle));
  }
  const std::vector<Value> outputs = program.call(call.method, arguments);
  for (size_t i = 0; i < outputs.size(); ++i) {
    values[call.name + "/" + std::to_string(i)] = outputs[i];
  }
  values[call.name + "/state"] = value_of(program.state());
}

}  // namespace

void verify(const std::vector<std::string>& words) {
  const Arguments arguments = split_arguments(words, {"--threads"});
  if (arguments.places.size() != 2) {
    throw Failure(Exit::bad_arguments, "verify needs a program and its bundle");
  }
  if (arguments.quiet) {
    silence_runtime();
  }
  if (const std::string* threads = arguments.find("--threads")) {
    set_threads(thread_count(*threads));
  }
  const std::string &file = arguments.places[0], &where = arguments.places[1];
  const Bundle bundle = read_bundle(where);
  Program program(file, Use::verify);
  if (bundle.program != content_digest(file)) {
    throw Failure(Exit::bad_data, where + ": the bundle is of another program");
  }
  std::map<std::string, Value> values = bundle.tensors;
  size_t count = 0;
  for (const Call& call : bundle.calls) {
    run(program, call, values, where);
    for (const Expected& one : call.expected) {
      const double error = measured(one, at(values, one.value, where), at(values, one.wanted, where));
      if (!(error <= one.tolerance)) {
        char text[160];
        std::snprintf(text, sizeof(text), " is %.3g, more than %.3g", error, one.tolerance);
        throw Failure(Exit::other_numbers, file + ": " + one.value + ": the " + one.measure + text +
                                               "; this processor or its runtime computes other numbers than the one "
                                               "that the bundle was made on: do not train here, and report it");
      }
      if (!arguments.quiet) {
        std::printf("%s: the %s is %.3g, of at most %.3g\n", one.value.c_str(), one.measure.c_str(), error,
                    one.tolerance);
      }
      ++count;
    }
  }
  if (!arguments.quiet) {
    std::printf("%zu values agree\n", count);
  }
}

}  // namespace host
