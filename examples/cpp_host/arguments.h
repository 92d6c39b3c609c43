// What stands behind the program's name on the command line.
#pragma once

#include <charconv>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "errors.h"

namespace host {

template <class Number>
Number number(const std::string& name, const std::string& text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw Failure(Exit::bad_arguments, name + " is '" + text + "', which is no " +
                                           (std::is_integral_v<Number> ? "whole number of 0 or more" : "number"));
  }
  return value;
}

// Rounded once, from the decimal text to double and on to float, as Python does it.
float real(const std::string& name, const std::string& text);

// How many threads; 1 or more.
uint32_t thread_count(const std::string& text);

// Token ids with spaces in between; none for an empty text.
std::vector<int64_t> token_ids(const std::string& name, const std::string& text);

// The arguments behind a verb: places, and options by name with their values.
struct Arguments {
  std::vector<std::string> places;
  std::map<std::string, std::string> options;
  bool quiet = false;

  const std::string* find(const std::string& name) const;  // nullptr where it was not given
};

// Throws `Failure` where an option is none of `known`, or has no value.
Arguments split_arguments(const std::vector<std::string>& words, const std::set<std::string>& known);

}  // namespace host
