// The verb `verify`: whether a program computes on this processor what it computed where it was compiled.
#pragma once

#include <string>
#include <vector>

namespace host {

// `words`: what stands behind the verb. Throws `Failure`, with `Exit::other_numbers` where a value is not what it should be.
void verify(const std::vector<std::string>& words);

}  // namespace host
