#include "evaluate.h"

#include <cstdio>

#include "loss.h"
#include "tokens.h"
#include "trained.h"

namespace host {

void evaluate(const std::vector<std::string>& words) {
  const Arguments arguments = split_arguments(words, trained_options());
  if (arguments.places.size() != 2) {
    throw Failure(Exit::bad_arguments, "evaluate needs a program and a token file");
  }
  const auto program = open_trained(arguments, Use::evaluate);
  const Loss loss(program->manifest());
  RowLoss total;
  size_t rows = 0;
  for (Batch& batch : read_batches(arguments.places[1], program->manifest(), Rows::to_read)) {
    const Output output = program->evaluate(batch);
    for (size_t row = 0; row < batch.rows; ++row) {
      const RowLoss one = loss.row(output, batch.labels, row);
      total.sum += one.sum;
      total.count += one.count;
    }
    rows += batch.rows;
  }
  if (total.count == 0) {
    throw Failure(Exit::bad_data, arguments.places[1] + ": nothing is labelled, so that there is no loss; label the "
                                  "rows, or let predict say what they are");
  }
  std::printf("loss %.6f of %zu labels in %zu rows\n", total.sum / static_cast<double>(total.count), total.count, rows);
}

}  // namespace host
