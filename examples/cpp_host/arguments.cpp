#include "arguments.h"

#include <cmath>
#include <sstream>

namespace host {

float real(const std::string& name, const std::string& text) {
  const double given = number<double>(name, text);
  const float value = static_cast<float>(given);
  if (!std::isfinite(value) || (given != 0 && value == 0)) {
    throw Failure(Exit::bad_arguments, name + " is " + text + "; it must be a finite number of float32");
  }
  return value;
}

uint32_t thread_count(const std::string& text) {
  const auto count = number<uint32_t>("--threads", text);
  if (count == 0) {
    throw Failure(Exit::bad_arguments, "--threads is 0; it must be 1 or more");
  }
  return count;
}

std::vector<int64_t> token_ids(const std::string& name, const std::string& text) {
  std::vector<int64_t> ids;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    ids.push_back(number<uint32_t>(name, word));
  }
  return ids;
}

const std::string* Arguments::find(const std::string& name) const {
  const auto found = options.find(name);
  return found == options.end() ? nullptr : &found->second;
}

Arguments split_arguments(const std::vector<std::string>& words, const std::set<std::string>& known) {
  Arguments found;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& name = words[i];
    if (name.compare(0, 2, "--") != 0) {
      found.places.push_back(name);
    } else if (name == "--quiet") {
      found.quiet = true;
    } else if (!known.count(name)) {
      throw Failure(Exit::bad_arguments, "there is no option " + name + " here");
    } else if (i + 1 == words.size()) {
      throw Failure(Exit::bad_arguments, name + " needs a value");
    } else {
      found.options[name] = words[++i];
    }
  }
  return found;
}

}  // namespace host
