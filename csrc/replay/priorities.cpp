#include "replay/priorities.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "ops/sum_tree.h"
#include "replay/replay.h"

namespace covr {

constexpr double kEpsilon = 1e-6;  // so that a priority of zero can still be drawn

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
  for (int64_t env = 0; env < replay.num_envs(); ++env) {
    int64_t& first = bounds_.data[env];
    int64_t& ready = bounds_.data[replay.num_envs() + env];
    const int64_t new_first = tables.first[env], new_ready = tables.ready_end(env);
    // In this order: a new transition may lie where an old one was.
    mark(env, first, std::min(new_first, ready), 0.0f);
    mark(env, std::max(new_first, ready), new_ready, static_cast<float>(largest_[0]));
    first = new_first;
    ready = new_ready;
  }
  sum_tree_set(leaves_.data, sums_.data, leaves_.size(), touched_.data(), values_.data(),
               static_cast<int64_t>(touched_.size()));
}

void Priorities::draw(const Replay& replay, uint64_t seed, uint64_t batch, double beta, int64_t* ids,
                      float* weight, int64_t n) const {
  const int64_t samplable = replay.samplable();
  if (samplable == 0) throw std::out_of_range(kNothingToSample);
  std::vector<double> jitter(static_cast<size_t>(n)), probability(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) jitter[i] = draw_jitter(seed, batch, i);
  sum_tree_draw(leaves_.data, sums_.data, leaves_.size(), jitter.data(), n, ids, probability.data());
  const double rarest = *std::min_element(probability.begin(), probability.end());
  for (int64_t i = 0; i < n; ++i) {
    ids[i] = replay.tables().id_in_row(ids[i]);
    // The factor N cancels: the rarest draw of the batch has the largest weight.
    weight[i] = static_cast<float>(std::pow(rarest / probability[i], beta));
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
  double largest = largest_[0];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = replay.tables().find_ready(ids[i]);
    if (row < 0) continue;
    const auto leaf = static_cast<float>(std::pow(priority[i] + kEpsilon, alpha_));
    if (!std::isfinite(leaf))
      throw std::invalid_argument("priority is too large: to the power of alpha it must fit into float32");
    touched_.push_back(row);
    values_.push_back(leaf);
    largest = std::max(largest, static_cast<double>(leaf));
  }
  largest_[0] = largest;
  sum_tree_set(leaves_.data, sums_.data, leaves_.size(), touched_.data(), values_.data(),
               static_cast<int64_t>(touched_.size()));
}

}  // namespace covr
