// The replay buffer's add(): checks that observations continue their streams, then stores the new frames.
#include <algorithm>
#include <cstring>
#include <string>

#include "common/streaming.h"
#include "replay/frame_view.h"
#include "replay/replay.h"

namespace covr {
namespace {

constexpr const char* kContractRemedy =
    " Frame stacks must slide: obs is next_obs of the step before, and next_obs is obs without its oldest "
    "frame plus one new frame, oldest first. If the environment was reset without terminated or truncated, "
    "call cut(env_ids) first; at the end of an episode pass the final observation, not the first of the next "
    "episode; if these are no stacks, build the buffer with frame_stack=1, which stores observations as they "
    "are.";

}  // namespace

// The stack that the stream's next obs must show: that of the latest next_obs.
StackPlan Replay::next_stack(size_t k, int64_t env) const {
  return keys_[k].plan(tables_.row(env, tables_.count[env] - 1), env * keys_[k].recent.slots, true);
}

// Which part of older frames to compare: all of it if frames are small, and where a stream usually breaks off
// (at episode starts and ends); otherwise probes, at another place on each step.
int64_t Replay::probe_phase(const RowsIn& in, int64_t r, int64_t env, size_t k) const {
  const FrameLayout& frames = keys_[k].frames;
  const bool small = frames.frame_bytes() <= kSmallFrame;
  const bool all = cut_at_jumps || small || frames.stack == 1 ||
                   next_stack(k, env).depth < frames.stack - 1 || in.terminated[r] || in.truncated[r];
  return all ? kCompareAll : tables_.count[env] % kProbeEvery;
}

// The phase in which frame `position` of obs is compared, or of next_obs if `next`.
int64_t Replay::frame_phase(int64_t phase, int64_t position, bool next) {
  constexpr int64_t kApart = 5;  // coprime with the period, so that no two frames of a stack share a place
  return phase < 0 ? phase : (phase + kApart * position + (next ? kProbeEvery / 2 : 0)) % kProbeEvery;
}

// Starts to load the memory that check() is about to compare.
void Replay::prefetch_check(const RowsIn& in, int64_t r, int64_t env) const {
  for (size_t k = 0; k < keys_.size() && tables_.count[env] != tables_.ended[env]; ++k) {
    const int64_t phase = probe_phase(in, r, env, k), bytes = keys_[k].frames.frame_bytes();
    if (phase < 0 || keys_[k].input_channels_last) continue;
    for (int64_t j = 0; j < keys_[k].frames.stack; ++j) {
      const uint8_t* stored = expected_frame(k, env, j);
      const int64_t in_obs = frame_phase(phase, j, false), in_next = frame_phase(phase, j - 1, true);
      prefetch_probes(in.obs[k][r] + j * bytes, bytes, in_obs);
      prefetch_probes(stored, bytes, in_obs);
      if (j == 0) continue;
      prefetch_probes(in.next_obs[k][r] + (j - 1) * bytes, bytes, in_next);
      prefetch_probes(stored, bytes, in_next);
    }
  }
}

// The stored frame that must be at `position` of the stream's next obs; nullptr is the blank frame.
const uint8_t* Replay::expected_frame(size_t k, int64_t env, int64_t position) const {
  const FrameLayout& recent = keys_[k].recent;
  const int64_t slot = stack_slot(next_stack(k, env), recent.slots, recent.stack - 1 - position);
  return slot == kBlankFrame ? nullptr : recent.data + slot * recent.frame_bytes();
}

bool Replay::continues(const RowsIn& in, int64_t r, int64_t env, size_t k) const {
  const uint8_t* obs = in.obs[k][r];
  const int64_t phase = probe_phase(in, r, env, k);
  for (int64_t j = 0; j < keys_[k].frames.stack; ++j) {
    const FrameView frame = frame_of(keys_[k], obs, j);
    const uint8_t* stored = expected_frame(k, env, j);
    if (!same_as_stored(keys_[k], frame, stored, frame_phase(phase, j, false))) return false;
  }
  return true;
}

bool Replay::slides(const RowsIn& in, int64_t r, int64_t env, size_t k, bool fresh) const {
  const ObservationKey& key = keys_[k];
  const uint8_t* obs = in.obs[k][r];
  const uint8_t* next = in.next_obs[k][r];
  const int64_t phase = fresh ? kCompareAll : probe_phase(in, r, env, k);
  for (int64_t j = 0; j + 1 < key.frames.stack; ++j) {
    const FrameView older = frame_of(key, next, j);
    if (fresh ? !same_frames(key, older, frame_of(key, obs, j + 1))
              : !same_as_stored(key, older, expected_frame(k, env, j + 1), frame_phase(phase, j, true)))
      return false;
  }
  return true;
}

Replay::Segment Replay::check(const RowsIn& in, int64_t r, int64_t env) const {
  const auto fail = [&](size_t k, const char* what) {
    throw FrameStackError("observation '" + keys_[k].name + "' of row " + std::to_string(r) +
                          " (environment " + std::to_string(env) + "): " + what + kContractRemedy);
  };
  Segment segment{tables_.count[env] == tables_.ended[env], false};
  // A single frame cannot contradict a stream: a jump is stored as the start of a new segment.
  for (size_t k = 0; k < keys_.size() && !segment.fresh; ++k)
    if ((cut_at_jumps || keys_[k].frames.stack == 1) && !continues(in, r, env, k)) segment = {true, true};
  for (size_t k = 0; k < keys_.size(); ++k) {
    if (keys_[k].frames.stack == 1) continue;
    if (!segment.fresh && !cut_at_jumps && !continues(in, r, env, k))
      fail(k, "obs is not next_obs of the step before.");
    if (!slides(in, r, env, k, segment.fresh))
      fail(k, "the older frames of next_obs are not the newer frames of obs.");
  }
  return segment;
}

void Replay::write_frame(size_t k, int64_t env, const uint8_t* observation, int64_t position) {
  ObservationKey& key = keys_[k];
  const int64_t number = key.written[env]++;
  const int64_t slot = env * key.recent.slots + number % key.recent.slots;
  uint8_t* stored = key.recent.data + slot * key.recent.frame_bytes();
  store_frame(key, frame_of(key, observation, position), stored);
  if (key.recent.data != key.frames.data)
    writes_.push_back({k, env * key.frames.slots + number % key.frames.slots, stored});
}

void Replay::append(const RowsIn& in, int64_t r, int64_t env, Segment segment) {
  const int64_t t = tables_.count[env], to = tables_.row(env, t);
  if (segment.cuts_previous) {
    tables_.flags[tables_.row(env, t - 1)] |= kCut;
    tables_.ended[env] = t;
  }
  for (size_t k = 0; k < keys_.size(); ++k) {
    ObservationKey& key = keys_[k];
    const int64_t stack = key.frames.stack;
    const uint8_t* obs = in.obs[k][r];
    if (segment.fresh) {
      // The first stack of an episode is usually one frame repeated, or one frame after black ones. Anything
      // else is stored in full.
      const FrameView newest = frame_of(key, obs, stack - 1);
      bool repeated = true, blank = true;
      for (int64_t j = 0; j + 1 < stack && (repeated || blank); ++j) {
        const FrameView older = frame_of(key, obs, j);
        repeated = repeated && equal_frames(older, newest);
        blank = blank && blank_frame(older);
      }
      const int64_t depth = repeated || blank ? 0 : stack - 1;
      for (int64_t j = stack - 1 - depth; j < stack; ++j) write_frame(k, env, obs, j);
      key.depth[to] = static_cast<uint8_t>(depth | (blank && !repeated ? kZeroPadding : 0));
    } else {
      const StackPlan plan = next_stack(k, env);
      key.depth[to] = static_cast<uint8_t>(plan.depth | (plan.zero_padding ? kZeroPadding : 0));
    }
    key.newest[to] = key.written[env] - 1;
    write_frame(k, env, in.next_obs[k][r], stack - 1);
  }
  for (size_t c = 0; c < columns_.size(); ++c)
    std::memcpy(columns_[c].values.data + to * columns_[c].bytes, in.columns[c][r],
                static_cast<size_t>(columns_[c].bytes));
  tables_.time[to] = segment.fresh ? 0 : tables_.time[tables_.row(env, t - 1)] + 1;
  tables_.reward[to] = in.reward[r];
  tables_.flags[to] =
      static_cast<uint8_t>((in.terminated[r] ? kTerminated : 0) | (in.truncated[r] ? kTruncated : 0));
  tables_.count[env] = t + 1;
  if (tables_.flags[to]) tables_.ended[env] = t + 1;
  evict(env);
}

// Drops transitions whose row or whose oldest frame was overwritten.
void Replay::evict(int64_t env) {
  int64_t& first = tables_.first[env];
  first = std::max(first, tables_.count[env] - tables_.limit(env));
  const auto lost_a_frame = [&](int64_t t) {
    const int64_t at = tables_.row(env, t);
    return std::any_of(keys_.begin(), keys_.end(),
                       [&](const ObservationKey& key) { return key.lost_a_frame(env, at); });
  };
  while (first < tables_.count[env] && lost_a_frame(first)) ++first;
  tables_.ended[env] = std::max(tables_.ended[env], first);
}

void Replay::add(const RowsIn& in, int64_t* ids) {
  segments_.resize(static_cast<size_t>(in.rows));
  if (in.rows > 0) prefetch_check(in, 0, in.env_ids[0]);
  for (int64_t r = 0; r < in.rows; ++r) {
    if (r + 1 < in.rows) prefetch_check(in, r + 1, in.env_ids[r + 1]);
    segments_[r] = check(in, r, in.env_ids[r]);
  }
  for (int64_t r = 0; r < in.rows; ++r) {
    ids[r] = tables_.count[in.env_ids[r]] * num_envs() + in.env_ids[r];
    append(in, r, in.env_ids[r], segments_[r]);
    jumps_ += segments_[r].cuts_previous;
  }
  rows_added_ += in.rows;
  finish_streaming();
}

void Replay::cut(const std::vector<int64_t>& env_ids) {
  for (int64_t env : env_ids) {
    if (tables_.count[env] == tables_.ended[env]) continue;
    tables_.flags[tables_.row(env, tables_.count[env] - 1)] |= kCut;
    tables_.ended[env] = tables_.count[env];
  }
}

}  // namespace covr
