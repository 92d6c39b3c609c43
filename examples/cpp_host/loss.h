// Losses of rows from what the model returns, for the kinds of loss that this host knows.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "manifest.h"
#include "program.h"
#include "tokens.h"

namespace host {

// The sum of the losses of a row, and their number.
struct RowLoss {
  double sum = 0;
  size_t count = 0;
};

// log(softmax(values)), in double.
std::vector<double> log_softmax(const std::vector<float>& values);

class Loss {
 public:
  // Throws `Failure` with the names of the kinds that there are where the program's is another one.
  explicit Loss(const Manifest& manifest);

  // Of one row of a batch: the output of the model that the loss is of, the batch's labels, and which row.
  RowLoss row(const Output& output, const Value& labels, size_t row) const;

 private:
  enum class Kind { tokens, choice, classes, squares };

  static Kind kind(const std::string& name);
  RowLoss of_tokens(const Output& output, const Value& labels, size_t row) const;
  RowLoss of_classes(const Output& output, const Value& labels, size_t row) const;
  RowLoss of_squares(const Output& output, const Value& labels, size_t row) const;

  const Manifest& manifest_;
  Kind kind_;
};

// Whether a label does not count.
bool ignored(const Manifest& manifest, int64_t label);

// Values `first` and on of an output, as many as its last axis has. Throws `Failure` where they are not there.
std::vector<float> last_axis(const Output& output, size_t first);

// The logits of the choices among those of the vocabulary.
std::vector<float> among(const std::vector<float>& logits, const std::vector<int64_t>& choices);

}  // namespace host
