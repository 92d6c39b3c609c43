#include "tokens.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <map>
#include <string>
#include <string_view>

#include "errors.h"
#include "files.h"

namespace host {
namespace {

using executorch::aten::ScalarType;

const std::map<std::string, ScalarType> kTypes = {
    {"int64", ScalarType::Long},
    {"int32", ScalarType::Int},
    {"float32", ScalarType::Float},
    {"bool", ScalarType::Bool}};

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t start = 0; start <= text.size();) {
    const size_t end = std::min(text.find(separator, start), text.size());
    parts.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

template <class Number>
bool append_number(std::string_view word, std::vector<uint8_t>& data) {
  Number value{};
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (error != std::errc() || end != word.data() + word.size()) {
    return false;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  data.insert(data.end(), bytes, bytes + sizeof(value));
  return true;
}

bool append(ScalarType type, std::string_view word, std::vector<uint8_t>& data) {
  switch (type) {
    case ScalarType::Long: return append_number<int64_t>(word, data);
    case ScalarType::Int: return append_number<int32_t>(word, data);
    case ScalarType::Float: return append_number<float>(word, data);
    default:
      if (word != "0" && word != "1") {
        return false;
      }
      data.push_back(word == "1");
      return true;
  }
}

// Reads the rows of one file.
class Reader {
 public:
  Reader(const std::filesystem::path& path, const Manifest& manifest) : path_(path), manifest_(manifest) {
    for (const TensorSpec& spec : manifest.inputs) {
      specs_.push_back(&spec);
    }
    specs_.push_back(&manifest.labels);
    for (const TensorSpec* spec : specs_) {
      const auto* rows = spec->shape.empty() ? nullptr : std::get_if<int64_t>(&spec->shape[0]);
      const auto dynamic = std::count_if(spec->shape.begin(), spec->shape.end(),
                                         [](const Axis& axis) { return std::holds_alternative<std::string>(axis); });
      const bool same = rows != nullptr && *rows > 0 && (rows_ == 0 || *rows == rows_);
      if (!same || dynamic > 1 || !kTypes.count(spec->dtype)) {
        throw Failure(Exit::bad_program, "this host feeds rows of numbers, one or more of a fixed number of rows, and "
                                         "cannot make the input " + spec->name + " of them");
      }
      rows_ = *rows;
    }
  }

  std::vector<Batch> read(Rows use) {
    std::string text;
    try {
      text = read_file(path_);
    } catch (const std::runtime_error& error) {
      throw Failure(Exit::bad_data, error.what());
    }
    std::vector<std::string_view> lines = split(text, '\n');
    while (!lines.empty() && lines.back().empty()) {
      lines.pop_back();
    }
    if (lines.empty()) {
      fail("the file is empty");
    }
    line_ = 1;
    const std::vector<size_t> columns = columns_of(split(lines[0], '\t'));
    const size_t count = lines.size() - 1, batch = static_cast<size_t>(rows_);
    if (use == Rows::to_read && count == 0) {
      fail("there are no rows behind the names of the columns");
    }
    if (use == Rows::to_train && (count == 0 || count % batch != 0)) {
      fail("there are " + std::to_string(count) + " rows; the program takes " + std::to_string(batch) +
           " in a step, so it must be a multiple of that");
    }
    std::vector<Batch> batches;
    for (size_t row = 0; row < count; row += batch) {
      sizes_.clear();
      counted_ = 0;
      std::vector<Value> values;
      for (const TensorSpec* spec : specs_) {
        values.push_back({scalar_type(*spec), {}, {}});
      }
      for (size_t i = 0; i < batch; ++i) {
        line_ = std::min(row + i, count - 1) + 2;
        const std::vector<std::string_view> cells = split(lines[line_ - 1], '\t');
        if (cells.size() != columns.size()) {
          fail("there are " + std::to_string(cells.size()) + " columns, the first line has " +
               std::to_string(columns.size()));
        }
        for (size_t column = 0; column < cells.size(); ++column) {
          const size_t which = columns[column];
          read_row(*specs_[which], cells[column], values[which], specs_[which] == &manifest_.labels);
        }
      }
      if (use == Rows::to_train && manifest_.labels.also && counted_ == 0) {
        fail("nothing is labelled in this batch: all labels that count are " + std::to_string(*manifest_.labels.also));
      }
      Batch found;
      found.labels = std::move(values.back());
      values.pop_back();
      found.inputs = std::move(values);
      found.rows = std::min(batch, count - row);
      batches.push_back(std::move(found));
    }
    return batches;
  }

 private:
  std::vector<size_t> columns_of(const std::vector<std::string_view>& names) {
    std::vector<size_t> columns;
    for (const std::string_view name : names) {
      const auto found =
          std::find_if(specs_.begin(), specs_.end(), [&](const TensorSpec* spec) { return spec->name == name; });
      if (found == specs_.end()) {
        fail("the program takes no " + std::string(name));
      }
      columns.push_back(static_cast<size_t>(found - specs_.begin()));
    }
    for (size_t i = 0; i < specs_.size(); ++i) {
      if (std::count(columns.begin(), columns.end(), i) != 1) {
        fail("the column " + specs_[i]->name + " must be there once");
      }
    }
    return columns;
  }

  void read_row(const TensorSpec& spec, std::string_view cell, Value& value, bool labels) {
    std::vector<std::string_view> words = split(cell, ' ');
    set_shape(spec, static_cast<int64_t>(words.size()), value);
    int64_t counted = 0;
    for (size_t position = 0; position < words.size(); ++position) {
      const std::string_view word = words[position];
      if (!append(value.type, word, value.data)) {
        fail(spec.name + " has '" + std::string(word) + "' where a number of " + spec.dtype + " should be");
      }
      if (value.type == ScalarType::Long || value.type == ScalarType::Int) {
        int64_t number = 0;
        std::from_chars(word.data(), word.data() + word.size(), number);
        check_range(spec, number);
        counted += labels && spec.also && position >= manifest_.first_label && number != *spec.also;
      }
    }
    if (labels && manifest_.max_labels && counted > *manifest_.max_labels) {
      fail("there are " + std::to_string(counted) + " labels; the loss was compiled for at most " +
           std::to_string(*manifest_.max_labels) + " in a row");
    }
    counted_ += counted;
  }

  // The shape follows from the program, and a dynamic size from the number of values in a row.
  void set_shape(const TensorSpec& spec, int64_t words, Value& value) {
    int64_t fixed = 1;
    const std::string* dynamic = nullptr;
    for (size_t axis = 1; axis < spec.shape.size(); ++axis) {
      if (const auto* size = std::get_if<int64_t>(&spec.shape[axis])) {
        fixed *= *size;
      } else {
        dynamic = &std::get<std::string>(spec.shape[axis]);
      }
    }
    if (fixed <= 0 || (dynamic ? words % fixed : words - fixed) != 0) {
      fail(spec.name + " has " + std::to_string(words) + " values in a row, the program takes " +
           std::to_string(fixed) + (dynamic ? " times " + *dynamic : ""));
    }
    if (dynamic) {
      const int64_t size = words / fixed;
      for (const DynamicSize& allowed : manifest_.sizes) {
        if (allowed.name == *dynamic && (size < allowed.low || size > allowed.high)) {
          fail(spec.name + " has " + *dynamic + " = " + std::to_string(size) + ", outside " +
               std::to_string(allowed.low) + ".." + std::to_string(allowed.high));
        }
      }
      const int64_t before = sizes_.emplace(*dynamic, size).first->second;
      if (before != size) {
        fail(spec.name + " has " + *dynamic + " = " + std::to_string(size) + ", before it in this batch it is " +
             std::to_string(before));
      }
    }
    if (value.shape.empty()) {
      for (const Axis& axis : spec.shape) {
        const auto* size = std::get_if<int64_t>(&axis);
        value.shape.push_back(static_cast<executorch::aten::SizesType>(size ? *size : sizes_.at(*dynamic)));
      }
    }
  }

  void check_range(const TensorSpec& spec, int64_t number) {
    if (!spec.low || !spec.high || (spec.also && number == *spec.also)) {
      return;
    }
    const bool allowed = spec.choices.empty()
                             ? number >= *spec.low && number <= *spec.high
                             : std::count(spec.choices.begin(), spec.choices.end(), number) > 0;
    if (!allowed) {
      fail(spec.name + " has the value " + std::to_string(number) + ", outside " + std::to_string(*spec.low) + ".." +
           std::to_string(*spec.high));
    }
  }

  [[noreturn]] void fail(const std::string& problem) const {
    throw Failure(Exit::bad_data, path_.string() + ":" + std::to_string(line_) + ": " + problem);
  }

  const std::filesystem::path& path_;
  const Manifest& manifest_;
  std::vector<const TensorSpec*> specs_;  // the inputs, then the labels
  int64_t rows_ = 0;                      // of a batch
  std::map<std::string, int64_t> sizes_;  // dynamic sizes of this batch
  int64_t counted_ = 0;                   // labels of this batch
  size_t line_ = 1;
};

}  // namespace

executorch::extension::TensorPtr Value::tensor() {
  return executorch::extension::from_blob(data.data(), shape, type);
}

int64_t Value::integer(size_t place) const {
  int64_t value = 0;
  std::memcpy(&value, data.data() + place * sizeof(value), sizeof(value));
  return value;
}

std::vector<float> Value::floats() const {
  std::vector<float> values(data.size() / sizeof(float));
  std::memcpy(values.data(), data.data(), values.size() * sizeof(float));
  return values;
}

bool Value::is_zero(size_t place) const {
  const size_t size = executorch::runtime::elementSize(type);
  const auto first = data.begin() + static_cast<std::ptrdiff_t>(place * size);
  return std::all_of(first, first + static_cast<std::ptrdiff_t>(size), [](uint8_t byte) { return byte == 0; });
}

executorch::aten::ScalarType scalar_type(const TensorSpec& spec) {
  const auto found = kTypes.find(spec.dtype);
  if (found == kTypes.end()) {
    throw Failure(Exit::bad_program, "this host has no values of the type " + spec.dtype + ", as " + spec.name +
                                         " wants them");
  }
  return found->second;
}

std::vector<Batch> read_batches(const std::filesystem::path& path, const Manifest& manifest, Rows use) {
  return Reader(path, manifest).read(use);
}

}  // namespace host
