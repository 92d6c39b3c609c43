#include "threads.h"

// The wheel has the library of the thread pool, but of its headers only the one of its guard. This is what it declares.
namespace executorch::extension::threadpool {

class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};

ThreadPool* get_threadpool();

}  // namespace executorch::extension::threadpool

namespace host {

void set_threads(uint32_t threads) {
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);
}

}  // namespace host
