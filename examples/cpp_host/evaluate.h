// `mobizo_host evaluate`: the mean loss of the rows of a token file.
#pragma once

#include <string>
#include <vector>

namespace host {

// What stands behind the verb. Throws `Failure`.
void evaluate(const std::vector<std::string>& words);

}  // namespace host
