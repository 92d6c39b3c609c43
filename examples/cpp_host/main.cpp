// Fine-tune a program on the ExecuTorch runtime, with forward passes only, in a folder that survives kills.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "errors.h"
#include "evaluate.h"
#include "generate.h"
#include "journal.h"
#include "limits.h"
#include "predict.h"
#include "probe.h"
#include "program.h"
#include "quiet.h"
#include "run_folder.h"
#include "sha256.h"
#include "state_file.h"
#include "threads.h"
#include "tokens.h"
#include "verify.h"

namespace {

using host::Exit;
using host::Failure;

constexpr char kUsage[] =
    "usage: mobizo_host PROGRAM TOKENS RUN --steps N --learning-rate X [options]\n"
    "       mobizo_host evaluate PROGRAM TOKENS [--run RUN | --load FILE.ptd] [--threads N] [--quiet]\n"
    "       mobizo_host predict PROGRAM TOKENS [--run RUN | --load FILE.ptd] [--threads N] [--quiet]\n"
    "       mobizo_host generate PROGRAM --prompt \"1 2 3\" --steps N [--stop \"2 0\"]\n"
    "                   [--run RUN | --load FILE.ptd] [--threads N] [--quiet]\n"
    "       mobizo_host verify PROGRAM BUNDLE [--threads N] [--quiet]\n"
    "\n"
    "Without a verb it trains:\n"
    "\n"
    "  PROGRAM            a .pte of mobizo-compiler\n"
    "  TOKENS             the batches; see tokens.h\n"
    "  RUN                a folder for the journal and the saved states, made if there is none; a run that is in it\n"
    "                     goes on where it was\n"
    "  --steps N          steps that the run has in the end, those of earlier calls included\n"
    "  --learning-rate X\n"
    "  --seed N           with the step's number, it gives the seed of the step (0)\n"
    "  --eps X            size of the perturbation (what suits the program)\n"
    "  --load FILE.ptd    the state that a new run starts from (the program's, which is zero)\n"
    "  --save FILE.ptd    write the state at the end\n"
    "  --minutes X        stop after the step in which so many minutes are over; the same call goes on later\n"
    "  --battery X        the same when its charge falls below so many percent and it is not being charged\n"
    "  --temperature X    the same when a part of the machine is hotter than so many degrees Celsius\n"
    "  --threads N        threads of the kernels (the runtime's choice)\n"
    "  --quiet            print nothing but warnings and errors, and hold back what the runtime logs\n"
    "\n"
    "With a verb it reads what was learned: that of a run, of a .ptd file, or else the program as it was compiled.\n"
    "\n"
    "  evaluate           the mean loss of all labels of the token file\n"
    "  predict            for every row of the token file, the answer and the probabilities of all answers\n"
    "  generate           token ids that go on with a prompt, as they come: the most likely ones\n"
    "  --prompt IDS       token ids with spaces in between\n"
    "  --steps N          most tokens to generate\n"
    "  --stop IDS         token ids that end the text (those of the program)\n"
    "\n"
    "  verify             whether the program computes on this processor what it computed where `mobizo bundle` ran\n"
    "\n"
    "exit codes: 2 arguments, 3 program, 4 token file or .ptd file, 5 run folder, 6 the run is open elsewhere, 7 other numbers\n";

// What has a first argument of its own; each gets those behind it.
const std::map<std::string, void (*)(const std::vector<std::string>&)> kVerbs = {
    {"evaluate", host::evaluate}, {"generate", host::generate}, {"predict", host::predict}, {"verify", host::verify}};

constexpr size_t kSnapshotEvery = 200;

struct Options {
  std::filesystem::path program, tokens, run;
  std::optional<uint32_t> steps;
  std::optional<float> learning_rate;
  uint64_t seed = 0;
  std::optional<float> eps;
  std::filesystem::path load, save;
  host::Limits limits;
  std::optional<uint32_t> threads;
  bool quiet = false;
};

Options parse(int count, char** arguments) {
  Options options;
  std::vector<std::filesystem::path> places;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name.compare(0, 2, "--") != 0) {
      places.emplace_back(name);
      continue;
    }
    if (name == "--quiet") {
      options.quiet = true;
      continue;
    }
    if (i + 1 == count) {
      throw Failure(Exit::bad_arguments, name + " needs a value");
    }
    const std::string value = arguments[++i];
    if (name == "--steps") {
      options.steps = host::number<uint32_t>(name, value);
    } else if (name == "--learning-rate") {
      options.learning_rate = host::real(name, value);
    } else if (name == "--seed") {
      options.seed = host::number<uint64_t>(name, value);
    } else if (name == "--eps") {
      options.eps = host::real(name, value);
      if (!(*options.eps > 0)) {
        throw Failure(Exit::bad_arguments, "--eps is " + value + "; it must be above 0");
      }
    } else if (name == "--minutes" || name == "--battery" || name == "--temperature") {
      const float limit = host::real(name, value);
      if (!(limit > 0) || (name == "--battery" && limit > 100)) {
        throw Failure(Exit::bad_arguments, name + " is " + value + "; it must be above 0" +
                                               (name == "--battery" ? ", and at most 100" : ""));
      }
      (name == "--minutes"   ? options.limits.minutes
       : name == "--battery" ? options.limits.battery
                             : options.limits.temperature) = limit;
    } else if (name == "--load") {
      options.load = value;
    } else if (name == "--save") {
      options.save = value;
    } else if (name == "--threads") {
      options.threads = host::thread_count(value);
    } else {
      throw Failure(Exit::bad_arguments, "there is no option " + name);
    }
  }
  if (places.size() != 3) {
    throw Failure(Exit::bad_arguments, "a program, a token file and a run folder are needed");
  }
  if (!options.steps || !options.learning_rate) {
    throw Failure(Exit::bad_arguments, options.steps ? "--learning-rate is needed" : "--steps is needed");
  }
  options.program = places[0];
  options.tokens = places[1];
  options.run = places[2];
  return options;
}

