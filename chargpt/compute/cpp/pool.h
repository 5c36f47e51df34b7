// A pool of threads that a busy neighbour cannot stop.
//
// A job is a number of chunks. The caller takes chunks, too, and at the end waits only for chunks
// that somebody has taken. So a thread that gets no processor costs nothing but its help. Results
// must not depend on who computes a chunk: sums go by chunk or by output, never by thread.

#pragma once

#include <cstdint>
#include <type_traits>

namespace pool {

// Threads that share a job of this thread, itself included. A body's `slot` is below it.
int threads();

typedef void (*Body)(void* context, int64_t chunk, int slot);
void run(int64_t n_chunks, Body body, void* context);

}  // namespace pool

// Call f(chunk, slot) for each chunk in [0, n). No two calls at the same time have the same slot, so
// it may select working memory, which must exist before: f cannot throw.
template <class F>
void parallel(int64_t n, F&& f) {
  typedef std::remove_reference_t<F> Function;
  pool::run(
      n, [](void* context, int64_t chunk, int slot) { (*(Function*)context)(chunk, slot); },
      (void*)&f);
}
