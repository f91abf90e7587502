#include "replay/replay.h"

#include <algorithm>
#include <utility>

namespace covr {

Replay::Replay(int64_t capacity, int64_t num_envs, int64_t n_step, double gamma, View<int64_t, 1> count,
               View<int64_t, 1> first, View<int64_t, 1> ended, View<float, 1> reward, View<uint8_t, 1> flags,
               View<int32_t, 1> time)
    : num_envs_(num_envs),
      n_step_(n_step),
      rows_per_stream_((capacity + num_envs - 1) / num_envs),
      limit_(capacity / num_envs),
      longer_streams_(capacity % num_envs),
      gamma_(gamma),
      count_(count),
      first_(first),
      ended_(ended),
      reward_(reward),
      flags_(flags),
      time_(time) {
  for (const auto& [name, shape] :
       {std::pair{"count", count.shape}, {"first", first.shape}, {"ended", ended.shape}})
    require_shape(name, shape, {num_envs_});
  for (const auto& [name, shape] :
       {std::pair{"reward", reward.shape}, {"flags", flags.shape}, {"time", time.shape}})
    require_shape(name, shape, {rows()});
}

int64_t Replay::size() const {
  int64_t total = 0;
  for (int64_t e = 0; e < num_envs_; ++e) total += count_[e] - first_[e];
  return total;
}

// Transition t is complete when n steps follow it or its episode ends within them. Both are monotone in t, so
// what may be sampled of a stream is the contiguous range [first, ready_end).
int64_t Replay::ready_end(int64_t env) const {
  return std::max({first_[env], ended_[env], count_[env] - n_step_ + 1});
}

int64_t Replay::samplable() const {
  int64_t total = 0;
  for (int64_t e = 0; e < num_envs_; ++e) total += ready_end(e) - first_[e];
  return total;
}

int64_t Replay::find(int64_t id) const {
  if (id < 0) return -1;
  const int64_t env = id % num_envs_, t = id / num_envs_;
  return t >= first_[env] && t < count_[env] ? row(env, t) : -1;
}

int64_t Replay::find_ready(int64_t id) const {
  const int64_t row = find(id);
  return row >= 0 && id / num_envs_ < ready_end(id % num_envs_) ? row : -1;
}

int64_t Replay::id_in_row(int64_t row) const {
  const int64_t env = row / rows_per_stream_, position = row % rows_per_stream_, size = limit(env);
  const int64_t last = count_[env] - 1;
  if (position >= size || last < 0) return -1;
  const int64_t in_last = last % size;  // the ring's newest position
  const int64_t t = last - in_last + position - (position > in_last ? size : 0);
  return t >= first_[env] ? t * num_envs_ + env : -1;
}

}  // namespace covr
