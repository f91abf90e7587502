// Priorities of a replay buffer's transitions: a sum tree over its rows, zero wherever nothing can be
// sampled. All memory belongs to the caller; the buffer's lock guards it.
#pragma once

#include <cstdint>
#include <vector>

#include "common/view.h"

namespace covr {

class Replay;

class Priorities {
 public:
  // leaves [rows] and sums as sum_tree.h lays them out. largest [1]: the largest leaf given so far. bounds
  // [2, num_envs]: the first transition of each stream that has a leaf, and the one after the last.
  Priorities(View<float, 1> leaves, View<double, 1> sums, View<double, 1> largest, View<int64_t, 2> bounds,
             double alpha)
      : leaves_(leaves), sums_(sums), largest_(largest), bounds_(bounds), alpha_(alpha) {}

  // After transitions were added, overwritten or completed: new ones get the largest priority.
  void follow(const Replay& replay);
  // Draws ids in proportion to priority^alpha and gives their importance weights, (N * probability)^-beta
  // over the largest of the batch. Throws std::out_of_range if there is nothing to draw.
  void draw(const Replay& replay, uint64_t seed, uint64_t batch, double beta, int64_t* ids, float* weight,
            int64_t n) const;
  // New priorities; transitions that cannot be sampled, or not any more, are skipped. Throws
  // std::invalid_argument, with nothing changed, where a priority is negative or not finite.
  void set(const Replay& replay, const int64_t* ids, const double* priority, int64_t n);

 private:
  View<float, 1> leaves_;
  View<double, 1> sums_, largest_;
  View<int64_t, 2> bounds_;
  double alpha_;
  std::vector<int64_t> touched_;
  std::vector<float> values_;
};

}  // namespace covr
