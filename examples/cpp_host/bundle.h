// A bundle: calls of a program and what they must give, made where the program was compiled. Its layout is in
// docs/program_format.md; `mobizo bundle` writes it.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "tokens.h"

namespace host {

struct Expected {
  std::string value, wanted;  // names of tensors
  std::string measure;
  double tolerance;
};

struct Call {
  std::string name, method, state;
  std::vector<std::string> arguments;
  std::vector<Expected> expected;
};

struct Bundle {
  std::string program;  // SHA-256 of the program file before its trailer, hexadecimal
  std::vector<Call> calls;
  std::map<std::string, Value> tensors;
};

// Throws `Failure` where a file is none, or damaged.
Bundle read_bundle(const std::filesystem::path& path);

// How far a value is from what it should be; infinite where shapes or types differ, or what is infinite or no number.
double measured(const Expected& expected, const Value& found, const Value& wanted);

}  // namespace host
