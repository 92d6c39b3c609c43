#pragma once

namespace host {

// Hold back what the runtime logs; before anything is loaded.
void silence_runtime();

}  // namespace host
