#include "trained.h"

#include <filesystem>

#include "probe.h"
#include "quiet.h"
#include "run_folder.h"
#include "threads.h"

namespace host {
namespace {

void load_run(const std::filesystem::path& folder, Program& program) {
  if (!std::filesystem::exists(folder / kJournal)) {
    throw Failure(Exit::bad_run, folder.string() + ": there is no run in this folder");
  }
  const auto journal = open_journal(folder, program);
  if (journal->records().empty() && !std::filesystem::exists(folder / kStart)) {
    return;  // it was killed before anything was written
  }
  restore(folder, journal->records(), program);
}

}  // namespace

const std::set<std::string>& trained_options() {
  static const std::set<std::string> names = {"--run", "--load", "--threads"};
  return names;
}

std::unique_ptr<Program> open_trained(const Arguments& arguments, Use use) {
  const std::string *run = arguments.find("--run"), *load = arguments.find("--load");
  if (run != nullptr && load != nullptr) {
    throw Failure(Exit::bad_arguments, "--run and --load exclude each other: the state comes from one of them");
  }
  if (arguments.quiet) {
    silence_runtime();
  }
  if (const std::string* threads = arguments.find("--threads")) {
    set_threads(thread_count(*threads));
  }
  const std::filesystem::path file = arguments.places.at(0);
  State state;  // of a file; before the program is there, where another one has to be loaded to see what it does
  if (load != nullptr && use != Use::evaluate) {
    state = probed_state(file, *load, arguments.quiet);
  }
  auto program = std::make_unique<Program>(file, use);
  if (run != nullptr) {
    load_run(*run, *program);
  } else if (load != nullptr) {
    program->load_state(use == Use::evaluate ? probed_state(*program, *load, arguments.quiet) : state);
  }
  return program;
}

}  // namespace host
