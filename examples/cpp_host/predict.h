// `mobizo_host predict`: what the program answers to every row of a token file.
#pragma once

#include <string>
#include <vector>

namespace host {

// What stands behind the verb. Throws `Failure`.
void predict(const std::vector<std::string>& words);

}  // namespace host
