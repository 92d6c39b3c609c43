// A program with the state that it was trained to, for the verbs that only read it.
#pragma once

#include <memory>
#include <set>
#include <string>

#include "arguments.h"
#include "program.h"

namespace host {

// The options of `open_trained`: where the state comes from, and the number of threads.
const std::set<std::string>& trained_options();

// The program at the first place, with the state at the end of `--run`, of the file `--load`, or its own where neither
// is given. Throws `Failure`.
std::unique_ptr<Program> open_trained(const Arguments& arguments, Use use);

}  // namespace host
