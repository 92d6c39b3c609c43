#include "state_file.h"

#include <executorch/extension/data_loader/file_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/flat_tensor/serialize/flat_tensor_header.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "checksum.h"
#include "errors.h"
#include "files.h"

namespace host {
namespace {

using executorch::extension::FileDataLoader;
using executorch::extension::FlatTensorDataMap;
using executorch::extension::FlatTensorHeader;

constexpr char kKey[] = "mobizo_lora_b";
constexpr char kFingerprint[] = "mobizo_fingerprint";
constexpr size_t kTables = 48;  // where the flatbuffer goes on after ExecuTorch's header
constexpr size_t kData = 256;   // where it ends, and the data begins

// What is in front of the data. The wheel has no writer (`flat_tensor::save_ptd` is in no header and no library of it),
// and this flatbuffer is always the same but for two numbers, so it is written here at fixed places. The schema is
// extension/flat_tensor/serialize/flat_tensor.fbs. In a flatbuffer an offset counts from where it stands; a table
// begins with the distance back to its vtable, which lists its own size, that of the table, and where each field is (0:
// it has its default); and every number stands at a multiple of its size.
std::string flat_tensor_front(size_t parameters) {
  std::string front(kData, '\0');
  const auto put = [&front](size_t at, auto value) { std::memcpy(&front[at], &value, sizeof(value)); };
  const auto put_offset = [&put](size_t at, uint32_t target) { put(at, target - static_cast<uint32_t>(at)); };
  const auto put_table = [&put](size_t at, std::initializer_list<uint16_t> vtable, int32_t table) {
    put(static_cast<size_t>(table), table - static_cast<int32_t>(at));
    for (const uint16_t entry : vtable) {
      put(at, entry);
      at += sizeof(entry);
    }
  };
  put_offset(0, 60);
  front.replace(4, 4, "FT01");
  front.replace(8, FlatTensorHeader::kMagicSize, FlatTensorHeader::kMagic, FlatTensorHeader::kMagicSize);
  put(12, FlatTensorHeader::kHeaderExpectedLength);
  put(16, uint64_t{kTables});
  put(24, uint64_t{kData - kTables});
  put(32, uint64_t{kData});
  put(40, uint64_t{parameters * sizeof(float)});

  put_table(48, {10, 12, 0, 4, 8}, 60);  // FlatTensor: version 0, segments, named_data
  put_offset(64, 72);
  put_offset(68, 104);
  put(72, uint32_t{1});  // one segment
  put_offset(76, 88);
  put_table(80, {8, 16, 0, 8}, 88);  // DataSegment: offset 0, size
  put(96, uint64_t{parameters * sizeof(float)});
  put(104, uint32_t{1});  // one name
  put_offset(108, 124);
  put_table(112, {10, 12, 4, 0, 8}, 124);  // NamedData: key, segment_index 0, tensor_layout
  put_offset(128, 180);
  put_offset(132, 148);
  put_table(136, {10, 13, 12, 4, 8}, 148);  // TensorLayout: scalar_type, sizes, dim_order
  put_offset(152, 164);
  put_offset(156, 172);
  put(160, static_cast<int8_t>(executorch::aten::ScalarType::Float));
  put(164, uint32_t{1});  // one size
  put(168, static_cast<int32_t>(parameters));
  put(172, uint32_t{1});  // one axis, 0
  put(180, static_cast<uint32_t>(sizeof(kKey) - 1));
  front.replace(184, sizeof(kKey), kKey, sizeof(kKey));
  return front;
}

}  // namespace

void save_ptd(const std::filesystem::path& path, const State& state) {
  std::string data = flat_tensor_front(state.size());
  data.append(reinterpret_cast<const char*>(state.data()), state.size() * sizeof(float));
  try {
    write_whole_file(path, sealed(std::move(data)));
  } catch (const std::runtime_error& error) {
    throw Failure(Exit::bad_data, error.what());
  }
}

State load_ptd(const std::filesystem::path& path, const Program& program) {
  const size_t size = program.manifest().state_size;
  const auto fail = [&path](const std::string& problem) {
    return Failure(Exit::bad_data, path.string() + ": " + problem);
  };
  try {
    check_file(path);
  } catch (const std::runtime_error& error) {
    throw fail(error.what());
  }
  auto loader = FileDataLoader::from(path.c_str(), alignof(std::max_align_t));
  if (!loader.ok()) {
    throw fail("it cannot be read");
  }
  const auto tensors = FlatTensorDataMap::load(&*loader);
  if (!tensors.ok()) {
    throw fail("this is no .ptd file");
  }
  const auto layout = tensors->get_tensor_layout(kKey);
  if (!layout.ok() || layout->scalar_type() != executorch::aten::ScalarType::Float ||
      layout->nbytes() != size * sizeof(float)) {
    throw fail("it has no tensor " + std::string(kKey) + " of " + std::to_string(size) + " float32");
  }
  if (auto fingerprint = tensors->get_data(kFingerprint); fingerprint.ok()) {
    const Sha256::Digest& wanted = program.fingerprint();
    if (fingerprint->size() != wanted.size() || std::memcmp(fingerprint->data(), wanted.data(), wanted.size()) != 0) {
      throw fail("it has the state of another program");
    }
  }
  State state(size);
  if (tensors->load_data_into(kKey, state.data(), layout->nbytes()) != executorch::runtime::Error::Ok) {
    throw fail("it cannot be read");
  }
  if (!std::all_of(state.begin(), state.end(), [](float value) { return std::isfinite(value); })) {
    throw fail("the state has values that are not finite");
  }
  return state;
}

}  // namespace host
