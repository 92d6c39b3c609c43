#include "generate.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "trained.h"

namespace host {
namespace {

constexpr const char* kDraws[] = {"--temperature", "--top-k", "--top-p", "--seed"};

void refuse_draws(const std::vector<std::string>& words) {
  for (const char* name : kDraws) {
    if (std::count(words.begin(), words.end(), name) > 0) {
      throw Failure(Exit::bad_arguments, std::string(name) + " is not for this host, which takes the most likely "
                                         "token: the draws of Session.generate come from PyTorch's generator. Leave "
                                         "it out, or draw with `mobizo generate`");
    }
  }
}

std::vector<int64_t> prompt_of(const Arguments& arguments, const Generation& generation) {
  std::vector<int64_t> prompt = token_ids("--prompt", *arguments.find("--prompt"));
  if (prompt.empty()) {
    throw Failure(Exit::bad_arguments, "--prompt is empty; it must be token ids with spaces in between");
  }
  if (static_cast<int64_t>(prompt.size()) >= generation.context) {
    throw Failure(Exit::bad_arguments,
                  "--prompt has " + std::to_string(prompt.size()) + " tokens, and the cache has room for " +
                      std::to_string(generation.context) + ", of which one is to be generated; shorten it, or " +
                      "compile with a larger GenerateConfig(context=...)");
  }
  for (const int64_t token : prompt) {
    if (token >= generation.vocabulary) {
      throw Failure(Exit::bad_arguments, "--prompt has the token " + std::to_string(token) + ", outside 0.." +
                                             std::to_string(generation.vocabulary - 1));
    }
  }
  return prompt;
}

// The first of the most likely tokens.
int64_t most_likely(const std::vector<float>& logits) {
  if (std::any_of(logits.begin(), logits.end(), [](float value) { return std::isnan(value); })) {
    throw Failure(Exit::bad_program, "the logits of the next token are no numbers; the state may be one that a "
                                     "learning rate was too high for");
  }
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

// Prints tokens as they come; the result says why there are no more.
const char* go_on(Program& program, std::vector<int64_t> tokens, uint32_t most, const std::vector<int64_t>& stops) {
  int64_t start = 0;
  for (uint32_t made = 0; made < most; ++made) {
    const auto count = static_cast<int64_t>(tokens.size());
    const int64_t token = most_likely(program.next_logits(std::move(tokens), start));
    start += count;
    if (std::count(stops.begin(), stops.end(), token) > 0) {
      return "a stop token";
    }
    std::printf("%s%lld", made ? " " : "", static_cast<long long>(token));
    std::fflush(stdout);
    if (start == program.manifest().generate->context) {
      return "a full cache";
    }
    tokens = {token};
  }
  return "--steps";
}

}  // namespace

void generate(const std::vector<std::string>& words) {
  refuse_draws(words);
  std::set<std::string> known = trained_options();
  known.insert({"--prompt", "--steps", "--stop"});
  const Arguments arguments = split_arguments(words, known);
  if (arguments.places.size() != 1) {
    throw Failure(Exit::bad_arguments, "generate needs a program, and no other file");
  }
  const std::string *prompt = arguments.find("--prompt"), *steps = arguments.find("--steps");
  if (prompt == nullptr || steps == nullptr) {
    throw Failure(Exit::bad_arguments, prompt == nullptr ? "--prompt is needed" : "--steps is needed");
  }
  const auto most = number<uint32_t>("--steps", *steps);
  if (most == 0) {
    throw Failure(Exit::bad_arguments, "--steps is 0; it must be 1 or more");
  }
  const std::string* stop = arguments.find("--stop");
  const std::vector<int64_t> given = token_ids("--stop", stop == nullptr ? "" : *stop);
  const auto program = open_trained(arguments, Use::generate);
  const Generation& generation = *program->manifest().generate;
  const char* reason =
      go_on(*program, prompt_of(arguments, generation), most, stop == nullptr ? generation.stop_ids : given);
  std::printf("\n");
  std::fflush(stdout);
  if (!arguments.quiet) {
    std::fprintf(stderr, "ended by %s\n", reason);
  }
}

}  // namespace host
