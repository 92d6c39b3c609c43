// What goes wrong, and the exit code that says so.
#pragma once

#include <stdexcept>
#include <string>

namespace host {

enum class Exit : int {
  bad_arguments = 2,
  bad_program = 3,  // no program of this compiler, or one that this host cannot run
  bad_data = 4,     // the token file, or a state to load or save
  bad_run = 5,      // the run folder: damaged, of another program, or not writable
  locked = 6,       // somebody else trains in the run folder
  other_numbers = 7,  // a program computes other numbers here than where it was compiled
};

class Failure : public std::runtime_error {
 public:
  Failure(Exit exit_code, const std::string& message) : std::runtime_error(message), code(exit_code) {}

  const Exit code;
};

}  // namespace host
