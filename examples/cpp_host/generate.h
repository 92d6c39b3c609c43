// `mobizo_host generate`: go on with a prompt of token ids, one after the other.
#pragma once

#include <string>
#include <vector>

namespace host {

// What stands behind the verb. Throws `Failure`.
void generate(const std::vector<std::string>& words);

}  // namespace host
