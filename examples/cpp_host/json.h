// JSON, as far as a manifest needs it. Every value keeps the text that it was read from.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace host {

class Json {
 public:
  // Throws `std::runtime_error` with the position of what is no JSON. Views into `text` stay inside the result.
  static Json parse(std::string_view text);

  // A field of an object, a `std::runtime_error` names it if it is not there.
  const Json& at(std::string_view name) const;
  const Json* find(std::string_view name) const;  // the same, or nullptr
  const std::vector<std::pair<std::string, Json>>& fields() const;
  const std::vector<Json>& items() const;  // of an array
  std::string string() const;
  int64_t integer() const;
  double number() const;
  std::optional<int64_t> integer_or_null() const;
  bool is_string() const { return kind_ == Kind::string; }
  bool is_array() const { return kind_ == Kind::array; }

  // As it stands in the source, so that it can be hashed without being written again.
  std::string_view text() const { return text_; }

 private:
  enum class Kind { null, boolean, number, string, array, object };
  class Parser;

  void expect(Kind kind, const char* name) const;

  Kind kind_ = Kind::null;
  std::string_view text_;
  std::string string_;
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> fields_;
};

}  // namespace host
