// Priorities of a replay buffer's transitions: a sum tree over its rows, zero wherever nothing can be
// sampled. All memory belongs to the caller; the buffer's lock guards it.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/view.h"
#include "replay/tables.h"

namespace covr {

class Replay;

// The memory of the priorities, on the host or on a device, and how a tree follows its buffer.
struct PriorityTables {
  float* leaves;           // [rows], and
  double* sums;            // the nodes above them, as sum_tree.h lays them out
  double* largest;         // [1] the largest leaf given so far
  int64_t *first, *ready;  // [num_envs] the first transition that has a leaf, and the one after the last
  double alpha;

  // The leaf of a priority. One of zero can still be drawn.
  COVR_HD float leaf(double priority) const { return static_cast<float>(pow(priority + 1e-6, alpha)); }

  // Since the tree last followed the buffer, transitions [gone, gone_end) of a stream became ones that cannot
  // be sampled any more, and [fresh, fresh_end) can be now. Clear the former first: a new transition may lie
  // where an old one was.
  struct Change {
    int64_t gone, gone_end, fresh, fresh_end;
  };
  COVR_HD Change change(const Tables& tables, int64_t env) const {
    const int64_t begin = tables.first[env];
    return {first[env], smaller(begin, ready[env]), larger(begin, ready[env]), tables.ready_end(env)};
  }
  COVR_HD void follow(const Tables& tables, int64_t env) const {
    first[env] = tables.first[env];
    ready[env] = tables.ready_end(env);
  }
};

// The importance weight of a draw, over the largest of its batch: N * probability to the power of -beta,
// where the factor N cancels. `rarest` is the smallest probability of the batch.
COVR_HD float importance_weight(double rarest, double probability, double beta) {
  return static_cast<float>(pow(rarest / probability, beta));
}

class Priorities {
 public:
  explicit Priorities(PriorityTables tables) : priorities_(tables) {}

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
  PriorityTables priorities_;
  std::vector<int64_t> touched_;
  std::vector<float> values_;
};

}  // namespace covr
