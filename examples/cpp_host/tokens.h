// The token file: plain text, one row of a batch in a line. `write_tokens.py` writes it.
//
//     input_ids       attention_mask  labels              names of the program's inputs and labels, tabs in between
//     5 9 2 7         1 1 1 1         -100 -100 -100 7    the values of a row, spaces in between
//
// As many lines as the program has rows make a batch, and every step takes the next one, from the front again after
// the last.
#pragma once

#include <executorch/extension/tensor/tensor.h>

#include <cstdint>
#include <filesystem>
#include <vector>

#include "manifest.h"

namespace host {

// One input of a method, with its data.
struct Value {
  executorch::aten::ScalarType type;
  std::vector<executorch::aten::SizesType> shape;
  std::vector<uint8_t> data;

  executorch::extension::TensorPtr tensor();  // a view; no copy
  int64_t integer(size_t place) const;        // of int64
  std::vector<float> floats() const;          // of float32
  bool is_zero(size_t place) const;
};

struct Batch {
  std::vector<Value> inputs;
  Value labels;
  size_t rows = 0;  // that are in the file; the last one again stands for those that are missing
};

enum class Rows {
  to_train,  // whole batches, each with a label
  to_read,   // any number of rows, which need no labels
};

// The type of an input's values. Throws `Failure` where this host has no values of it.
executorch::aten::ScalarType scalar_type(const TensorSpec& spec);

// All batches of a file, checked against the manifest, because not every kernel checks: a token or a label out of range
// may read foreign memory. Throws `Failure` with the line and the column.
std::vector<Batch> read_batches(const std::filesystem::path& path, const Manifest& manifest, Rows use);

}  // namespace host
