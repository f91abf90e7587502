// A reader-writer lock whose read side may be taken by one thread and released by another, which
// std::shared_mutex forbids: a prefetched batch is drawn by the caller and finished by a worker.
#pragma once

#include <condition_variable>
#include <mutex>

namespace covr {

class SharedLock {
 public:
  void lock_shared() {
    std::unique_lock guard(mutex_);
    // Waiting writers go first, or a busy sampler would starve them.
    changed_.wait(guard, [&] { return !writing_ && waiting_writers_ == 0; });
    ++readers_;
  }
  void unlock_shared() {
    std::lock_guard guard(mutex_);
    if (--readers_ == 0) changed_.notify_all();
  }
  void lock() {
    std::unique_lock guard(mutex_);
    ++waiting_writers_;
    changed_.wait(guard, [&] { return !writing_ && readers_ == 0; });
    --waiting_writers_;
    writing_ = true;
  }
  void unlock() {
    std::lock_guard guard(mutex_);
    writing_ = false;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int readers_ = 0, waiting_writers_ = 0;
  bool writing_ = false;
};

}  // namespace covr
