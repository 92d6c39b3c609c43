#include "run_folder.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "errors.h"
#include "files.h"
#include "json.h"
#include "sha256.h"

namespace host {
namespace {

// Safetensors: the length of a header as u64, the header as JSON, the data.
constexpr size_t kLengthBytes = sizeof(uint64_t);
constexpr char kName[] = "lora_b";

std::string_view bytes_of(const State& state) {
  return {reinterpret_cast<const char*>(state.data()), state.size() * sizeof(float)};
}

// SHA-256 over the metadata, the name, type and shape of the tensor, and its bytes, as Python writes them as text.
std::string checksum(const std::string& program, const std::string& step, std::string_view data) {
  const std::string described = "[('program', '" + program + "'), ('step', '" + step + "')]" + kName +
                                " torch.float32 [" + std::to_string(data.size() / sizeof(float)) + "]";
  Sha256 hash;
  hash.update(described.data(), described.size());
  hash.update(data.data(), data.size());
  return hexadecimal(hash.digest());
}

// A saved state, and after how many steps it was so. Throws `std::runtime_error`.
std::pair<State, size_t> read_state(const std::filesystem::path& path, const Program& program) {
  const std::string file = read_file(path);
  uint64_t length = 0;
  std::memcpy(&length, file.data(), std::min(file.size(), kLengthBytes));
  if (file.size() < kLengthBytes || length > file.size() - kLengthBytes) {
    throw std::runtime_error("it is cut off");
  }
  const Json header = Json::parse(std::string_view(file).substr(kLengthBytes, length));
  const Json &described = header.at("__metadata__"), &tensor = header.at(kName);
  const size_t wanted = program.manifest().state_size * sizeof(float);
  if (described.at("program").string() != hexadecimal(program.fingerprint()) || tensor.at("dtype").string() != "F32" ||
      tensor.at("shape").items().size() != 1) {
    throw std::runtime_error("it is of another program");
  }
  const auto& span = tensor.at("data_offsets").items();
  const std::string_view data = std::string_view(file).substr(kLengthBytes + length);
  if (span.size() != 2 || span[0].integer() != 0 || span[1].integer() != static_cast<int64_t>(wanted) ||
      data.size() != wanted || described.at("sha256").string() !=
                                   checksum(described.at("program").string(), described.at("step").string(), data)) {
    throw std::runtime_error("it is damaged: its checksum is another");
  }
  State state(program.manifest().state_size);
  std::memcpy(state.data(), data.data(), wanted);
  return {state, std::stoul(described.at("step").string())};
}

}  // namespace

void write_state(const std::filesystem::path& path, const Program& program, size_t step) {
  const State state = program.state();
  const std::string_view data = bytes_of(state);
  const std::string fingerprint = hexadecimal(program.fingerprint()), number = std::to_string(step);
  std::string header = "{\"__metadata__\":{\"program\":\"" + fingerprint + "\",\"sha256\":\"" +
                       checksum(fingerprint, number, data) + "\",\"step\":\"" + number + "\"},\"" + kName +
                       "\":{\"dtype\":\"F32\",\"shape\":[" + std::to_string(state.size()) + "],\"data_offsets\":[0," +
                       std::to_string(data.size()) + "]}}";
  header.resize((header.size() + kLengthBytes - 1) / kLengthBytes * kLengthBytes, ' ');  // the data is aligned
  const uint64_t length = header.size();
  std::string file(reinterpret_cast<const char*>(&length), kLengthBytes);
  file += header;
  file += data;
  try {
    write_whole_file(path, file, 0600);  // it has learned from somebody's data
  } catch (const std::runtime_error& error) {
    throw Failure(Exit::bad_run, error.what());
  }
}

std::unique_ptr<Journal> open_journal(const std::filesystem::path& folder, const Program& program) {
  if (std::error_code none; std::filesystem::file_size(folder / kJournal, none) == 0 && !none &&
                            std::filesystem::exists(folder / kSnapshot)) {
    throw Failure(Exit::bad_run, (folder / kJournal).string() + ": the journal is empty, but there is a " + kSnapshot +
                                     " of later steps: it was lost");
  }
  const Manifest& manifest = program.manifest();
  auto journal =
      std::make_unique<Journal>(folder / kJournal, program.fingerprint(), manifest.queries, manifest.parameters);
  if (journal->was_empty()) {
    std::fputs("warning: the journal is empty, and is begun anew\n", stderr);
  }
  if (journal->cut_bytes() > 0) {
    std::fprintf(stderr, "warning: the last %zu bytes of the journal were not a whole step and have been cut off; %zu "
                 "steps are left\n", journal->cut_bytes(), journal->records().size());
  }
  return journal;
}

void restore(const std::filesystem::path& folder, const std::vector<Record>& records, Program& program) {
  std::vector<std::string> problems;
  for (const char* name : {kSnapshot, kStart}) {
    const std::filesystem::path path = folder / name;
    if (!std::filesystem::exists(path)) {
      continue;
    }
    try {
      const auto [state, step] = read_state(path, program);
      if (step > records.size()) {
        throw std::runtime_error("it is of step " + std::to_string(step) + ", the journal has " +
                                 std::to_string(records.size()) + " steps");
      }
      if (step < records.size() && !program.replays()) {
        throw Failure(Exit::bad_run, folder.string() + ": the last " + std::to_string(records.size() - step) +
                                         " steps are not in a saved state, and steps of this program cannot be " +
                                         "replayed; finetune in Python with the same batches makes them again" +
                                         (problems.empty() ? "" : " (" + problems.back() + ")"));
      }
      program.load_state(state);
      for (size_t i = step; i < records.size(); ++i) {
        if (std::isfinite(records[i].loss)) {  // else the step was void
          program.replay(records[i].seed, records[i].projected_gradient, records[i].learning_rate);
        }
      }
      for (const std::string& problem : problems) {
        std::fprintf(stderr, "warning: %s; replaying from the start\n", problem.c_str());
      }
      return;
    } catch (const Failure&) {
      throw;
    } catch (const std::exception& error) {  // a number that is none, too
      problems.push_back(path.string() + ": " + error.what());
    }
  }
  throw Failure(Exit::bad_run, problems.empty() ? (folder / kStart).string() + ": the run has lost its saved states"
                                                : problems.back());
}

}  // namespace host
