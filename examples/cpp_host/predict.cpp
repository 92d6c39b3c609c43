#include "predict.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>

#include "loss.h"
#include "tokens.h"
#include "trained.h"

namespace host {
namespace {

// The program's answers, one of which it gives to every row.
class Chooser {
 public:
  explicit Chooser(const Manifest& manifest) : manifest_(manifest), choices_(manifest.labels.choices) {
    if (manifest.loss != "choice" && manifest.loss != "sequence-classification") {
      throw Failure(Exit::bad_program, "the program's loss is " + manifest.loss + ", whose answers are no closed set; "
                                       "predict is for those compiled with ChoiceLoss or SequenceClassificationLoss, "
                                       "and evaluate measures others");
    }
    const bool tokens = manifest.loss == "choice";
    const size_t count = tokens ? choices_.size() : static_cast<size_t>(manifest.labels.high.value_or(-1) + 1);
    const size_t named = manifest.answers.size();
    if (count == 0 || (tokens && manifest.labels.shape.size() != 2) || (named != 0 && named != count)) {
      throw Failure(Exit::bad_program, "the manifest has " + std::to_string(named) + " names for " +
                                           std::to_string(count) + " answers");
    }
    for (size_t i = 0; i < count; ++i) {
      names_.push_back(named ? manifest.answers[i] : std::to_string(tokens ? choices_[i] : static_cast<int64_t>(i)));
    }
  }

  const std::vector<std::string>& names() const { return names_; }

  // The probability of each answer to a row of a batch; `line` is the one of the file that it stands in.
  std::vector<double> probabilities(const Output& output, const Batch& batch, size_t row, size_t line) const {
    std::vector<float> logits;
    if (choices_.empty()) {
      logits = last_axis(output, row * output.shape.back());
    } else {
      const auto tokens = static_cast<size_t>(batch.labels.shape.at(1));
      if (output.shape.size() != 3 || output.shape[1] != tokens) {
        throw Failure(Exit::bad_program, "evaluate does not return logits [rows, tokens, vocabulary]");
      }
      logits = among(last_axis(output, (row * tokens + asked_at(batch, row, line)) * output.shape[2]), choices_);
    }
    if (logits.size() != names_.size()) {
      throw Failure(Exit::bad_program, "evaluate returns " + std::to_string(logits.size()) + " logits of a row for " +
                                           std::to_string(names_.size()) + " answers");
    }
    if (std::any_of(logits.begin(), logits.end(), [](float value) { return std::isnan(value); })) {
      throw Failure(Exit::bad_program, "the logits of line " + std::to_string(line) + " are no numbers; the state " +
                                           "may be one that a learning rate was too high for");
    }
    std::vector<double> found = log_softmax(logits);
    std::transform(found.begin(), found.end(), found.begin(), [](double value) { return std::exp(value); });
    return found;
  }

 private:
  // The token that the answer follows: the one before the label, or where nothing is labelled, the last of the row.
  size_t asked_at(const Batch& batch, size_t row, size_t line) const {
    const auto tokens = static_cast<size_t>(batch.labels.shape[1]);
    std::optional<size_t> labelled;
    for (size_t place = manifest_.first_label; place < tokens; ++place) {
      if (!ignored(manifest_, batch.labels.integer(row * tokens + place))) {
        if (labelled) {
          throw Failure(Exit::bad_data, "line " + std::to_string(line) + " has more than one label, so that it is " +
                                            "unclear where the answer is; label the token of the answer, or none");
        }
        labelled = place;
      }
    }
    return labelled ? *labelled - manifest_.first_label : last_token(batch, row, tokens, line);
  }

  size_t last_token(const Batch& batch, size_t row, size_t tokens, size_t line) const {
    for (size_t i = 0; i < manifest_.inputs.size(); ++i) {
      if (manifest_.inputs[i].name != "attention_mask" || batch.inputs[i].shape != batch.labels.shape) {
        continue;
      }
      for (size_t place = tokens; place-- > 0;) {
        if (!batch.inputs[i].is_zero(row * tokens + place)) {
          return place;
        }
      }
      throw Failure(Exit::bad_data, "line " + std::to_string(line) + " has no token: its attention_mask is all 0");
    }
    return tokens - 1;
  }

  const Manifest& manifest_;
  const std::vector<int64_t>& choices_;
  std::vector<std::string> names_;
};

// The text in one cell of a line: what would end the cell or the line is written as \t, \n, \r, and \ as two of them.
std::string cell(const std::string& text) {
  std::string result;
  for (const char letter : text) {
    switch (letter) {
      case '\t': result += "\\t"; break;
      case '\n': result += "\\n"; break;
      case '\r': result += "\\r"; break;
      case '\\': result += "\\\\"; break;
      default: result += letter;
    }
  }
  return result;
}

}  // namespace

void predict(const std::vector<std::string>& words) {
  const Arguments arguments = split_arguments(words, trained_options());
  if (arguments.places.size() != 2) {
    throw Failure(Exit::bad_arguments, "predict needs a program and a token file");
  }
  const auto program = open_trained(arguments, Use::evaluate);
  const Chooser chooser(program->manifest());
  auto batches = read_batches(arguments.places[1], program->manifest(), Rows::to_read);
  std::string text = "predicted";
  for (const std::string& name : chooser.names()) {
    text += "\tp_" + cell(name);
  }
  std::printf("%s\n", text.c_str());
  size_t line = 2;  // behind the names of the columns
  for (Batch& batch : batches) {
    const Output output = program->evaluate(batch);
    for (size_t row = 0; row < batch.rows; ++row, ++line) {
      const std::vector<double> chances = chooser.probabilities(output, batch, row, line);
      const auto best = std::max_element(chances.begin(), chances.end()) - chances.begin();
      std::printf("%s", cell(chooser.names()[static_cast<size_t>(best)]).c_str());
      for (const double chance : chances) {
        std::printf("\t%.6g", chance);
      }
      std::printf("\n");
    }
  }
}

}  // namespace host
