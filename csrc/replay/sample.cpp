// The replay buffer's sample(): draws transitions, and writes them and their observations into a batch.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/parallel.h"
#include "common/streaming.h"
#include "replay/replay.h"

namespace covr {

void Replay::draw(uint64_t seed, uint64_t batch, const Recency& recency, int64_t* ids, int64_t n) const {
  // Samplable transitions of earlier streams.
  std::vector<int64_t> before(static_cast<size_t>(num_envs()) + 1, 0);
  for (int64_t e = 0; e < num_envs(); ++e) before[e + 1] = before[e] + tables_.ready(e);
  const int64_t total = before.back();
  if (total == 0) throw std::out_of_range(kNothingToSample);
  for (int64_t i = 0; i < n; ++i) {
    const Draw draw = draw_place(seed, batch, i, total, recency);
    const int64_t env = std::upper_bound(before.begin(), before.end(), draw.place) - before.begin() - 1;
    ids[i] = drawn_id(tables_, draw, recency, env, before[env]);
  }
}

void Replay::gather_rows(const BatchOut& out, uint64_t seed, uint64_t batch) const {
  for (int64_t i = 0; i < out.rows(); ++i) {
    const int64_t env = out.ids[i] % num_envs(), t = out.ids[i] / num_envs();
    const NStepReturn steps = tables_.n_step_return(env, t, out.n_step);
    out.reward[i] = steps.reward;
    out.discount[i] = steps.discount;
    out.terminated[i] = steps.terminated;
    out.truncated[i] = steps.truncated;
    const int64_t at = tables_.row(env, t);
    for (size_t c = 0; c < columns_.size(); ++c)
      std::memcpy(out.columns[c].data + i * columns_[c].bytes,
                  columns_[c].values.data + at * columns_[c].bytes, static_cast<size_t>(columns_[c].bytes));
    if (out.obs_offset) {
      const Offsets drawn = draw_offsets(seed, batch, i, out.augmentation);
      std::copy_n(drawn.of, 2, out.obs_offset->data + i * 2);
      std::copy_n(drawn.of + 2, 2, out.next_obs_offset->data + i * 2);
    }
  }
}

void Replay::plan(size_t key, const ObservationsOut& out, StackPlan* obs, StackPlan* next_obs) const {
  const KeyTable& k = keys_[key];
  for (int64_t i = 0; i < out.rows(); ++i) {
    const int64_t env = out.ids[i] % num_envs(), t = out.ids[i] / num_envs();
    const auto shift = [&](StackPlan& plan, const auto& offsets) {
      if (offsets) plan.shift(offsets->data[i * 2], offsets->data[i * 2 + 1], out.augmentation);
    };
    obs[i] = k.plan(tables_.row(env, t), env * k.frames.slots, false);
    shift(obs[i], out.obs_offset);
    if (!next_obs) continue;
    const int64_t last = tables_.row(env, t + tables_.n_step_return(env, t, out.n_step).steps - 1);
    next_obs[i] = k.plan(last, env * k.frames.slots, true);
    shift(next_obs[i], out.next_obs_offset);
  }
}

void Replay::gather_key(size_t key, const ObservationsOut& out, int threads) const {
  const ObservationsOut::Key& to = out.keys[key];
  const FrameLayout& frames = keys_[key].frames;
  std::vector<StackPlan> plans(static_cast<size_t>(out.rows()) * 2);
  StackPlan* next_plans = to.next_obs ? plans.data() + out.rows() : nullptr;
  plan(key, out, plans.data(), next_plans);
  for (const StackPlan& plan : plans)
    __builtin_prefetch(frames.data + stack_slot(plan, frames.slots, 0) * frames.frame_bytes());
  const int64_t bytes = to.target.row_bytes(frames);
  const bool streaming = is_worth_streaming(out.rows() * bytes);
  parallel_for(out.rows(), 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      gather_observation(frames, plans[i], to.target, to.obs.data + i * bytes, streaming);
      // Right after obs: most of its frames are the same and still in the cache.
      if (to.next_obs)
        gather_observation(frames, next_plans[i], to.target, to.next_obs->data + i * bytes, streaming);
    }
    if (streaming) finish_streaming();
  });
}

}  // namespace covr
