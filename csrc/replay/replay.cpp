#include "replay/replay.h"

#include <utility>

namespace covr {

Replay::Replay(int64_t capacity, int64_t num_envs, int64_t n_step, double gamma, View<int64_t, 1> count,
               View<int64_t, 1> first, View<int64_t, 1> ended, View<float, 1> reward, View<uint8_t, 1> flags,
               View<int32_t, 1> time)
    : tables_{num_envs,
              n_step,
              (capacity + num_envs - 1) / num_envs,
              capacity / num_envs,
              capacity % num_envs,
              gamma,
              count.data,
              first.data,
              ended.data,
              reward.data,
              flags.data,
              time.data} {
  for (const auto& [name, shape] :
       {std::pair{"count", count.shape}, {"first", first.shape}, {"ended", ended.shape}})
    require_shape(name, shape, {num_envs});
  for (const auto& [name, shape] :
       {std::pair{"reward", reward.shape}, {"flags", flags.shape}, {"time", time.shape}})
    require_shape(name, shape, {rows()});
}

int64_t Replay::size() const {
  int64_t total = 0;
  for (int64_t e = 0; e < num_envs(); ++e) total += tables_.count[e] - tables_.first[e];
  return total;
}

int64_t Replay::samplable() const {
  int64_t total = 0;
  for (int64_t e = 0; e < num_envs(); ++e) total += tables_.ready(e);
  return total;
}

}  // namespace covr
