#include "common/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace covr {
namespace {

// More than one, because cores are rarely idle: those of torch's OpenMP threads are not for about 10 ms after
// each of its parallel loops, in which they spin. Whoever is faster takes more.
constexpr int64_t kPiecesPerThread = 4;

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t n, pieces;
  std::atomic<int64_t> next{0};
  int64_t unfinished;  // guarded by Pool::mutex
  std::exception_ptr error;
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    {
      std::lock_guard lock(mutex_);
      while (static_cast<int>(workers_) < helpers) {
        std::thread([this] { work(); }).detach();
        ++workers_;
      }
      jobs_.push_back(&job);
    }
    wake_.notify_all();
    drain(job);
    std::unique_lock lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    done_.wait(lock, [&] { return job.unfinished == 0; });
  }

 private:
  void drain(Job& job) {
    for (int64_t i; (i = job.next.fetch_add(1)) < job.pieces;) execute(job, i);
  }

  void work() {
    for (;;) {
      Job* job = nullptr;
      int64_t piece = 0;
      {
        std::unique_lock lock(mutex_);
        // A piece is claimed under the lock: its job cannot end before the claim is executed.
        wake_.wait(lock, [&] { return (job = claim(piece)) != nullptr; });
      }
      execute(*job, piece);
    }
  }

  Job* claim(int64_t& piece) {
    for (Job* job : jobs_)
      if ((piece = job->next.fetch_add(1)) < job->pieces) return job;
    return nullptr;
  }

  // The finished piece is accounted for under the lock, and the job is not touched after it: its owner
  // may destroy it as soon as the count reaches zero.
  void execute(Job& job, int64_t piece) {
    std::exception_ptr error;
    try {
      (*job.body)(job.n* piece / job.pieces, job.n * (piece + 1) / job.pieces);
    } catch (...) {
      error = std::current_exception();
    }
    std::lock_guard lock(mutex_);
    if (error && !job.error) job.error = error;
    if (--job.unfinished == 0) done_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Job*> jobs_;
  size_t workers_ = 0;
};

// After fork() the child has no worker threads, and the parent's mutex may be locked: it starts with a new
// pool. The old pool is leaked on purpose, since its threads may still wait on it in the parent.
Pool* g_pool = new Pool;

}  // namespace

void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
  (void)registered;
  const int64_t most = (n + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t used = std::min<int64_t>(threads, most);
  if (used <= 1) return body(0, n);
  const int64_t pieces = std::min(used * kPiecesPerThread, most);
  Job job{&body, n, pieces, {}, pieces, nullptr};
  g_pool->run(job, static_cast<int>(used) - 1);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace covr
