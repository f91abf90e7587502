// A persistent thread pool. OpenMP would bring a second runtime beside torch's bundled one, and the two
// pools would fight for the cores; this one sleeps when it has nothing to do.
#pragma once

#include <cstdint>
#include <functional>

namespace covr {

// Calls body(begin, end) on disjoint pieces that cover [0, n), on up to `threads` threads including the
// caller's. `grain` is the smallest piece worth a thread. Call it without the GIL. Exceptions thrown by
// body are rethrown in the caller. Pieces depend only on n, threads and grain, never on timing.
void parallel_for(int64_t n, int64_t grain, int threads,
                  const std::function<void(int64_t begin, int64_t end)>& body);

// The same with body(i) for each i in [0, n).
template <typename Body>
void parallel_for_each(int64_t n, int64_t grain, int threads, const Body& body) {
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace covr
