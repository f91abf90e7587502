// The replay buffer's sample(): draws transitions, and writes them and their observations into a batch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "common/parallel.h"
#include "common/streaming.h"
#include "replay/replay.h"

namespace covr {

void Replay::draw(uint64_t seed, uint64_t batch, double recency, int64_t recency_floor, int64_t* ids,
                  int64_t n) const {
  // Samplable transitions of earlier streams.
  std::vector<int64_t> before(static_cast<size_t>(num_envs_) + 1, 0);
  for (int64_t e = 0; e < num_envs_; ++e) before[e + 1] = before[e] + ready_end(e) - first_[e];
  const int64_t total = before.back();
  if (total == 0) throw std::out_of_range(kNothingToSample);
  for (int64_t i = 0; i < n; ++i) {
    const Random128 random = philox(seed, batch, static_cast<uint32_t>(i), kDrawIndex);
    const int64_t pick =
        static_cast<int64_t>(below(random.word[0], random.word[1], static_cast<uint64_t>(total)));
    const int64_t env = std::upper_bound(before.begin(), before.end(), pick) - before.begin() - 1;
    const int64_t size = before[env + 1] - before[env];
    int64_t age = pick - before[env];
    if (recency < 1.0) {
      const double part = std::max(static_cast<double>(recency_floor) / static_cast<double>(total),
                                   std::pow(recency, static_cast<double>(unit(random.word[2]))));
      age = static_cast<int64_t>(static_cast<double>(age) * std::min(part, 1.0));
      ids[i] = (first_[env] + size - 1 - age) * num_envs_ + env;
    } else {
      ids[i] = (first_[env] + age) * num_envs_ + env;
    }
  }
}

// How many steps a sample from t spans: n, or fewer where its episode, or what was added so far, ends.
int64_t Replay::steps(int64_t env, int64_t t, int64_t n_step) const {
  const int64_t most = std::min(n_step, count_[env] - t);
  int64_t k = 1;
  while (k < most && !(flags_[row(env, t + k - 1)] & kEnd)) ++k;
  return k;
}

void Replay::gather_rows(const BatchOut& out, uint64_t seed, uint64_t batch) const {
  for (int64_t i = 0; i < out.rows(); ++i) {
    const int64_t env = out.ids[i] % num_envs_, t = out.ids[i] / num_envs_;
    const int64_t k = steps(env, t, out.n_step), at = row(env, t);
    double sum = 0, factor = 1;
    for (int64_t j = 0; j < k; ++j, factor *= gamma_)
      sum += factor * static_cast<double>(reward_[row(env, t + j)]);
    const uint8_t last = flags_[row(env, t + k - 1)];
    out.reward[i] = static_cast<float>(sum);
    out.discount[i] = last & kTerminated ? 0.0f : static_cast<float>(factor);
    out.terminated[i] = (last & kTerminated) != 0;
    out.truncated[i] = (last & kTruncated) != 0;
    for (size_t c = 0; c < columns_.size(); ++c)
      std::memcpy(out.columns[c].data + i * columns_[c].bytes,
                  columns_[c].values.data + at * columns_[c].bytes, static_cast<size_t>(columns_[c].bytes));
    if (out.offsets) {
      const Random128 random = philox(seed, batch, static_cast<uint32_t>(i), kDrawShift);
      for (int64_t j = 0; j < 4; ++j)
        out.offsets->data[(j / 2) * out.rows() * 2 + i * 2 + j % 2] =
            below(random.word[j], static_cast<uint32_t>(out.offset_range));
    }
  }
}

void Replay::plan(size_t key, const ObservationsOut& out, StackPlan* obs, StackPlan* next_obs) const {
  const ObservationKey& k = keys_[key];
  const auto shift = [&](StackPlan& plan, int64_t which, int64_t i) {
    if (!out.offsets) return;
    const int64_t* yx = out.offsets->data + which * out.rows() * 2 + i * 2;
    plan.shift_y = static_cast<int16_t>(yx[0] - out.shift_origin);
    plan.shift_x = static_cast<int16_t>(yx[1] - out.shift_origin);
  };
  for (int64_t i = 0; i < out.rows(); ++i) {
    const int64_t env = out.ids[i] % num_envs_, t = out.ids[i] / num_envs_;
    obs[i] = k.plan(row(env, t), env * k.frames.slots, false);
    shift(obs[i], 0, i);
    if (!next_obs) continue;
    next_obs[i] = k.plan(row(env, t + steps(env, t, out.n_step) - 1), env * k.frames.slots, true);
    shift(next_obs[i], 1, i);
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
