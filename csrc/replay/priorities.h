// Priorities of a replay buffer's transitions: a sum tree over its rows, zero wherever nothing can be
// sampled. All memory belongs to the caller; the buffer's lock guards it.
#pragma once

#include <cstdint>
#include <vector>

namespace covr {

class Replay;

class Priorities {
 public:
  // leaves [rows] and sums as sum_tree.h lays them out. largest: the largest leaf given so far. bounds [2,
  // num_envs]: the first transition of each stream that has a leaf, and the one after the last.
  Priorities(float* leaves, double* sums, double* largest, int64_t* bounds, int64_t rows, double alpha);

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
  float* leaves_;
  double *sums_, *largest_;
  int64_t* bounds_;
  int64_t rows_;
  double alpha_;
  std::vector<int64_t> touched_;
  std::vector<float> values_;
};

}  // namespace covr
