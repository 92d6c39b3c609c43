#pragma once

#include <cstdint>

namespace host {

// Give the runtime's kernels that many threads; before anything is loaded.
void set_threads(uint32_t threads);

}  // namespace host
