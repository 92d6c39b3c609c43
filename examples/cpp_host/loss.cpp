#include "loss.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "errors.h"

namespace host {
namespace {

void expect_shape(const Output& output, size_t axes, size_t rows, const char* what) {
  if (output.shape.size() != axes || output.shape[0] != rows) {
    throw Failure(Exit::bad_program, "evaluate does not return " + std::string(what) + " for each row of the labels");
  }
}

size_t place_of(const std::vector<int64_t>& choices, int64_t label) {
  return static_cast<size_t>(std::find(choices.begin(), choices.end(), label) - choices.begin());
}

}  // namespace

std::vector<double> log_softmax(const std::vector<float>& values) {
  const double most = *std::max_element(values.begin(), values.end());
  double sum = 0;
  for (const float value : values) {
    sum += std::exp(value - most);
  }
  std::vector<double> result;
  for (const float value : values) {
    result.push_back(value - most - std::log(sum));
  }
  return result;
}

bool ignored(const Manifest& manifest, int64_t label) {
  return manifest.labels.also && label == *manifest.labels.also;
}

std::vector<float> last_axis(const Output& output, size_t first) {
  const size_t size = output.shape.empty() ? 0 : output.shape.back();
  if (size == 0 || first + size > output.values.size()) {
    throw Failure(Exit::bad_program, "evaluate returns fewer values than its labels need");
  }
  const auto start = output.values.begin() + static_cast<std::ptrdiff_t>(first);
  return {start, start + static_cast<std::ptrdiff_t>(size)};
}

std::vector<float> among(const std::vector<float>& logits, const std::vector<int64_t>& choices) {
  std::vector<float> chosen;
  for (const int64_t choice : choices) {
    if (choice < 0 || static_cast<size_t>(choice) >= logits.size()) {
      throw Failure(Exit::bad_program, "the choice " + std::to_string(choice) + " is outside of the vocabulary");
    }
    chosen.push_back(logits[static_cast<size_t>(choice)]);
  }
  return chosen;
}

Loss::Loss(const Manifest& manifest) : manifest_(manifest), kind_(kind(manifest.loss)) {
  const bool needs_choices = kind_ == Kind::choice && manifest.labels.choices.size() < 2;
  const bool needs_numbers = kind_ != Kind::squares && manifest.labels.dtype != "int64";
  if (needs_choices || needs_numbers || (kind_ == Kind::squares && manifest.labels.dtype != "float32")) {
    throw Failure(Exit::bad_program, "the labels are not those of the loss " + manifest.loss);
  }
}

Loss::Kind Loss::kind(const std::string& name) {
  if (name == "causal-lm" || name == "masked-lm") {
    return Kind::tokens;
  }
  if (name == "choice") {
    return Kind::choice;
  }
  if (name == "sequence-classification") {
    return Kind::classes;
  }
  if (name == "mse") {
    return Kind::squares;
  }
  throw Failure(Exit::bad_program, "the program's loss is " + name + "; this host computes causal-lm, masked-lm, "
                                   "choice, sequence-classification and mse: measure it with Session in Python");
}

RowLoss Loss::row(const Output& output, const Value& labels, size_t row) const {
  switch (kind_) {
    case Kind::classes: return of_classes(output, labels, row);
    case Kind::squares: return of_squares(output, labels, row);
    default: return of_tokens(output, labels, row);
  }
}

// Where the loss shifts by one token, the label at t is predicted at t - 1, and the first never counts.
RowLoss Loss::of_tokens(const Output& output, const Value& labels, size_t row) const {
  const auto tokens = static_cast<size_t>(labels.shape.at(1));
  expect_shape(output, 3, static_cast<size_t>(labels.shape[0]), "logits [rows, tokens, vocabulary]");
  if (output.shape[1] != tokens) {
    throw Failure(Exit::bad_program, "evaluate returns logits of " + std::to_string(output.shape[1]) + " tokens; the "
                                     "labels have " + std::to_string(tokens));
  }
  RowLoss found;
  for (size_t place = manifest_.first_label; place < tokens; ++place) {
    const int64_t label = labels.integer(row * tokens + place);
    if (ignored(manifest_, label)) {
      continue;
    }
    const auto logits = last_axis(output, (row * tokens + place - manifest_.first_label) * output.shape[2]);
    const auto& choices = manifest_.labels.choices;
    found.sum -= kind_ == Kind::choice ? log_softmax(among(logits, choices)).at(place_of(choices, label))
                                       : log_softmax(logits).at(static_cast<size_t>(label));
    ++found.count;
  }
  return found;
}

RowLoss Loss::of_classes(const Output& output, const Value& labels, size_t row) const {
  expect_shape(output, 2, static_cast<size_t>(labels.shape.at(0)), "logits [rows, classes]");
  const int64_t label = labels.integer(row);
  if (ignored(manifest_, label)) {
    return {};
  }
  return {-log_softmax(last_axis(output, row * output.shape[1])).at(static_cast<size_t>(label)), 1};
}

RowLoss Loss::of_squares(const Output& output, const Value& labels, size_t row) const {
  const std::vector<float> wanted = labels.floats();
  expect_shape(output, labels.shape.size(), static_cast<size_t>(labels.shape.at(0)), "a value");
  if (output.values.size() != wanted.size()) {
    throw Failure(Exit::bad_program, "evaluate returns " + std::to_string(output.values.size()) + " values; there " +
                                         "are " + std::to_string(wanted.size()) + " labels");
  }
  const size_t size = wanted.size() / output.shape[0];
  double sum = 0;
  for (size_t i = row * size; i < (row + 1) * size; ++i) {
    const double error = static_cast<double>(output.values[i]) - wanted[i];
    sum += error * error;
  }
  return {sum / static_cast<double>(size), 1};
}

}  // namespace host
