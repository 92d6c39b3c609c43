#include "json.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

namespace host {

class Json::Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = element(0);
    spaces();
    if (at_ != text_.size()) {
      fail("there is more after the end");
    }
    return value;
  }

 private:
  static constexpr int kDeepest = 64;

  Json element(int depth) {
    if (depth > kDeepest) {
      fail("it nests too deep");
    }
    spaces();
    const size_t start = at_;
    Json value;
    switch (peek()) {
      case '{':
        value.kind_ = Kind::object;
        list('}', [&] {
          spaces();
          std::string name = quoted();
          spaces();
          take(':');
          value.fields_.emplace_back(std::move(name), element(depth + 1));
        });
        break;
      case '[':
        value.kind_ = Kind::array;
        list(']', [&] { value.items_.push_back(element(depth + 1)); });
        break;
      case '"':
        value.kind_ = Kind::string;
        value.string_ = quoted();
        break;
      case 't':
        value.kind_ = Kind::boolean;
        word("true");
        break;
      case 'f':
        value.kind_ = Kind::boolean;
        word("false");
        break;
      case 'n':
        word("null");
        break;
      default:
        value.kind_ = Kind::number;
        at_ = std::min(text_.find_first_not_of("+-.0123456789eE", at_), text_.size());
        if (at_ == start) {
          fail("a value is missing");
        }
    }
    value.text_ = text_.substr(start, at_ - start);
    return value;
  }

  template <class Item>
  void list(char end, Item item) {
    ++at_;
    spaces();
    if (peek() == end) {
      ++at_;
      return;
    }
    for (;;) {
      item();
      spaces();
      if (peek() == end) {
        ++at_;
        return;
      }
      take(',');
    }
  }

  std::string quoted() {
    take('"');
    std::string value;
    for (char next = character(); next != '"'; next = character()) {
      value += next == '\\' ? escaped() : std::string(1, next);
    }
    return value;
  }

  std::string escaped() {
    switch (const char next = character()) {
      case 'b': return "\b";
      case 'f': return "\f";
      case 'n': return "\n";
      case 'r': return "\r";
      case 't': return "\t";
      case 'u': {
        uint32_t code = four_digits();
        if (code >= 0xd800 && code < 0xdc00) {  // the first half of a pair
          take('\\');
          take('u');
          code = 0x10000 + ((code - 0xd800) << 10) + (four_digits() - 0xdc00);
        }
        return utf8(code);
      }
      default: return std::string(1, next);
    }
  }

  uint32_t four_digits() {
    const std::string_view digits = text_.substr(at_, 4);
    uint32_t code = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (digits.size() != 4 || error != std::errc() || end != digits.data() + 4) {
      fail("four digits are missing");
    }
    at_ += 4;
    return code;
  }

  static std::string utf8(uint32_t code) {
    if (code < 0x80) {
      return {static_cast<char>(code)};
    }
    const auto tail = [code](int shift) { return static_cast<char>(0x80 | (code >> shift & 0x3f)); };
    if (code < 0x800) {
      return {static_cast<char>(0xc0 | code >> 6), tail(0)};
    }
    if (code < 0x10000) {
      return {static_cast<char>(0xe0 | code >> 12), tail(6), tail(0)};
    }
    return {static_cast<char>(0xf0 | code >> 18), tail(12), tail(6), tail(0)};
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  char character() {
    if (at_ == text_.size()) {
      fail("it ends too early");
    }
    return text_[at_++];
  }

  void take(char wanted) {
    if (peek() != wanted) {
      fail(std::string("'") + wanted + "' is missing");
    }
    ++at_;
  }

  void word(std::string_view wanted) {
    if (text_.substr(at_, wanted.size()) != wanted) {
      fail("a value is missing");
    }
    at_ += wanted.size();
  }

  void spaces() { at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size()); }

  [[noreturn]] void fail(const std::string& problem) const {
    throw std::runtime_error("no JSON: " + problem + " at byte " + std::to_string(at_));
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) {
  return Parser(text).document();
}

void Json::expect(Kind kind, const char* name) const {
  if (kind_ != kind) {
    throw std::runtime_error("there is " + std::string(text_.substr(0, 40)) + " where " + name + " should be");
  }
}

const std::vector<std::pair<std::string, Json>>& Json::fields() const {
  expect(Kind::object, "an object");
  return fields_;
}

const Json* Json::find(std::string_view name) const {
  for (const auto& [key, value] : fields()) {
    if (key == name) {
      return &value;
    }
  }
  return nullptr;
}

const Json& Json::at(std::string_view name) const {
  if (const Json* found = find(name)) {
    return *found;
  }
  throw std::runtime_error("the field " + std::string(name) + " is missing");
}

const std::vector<Json>& Json::items() const {
  expect(Kind::array, "an array");
  return items_;
}

std::string Json::string() const {
  expect(Kind::string, "a string");
  return string_;
}

int64_t Json::integer() const {
  expect(Kind::number, "a whole number");
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
  if (error != std::errc() || end != text_.data() + text_.size()) {
    throw std::runtime_error(std::string(text_) + " is no whole number");
  }
  return value;
}

double Json::number() const {
  expect(Kind::number, "a number");
  double value = 0;
  const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
  if (error != std::errc() || end != text_.data() + text_.size()) {
    throw std::runtime_error(std::string(text_) + " is no number");
  }
  return value;
}

std::optional<int64_t> Json::integer_or_null() const {
  return kind_ == Kind::null ? std::nullopt : std::optional<int64_t>(integer());
}

}  // namespace host
