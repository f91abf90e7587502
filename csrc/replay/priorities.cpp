#include "replay/priorities.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "ops/sum_tree.h"
#include "replay/replay.h"

namespace covr {

void Priorities::follow(const Replay& replay) {
  const Tables& tables = replay.tables();
  touched_.clear();
  values_.clear();
  const auto mark = [&](int64_t env, int64_t begin, int64_t end, float value) {
    for (int64_t t = begin; t < end; ++t) {
      touched_.push_back(tables.row(env, t));
      values_.push_back(value);
    }
  };
  for (int64_t env = 0; env < tables.num_envs; ++env) {
    const PriorityTables::Change change = priorities_.change(tables, env);
    mark(env, change.gone, change.gone_end, 0.0f);
    mark(env, change.fresh, change.fresh_end, static_cast<float>(*priorities_.largest));
    priorities_.follow(tables, env);
  }
  sum_tree_set(priorities_.leaves, priorities_.sums, tables.rows(), touched_.data(), values_.data(),
               static_cast<int64_t>(touched_.size()));
}

void Priorities::draw(const Replay& replay, uint64_t seed, uint64_t batch, double beta, int64_t* ids,
                      float* weight, int64_t n) const {
  const Tables& tables = replay.tables();
  if (replay.samplable() == 0) throw std::out_of_range(kNothingToSample);
  std::vector<double> jitter(static_cast<size_t>(n)), probability(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) jitter[i] = draw_jitter(seed, batch, i);
  sum_tree_draw(priorities_.leaves, priorities_.sums, tables.rows(), jitter.data(), n, ids,
                probability.data());
  const double rarest = *std::min_element(probability.begin(), probability.end());
  for (int64_t i = 0; i < n; ++i) {
    ids[i] = tables.id_in_row(ids[i]);
    weight[i] = importance_weight(rarest, probability[i], beta);
  }
}

void Priorities::set(const Replay& replay, const int64_t* ids, const double* priority, int64_t n) {
  const double* wrong =
      std::find_if_not(priority, priority + n, [](double p) { return p >= 0 && std::isfinite(p); });
  if (wrong != priority + n)
    throw std::invalid_argument("priority[" + std::to_string(wrong - priority) + "] is " +
                                std::to_string(*wrong) +
                                ": priority must be finite and not negative: pass absolute TD errors");
  touched_.clear();
  values_.clear();
  const Tables& tables = replay.tables();
  double largest = *priorities_.largest;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = tables.find_ready(ids[i]);
    if (row < 0) continue;
    const float leaf = priorities_.leaf(priority[i]);
    if (!std::isfinite(leaf))
      throw std::invalid_argument("priority is too large: to the power of alpha it must fit into float32");
    touched_.push_back(row);
    values_.push_back(leaf);
    largest = std::max(largest, static_cast<double>(leaf));
  }
  *priorities_.largest = largest;
  sum_tree_set(priorities_.leaves, priorities_.sums, tables.rows(), touched_.data(), values_.data(),
               static_cast<int64_t>(touched_.size()));
}

}  // namespace covr
