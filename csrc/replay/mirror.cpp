#include "replay/mirror.h"

#ifdef COVR_WITH_CUDA

#include <algorithm>

namespace covr {

void Mirror::sample(const CudaBatchOut& out, const Recency& recency, StackPlan* plans,
                    uintptr_t stream) const {
  if (priorities_)
    cuda::draw_prioritized(tables_, *priorities_, sequence_, out.rows(), out.ids.data, out.weight.data,
                           stream);
  else
    cuda::draw_uniform(tables_, sequence_, recency, out.rows(), out.ids.data, out.weight.data, stream);
  fill(out, plans, stream);
}

void Mirror::get(const CudaBatchOut& out, StackPlan* plans, uintptr_t stream) const {
  cuda::draw_given(sequence_, out.rows(), out.weight.data, stream);
  fill(out, plans, stream);
}

void Mirror::fill(const CudaBatchOut& out, StackPlan* plans, uintptr_t stream) const {
  const RowsOut rows{out.ids.data,
                     out.rows(),
                     out.n_step,
                     out.reward.data,
                     out.discount.data,
                     out.terminated.data,
                     out.truncated.data,
                     out.obs_offset ? out.obs_offset->data : nullptr,
                     out.next_obs_offset ? out.next_obs_offset->data : nullptr,
                     out.augmentation};
  std::vector<ColumnOut> columns(columns_.size());
  for (size_t c = 0; c < columns_.size(); ++c) columns[c] = {columns_[c], out.columns[c].data};
  plan_and_gather(rows, out, columns, plans, stream);
}

void Mirror::observe(const CudaObservationsOut& out, StackPlan* plans, uintptr_t stream) const {
  RowsOut rows{};
  rows.ids = out.ids.data;
  rows.rows = out.rows();
  rows.n_step = 1;
  plan_and_gather(rows, out, {}, plans, stream);
}

void Mirror::plan_and_gather(const RowsOut& rows, const CudaObservationsOut& out,
                             const std::vector<ColumnOut>& columns, StackPlan* plans,
                             uintptr_t stream) const {
  std::vector<KeyPlans> keys;
  for (size_t k = 0; k < out.keys.size(); ++k) {
    StackPlan* obs = plans;
    plans += rows.rows;
    StackPlan* next_obs = out.keys[k].next_obs ? plans : nullptr;
    if (next_obs) plans += rows.rows;
    keys.push_back({keys_[k], obs, next_obs});
  }
  for (size_t begin = 0; begin == 0 || begin < std::max(keys.size(), columns.size()); begin += cuda::kParts) {
    cuda::Parts parts;
    for (size_t k = begin; k < std::min(keys.size(), begin + cuda::kParts); ++k)
      parts.key[parts.keys++] = keys[k];
    for (size_t c = begin; c < std::min(columns.size(), begin + cuda::kParts); ++c)
      parts.column[parts.columns++] = columns[c];
    cuda::fill_rows(tables_, sequence_, rows, parts, stream);
  }
  for (size_t k = 0; k < keys.size(); ++k) {
    const auto& [target, obs, next_obs] = out.keys[k];
    gather_cuda(keys_[k].frames, keys[k].obs, rows.rows, target, obs.data, stream);
    if (next_obs) gather_cuda(keys_[k].frames, keys[k].next_obs, rows.rows, target, next_obs->data, stream);
  }
}

void Mirror::follow(uintptr_t stream) const {
  if (priorities_) cuda::follow_priorities(tables_, *priorities_, stream);
}

void Mirror::set_priorities(CudaView<const int64_t, 1> ids, CudaView<const float, 1> priority, int64_t* rows,
                            float* leaves, uintptr_t stream) const {
  const int64_t n = ids.size();
  if (n == 0) return;
  cuda::priority_leaves(tables_, *priorities_, ids.data, priority.data, n, rows, leaves, stream);
  const int64_t capacity = tables_.rows();
  cuda::sum_tree_update({priorities_->leaves, {capacity}},
                        {priorities_->sums, {SumTreeLayout(capacity).inner_nodes()}}, {claims_, {capacity}},
                        {rows, {n}}, {leaves, {n}}, stream);
}

}  // namespace covr

#endif