// 31 bits of SHA-256 over the run's seed and the step's number, as `step_seed` in Python.
uint32_t step_seed(uint64_t seed, size_t step) {
  const auto digest = host::Sha256::of(std::to_string(seed) + " " + std::to_string(step));
  uint32_t value;
  std::memcpy(&value, digest.data(), sizeof(value));
  return value & 0x7fffffff;
}

// The highest resident memory of this process so far.
std::string peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.compare(0, 6, "VmHWM:") == 0) {
      return line.substr(line.find_first_of("0123456789"));
    }
  }
  return "unknown";
}

// What the host says on its way; warnings and errors go elsewhere.
class Talk {
 public:
  explicit Talk(bool quiet) : quiet_(quiet) {}

  __attribute__((format(printf, 2, 3))) void operator()(const char* format, ...) const {
    if (quiet_) {
      return;
    }
    std::va_list values;
    va_start(values, format);
    std::vprintf(format, values);
    va_end(values);
    std::fflush(stdout);
  }

 private:
  bool quiet_;
};

void train(const Options& options) {
  if (options.quiet) {
    host::silence_runtime();
  }
  const Talk say(options.quiet);
  if (options.threads) {
    host::set_threads(*options.threads);
  }
  host::State given;  // before the program is there, because another one has to be loaded to see what it does
  if (!options.load.empty() && !std::filesystem::exists(options.run / host::kStart)) {
    given = host::probed_state(options.program, options.load, options.quiet);
  }
  host::Program program(options.program, host::Use::train);
  const host::Manifest& manifest = program.manifest();
  auto batches = host::read_batches(options.tokens, manifest, host::Rows::to_train);
  const float eps = options.eps.value_or(manifest.eps);
  say("%zu parameters, %u queries, %zu batches, eps %g\n", manifest.parameters, manifest.queries, batches.size(),
      static_cast<double>(eps));

  std::error_code problem;
  std::filesystem::create_directories(options.run, problem);
  if (std::error_code unknown; !std::filesystem::is_directory(options.run, unknown)) {
    throw Failure(Exit::bad_run, options.run.string() + ": " + (problem ? problem.message() : "this is no folder"));
  }
  if (std::filesystem::exists(options.run / host::kPrivacy)) {
    throw Failure(Exit::bad_run, options.run.string() + ": the run is private, and a step without noise would tell what "
                                 "it must not; go on with it in Python");
  }
  const auto opened = host::open_journal(options.run, program);
  host::Journal& journal = *opened;
  if (journal.records().empty() && !std::filesystem::exists(options.run / host::kStart)) {
    if (!options.load.empty()) {
      program.load_state(given);
    }
    host::write_state(options.run / host::kStart, program, 0);
  } else {
    if (!options.load.empty()) {
      std::fprintf(stderr, "warning: the run has begun, and goes on from its own state, not from %s\n",
                   options.load.c_str());
    }
    host::restore(options.run, journal.records(), program);
    say("the run has %zu steps\n", journal.records().size());
  }

  const size_t resumed_at = journal.records().size();
  host::Watch watch(options.limits);
  for (size_t step = resumed_at; step < *options.steps; ++step) {
    if (const auto reason = watch.reason()) {
      std::fprintf(stderr, "%s after step %zu of %u; the same call goes on from there\n", reason->c_str(), step,
                   *options.steps);
      break;
    }
    const uint32_t seed = step_seed(options.seed, step);
    auto result = program.train_step(batches[step % batches.size()], seed, *options.learning_rate, eps);
    bool finite = true;
    for (const float g : result.projected_gradient) {
      finite = finite && std::isfinite(g);
    }
    if (!finite) {  // the program left the state as it is
      result.projected_gradient.assign(result.projected_gradient.size(), 0.0f);
      if (std::isfinite(result.loss)) {
        result.loss = std::nanf("");  // what says in the journal that the step was void
      }
    }
    journal.append({static_cast<uint32_t>(step), seed, *options.learning_rate, eps, result.loss,
                    result.projected_gradient});
    say("step %zu loss %.6f%s\n", step, static_cast<double>(result.loss),
        finite ? "" : " (not finite: nothing was changed)");
    if ((step + 1) % kSnapshotEvery == 0 && step + 1 < *options.steps) {
      host::write_state(options.run / host::kSnapshot, program, step + 1);
    }
  }
  if (journal.records().size() > resumed_at) {
    host::write_state(options.run / host::kSnapshot, program, journal.records().size());
  }
  if (!options.save.empty()) {
    host::save_ptd(options.save, program);
    say("state saved to %s\n", options.save.c_str());
  }
  say("peak memory %s\n", peak_memory().c_str());
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "--help") == 0) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    const std::string verb = count > 1 ? arguments[1] : "";
    const auto found = kVerbs.find(verb);
    if (found == kVerbs.end()) {
      train(parse(count, arguments));
    } else {
      found->second({arguments + 2, arguments + count});
      if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
        throw std::runtime_error("what was found could not be written to stdout");
      }
    }
    return 0;
  } catch (const Failure& failure) {
    std::fprintf(stderr, "error: %s\n", failure.what());
    if (failure.code == Exit::bad_arguments) {
      std::fprintf(stderr, "\n%s", kUsage);
    }
    return static_cast<int>(failure.code);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
