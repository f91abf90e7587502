#include "replay/replay.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "common/half.h"
#include "common/parallel.h"

namespace covr {
namespace {

// Comparing every byte of every stack would cost more than storing the one new frame. Ordinary steps compare
// 256 bytes in every 8 KiB of each frame of obs, other places in each, and as much half a period away of
// next_obs; the places move on each step. Small frames, episode ends and starts are compared in full.
constexpr int64_t kProbe = 256, kProbeEvery = 32, kSmallFrame = 4096;

bool equal_bytes(const uint8_t* a, const uint8_t* b, int64_t n, int64_t phase) {
  if (phase < 0) return std::memcmp(a, b, static_cast<size_t>(n)) == 0;
  constexpr int64_t kStride = kProbe * kProbeEvery;
  for (int64_t i = phase * kProbe; i < n; i += kStride)
    if (std::memcmp(a + i, b + i, static_cast<size_t>(std::min(kProbe, n - i))) != 0) return false;
  return true;
}

// What equal_bytes is about to read: scattered lines, whose latencies overlap if all are asked for at once.
void prefetch_probes(const uint8_t* data, int64_t n, int64_t phase) {
  for (int64_t i = phase * kProbe; i < n; i += kProbe * kProbeEvery)
    for (int64_t j = i; j < std::min(i + kProbe, n); j += 64) __builtin_prefetch(data + j);
}

// A frame of an input observation, whatever its layout: `runs` pieces of `bytes`, `stride` apart.
struct FrameView {
  const uint8_t* data;
  int64_t runs, bytes, stride;
};

FrameView frame_of(const ObservationKey& key, const uint8_t* observation, int64_t position) {
  const FrameLayout& f = key.frames;
  if (!key.input_channels_last)
    return {observation + position * f.frame_bytes(), 1, f.frame_bytes(), f.frame_bytes()};
  const int64_t pixel = f.channels * f.item_bytes;
  return {observation + position * pixel, f.plane_items(), pixel, f.stack * pixel};
}

double number(const uint8_t* item, int64_t bytes) {
  double wide;
  float narrow;
  Float16 half;
  switch (bytes) {
    case 8:
      return std::memcpy(&wide, item, sizeof wide), wide;
    case 4:
      return std::memcpy(&narrow, item, sizeof narrow), static_cast<double>(narrow);
    default:
      return std::memcpy(&half, item, sizeof half), static_cast<double>(to_float(half));
  }
}

// What is computed twice, or rounded on the way, differs in its last bits. Floats a and b count as equal
// where |a - b| <= r (max(|a|, |b|) + 0.1 min(1, m)): r = 1e-5 (float16: 2e-3), m the largest magnitude in
// the frames.
template <typename A, typename B>
bool close_numbers(int64_t n, int64_t item_bytes, const A& a, const B& b) {
  const double tolerance = item_bytes == 2 ? 2e-3 : 1e-5;
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max({largest, std::fabs(a(i)), std::fabs(b(i))});
  for (int64_t i = 0; i < n; ++i) {
    const double x = a(i), y = b(i);
    const double allowed = tolerance * (std::max(std::fabs(x), std::fabs(y)) + 0.1 * std::min(1.0, largest));
    if (!(std::fabs(x - y) <= allowed)) return false;
  }
  return true;
}

// Item i of a frame, counted as it lies in the input.
double input_number(const ObservationKey& key, const FrameView& in, int64_t i) {
  const int64_t per_run = in.bytes / key.frames.item_bytes;
  return number(in.data + i / per_run * in.stride + i % per_run * key.frames.item_bytes,
                key.frames.item_bytes);
}

bool close_frames(const ObservationKey& key, const FrameView& a, const FrameView& b) {
  return key.floating && close_numbers(
                             key.frames.frame_items(), key.frames.item_bytes,
                             [&](int64_t i) { return input_number(key, a, i); },
                             [&](int64_t i) { return input_number(key, b, i); });
}

// An input frame against a stored one, which is channels-first; nullptr is the blank frame.
bool close_stored(const ObservationKey& key, const FrameView& in, const uint8_t* stored) {
  if (!key.floating) return false;
  const int64_t per_run = in.bytes / key.frames.item_bytes, bytes = key.frames.item_bytes;
  return close_numbers(
      key.frames.frame_items(), bytes, [&](int64_t i) { return input_number(key, in, i); },
      [&](int64_t i) {
        return stored ? number(stored + (i % per_run * in.runs + i / per_run) * bytes, bytes) : 0.0;
      });
}

bool equal_frames(const FrameView& a, const FrameView& b) {
  for (int64_t i = 0; i < a.runs; ++i)
    if (std::memcmp(a.data + i * a.stride, b.data + i * b.stride, static_cast<size_t>(a.bytes)) != 0)
      return false;
  return true;
}

bool blank_frame(const FrameView& a) {
  for (int64_t i = 0; i < a.runs; ++i) {
    const uint8_t* run = a.data + i * a.stride;
    if (std::any_of(run, run + a.bytes, [](uint8_t byte) { return byte != 0; })) return false;
  }
  return true;
}

// An input frame against a stored one, which is channels-first; nullptr is the blank frame.
bool equal_stored(const ObservationKey& key, const FrameView& in, const uint8_t* stored, int64_t phase) {
  if (!stored) return blank_frame(in);
  if (in.runs == 1) return equal_bytes(in.data, stored, in.bytes, phase);
  const FrameLayout& f = key.frames;
  const int64_t step = phase < 0 ? 1 : kProbeEvery;
  for (int64_t i = std::max<int64_t>(phase, 0); i < in.runs; i += step)
    for (int64_t c = 0; c < f.channels; ++c)
      if (std::memcmp(in.data + i * in.stride + c * f.item_bytes, stored + (c * in.runs + i) * f.item_bytes,
                      static_cast<size_t>(f.item_bytes)) != 0)
        return false;
  return true;
}

void store_frame(const ObservationKey& key, const FrameView& in, uint8_t* stored) {
  const FrameLayout& f = key.frames;
  if (in.runs == 1) {
    // A large frame is read again much later, if at all.
    if (in.bytes > kSmallFrame)
      copy_streaming(in.data, stored, in.bytes);
    else
      std::memcpy(stored, in.data, static_cast<size_t>(in.bytes));
  } else if (f.item_bytes == 1) {
    for (int64_t c = 0; c < f.channels; ++c)
      for (int64_t i = 0; i < in.runs; ++i) stored[c * in.runs + i] = in.data[i * in.stride + c];
  } else {
    for (int64_t c = 0; c < f.channels; ++c)
      for (int64_t i = 0; i < in.runs; ++i)
        std::memcpy(stored + (c * in.runs + i) * f.item_bytes, in.data + i * in.stride + c * f.item_bytes,
                    static_cast<size_t>(f.item_bytes));
  }
}

constexpr const char* kContractRemedy =
    " Frame stacks must slide: obs is next_obs of the step before, and next_obs is obs without its oldest "
    "frame "
    "plus one new frame, oldest first. If the environment was reset without terminated or truncated, call "
    "cut(env_ids) first; at the end of an episode pass the final observation, not the first of the next "
    "episode; "
    "if these are no stacks, build the buffer with frame_stack=1, which stores observations as they are.";

}  // namespace

Replay::Replay(int64_t capacity, int64_t num_envs, int64_t n_step, double gamma, int64_t* count,
               int64_t* first, int64_t* ended, float* reward, uint8_t* flags, int32_t* time)
    : num_envs_(num_envs),
      n_step_(n_step),
      rows_per_stream_((capacity + num_envs - 1) / num_envs),
      limit_(capacity / num_envs),
      longer_streams_(capacity % num_envs),
      gamma_(gamma),
      count_(count),
      first_(first),
      ended_(ended),
      reward_(reward),
      flags_(flags),
      time_(time) {}

int64_t Replay::add_key(ObservationKey key) {
  keys_.push_back(std::move(key));
  return static_cast<int64_t>(keys_.size()) - 1;
}

int64_t Replay::size() const {
  int64_t total = 0;
  for (int64_t e = 0; e < num_envs_; ++e) total += count_[e] - first_[e];
  return total;
}

// Transition t is complete when n steps follow it or its episode ends within them. Both are monotone in t, so
// what may be sampled of a stream is the contiguous range [first, ready_end).
int64_t Replay::ready_end(int64_t env) const {
  return std::max({first_[env], ended_[env], count_[env] - n_step_ + 1});
}

int64_t Replay::samplable() const {
  int64_t total = 0;
  for (int64_t e = 0; e < num_envs_; ++e) total += ready_end(e) - first_[e];
  return total;
}

int64_t Replay::find(int64_t id) const {
  if (id < 0) return -1;
  const int64_t env = id % num_envs_, t = id / num_envs_;
  return t >= first_[env] && t < count_[env] ? row(env, t) : -1;
}

int64_t Replay::find_ready(int64_t id) const {
  if (id < 0) return -1;
  const int64_t env = id % num_envs_, t = id / num_envs_;
  return t >= first_[env] && t < ready_end(env) ? row(env, t) : -1;
}

int64_t Replay::id_in_row(int64_t row) const {
  const int64_t env = row / rows_per_stream_, position = row % rows_per_stream_, size = limit(env);
  const int64_t last = count_[env] - 1;
  if (position >= size || last < 0) return -1;
  const int64_t in_last = last % size;  // the ring's newest position
  const int64_t t = last - in_last + position - (position > in_last ? size : 0);
  return t >= first_[env] ? t * num_envs_ + env : -1;
}

// The stack that the stream's next obs must show: that of the latest next_obs.
StackPlan Replay::stack_after(int64_t key, int64_t env) const {
  const ObservationKey& k = keys_[static_cast<size_t>(key)];
  const uint8_t depth = k.depth[row(env, count_[env] - 1)];
  StackPlan plan{};
  plan.newest = k.written[env] - 1;
  plan.depth = static_cast<int16_t>(std::min<int64_t>((depth & ~kZeroPadding) + 1, k.frames.stack - 1));
  plan.zero_padding = (depth & kZeroPadding) != 0;
  return plan;
}

// Which part of older frames to compare: all of it (-1) where the contract usually breaks, else one probe in
// kProbeEvery, another one each step.
int64_t Replay::probe_phase(const RowsIn& in, int64_t r, int64_t env, size_t k) const {
  const FrameLayout& frames = keys_[k].frames;
  const bool small = frames.frame_bytes() <= kSmallFrame;
  const StackPlan expected = stack_after(static_cast<int64_t>(k), env);
  const bool all = cut_at_jumps || small || frames.stack == 1 || expected.depth < frames.stack - 1 ||
                   in.terminated[r] || in.truncated[r];
  return all ? -1 : count_[env] % kProbeEvery;
}

// The phase in which frame `position` of obs is compared, or with `next` that of next_obs.
int64_t Replay::frame_phase(int64_t phase, int64_t position, bool next) {
  constexpr int64_t kApart = 5;  // coprime with the period, so that no two frames of a stack share a place
  return phase < 0 ? phase : (phase + kApart * position + (next ? kProbeEvery / 2 : 0)) % kProbeEvery;
}

// Asks for the memory that check() is about to compare.
void Replay::prefetch_check(const RowsIn& in, int64_t r, int64_t env) const {
  for (size_t k = 0; k < keys_.size() && count_[env] != ended_[env]; ++k) {
    const int64_t phase = probe_phase(in, r, env, k), bytes = keys_[k].frames.frame_bytes();
    if (phase < 0 || keys_[k].input_channels_last) continue;
    for (int64_t j = 0; j < keys_[k].frames.stack; ++j) {
      const uint8_t* stored = expected_frame(k, env, j);
      const int64_t in_obs = frame_phase(phase, j, false), in_next = frame_phase(phase, j - 1, true);
      prefetch_probes(in.obs[k] + r * in.obs_stride[k] + j * bytes, bytes, in_obs);
      prefetch_probes(stored, bytes, in_obs);
      if (j == 0) continue;
      prefetch_probes(in.next_obs[k] + r * in.next_obs_stride[k] + (j - 1) * bytes, bytes, in_next);
      prefetch_probes(stored, bytes, in_next);
    }
  }
}

// The stored frame that must be at `position` of the stream's next obs; nullptr is the blank frame.
const uint8_t* Replay::expected_frame(size_t k, int64_t env, int64_t position) const {
  const FrameLayout& recent = keys_[k].recent;
  StackPlan expected = stack_after(static_cast<int64_t>(k), env);
  expected.stream_slot = env * recent.slots;
  const int64_t slot = stack_slot(expected, recent.slots, recent.stack - 1 - position);
  return slot == kBlankFrame ? nullptr : recent.data + slot * recent.frame_bytes();
}

bool Replay::continues(const RowsIn& in, int64_t r, int64_t env, size_t k) const {
  const uint8_t* obs = in.obs[k] + r * in.obs_stride[k];
  const int64_t phase = probe_phase(in, r, env, k);
  for (int64_t j = 0; j < keys_[k].frames.stack; ++j) {
    const FrameView frame = frame_of(keys_[k], obs, j);
    const uint8_t* stored = expected_frame(k, env, j);
    if (!equal_stored(keys_[k], frame, stored, frame_phase(phase, j, false)) &&
        !close_stored(keys_[k], frame, stored))
      return false;
  }
  return true;
}

bool Replay::slides(const RowsIn& in, int64_t r, int64_t env, size_t k, bool fresh) const {
  const ObservationKey& key = keys_[k];
  const uint8_t* obs = in.obs[k] + r * in.obs_stride[k];
  const uint8_t* next = in.next_obs[k] + r * in.next_obs_stride[k];
  const int64_t phase = fresh ? -1 : probe_phase(in, r, env, k);
  for (int64_t j = 0; j + 1 < key.frames.stack; ++j) {
    const FrameView older = frame_of(key, next, j);
    if (fresh) {
      const FrameView newer = frame_of(key, obs, j + 1);
      if (!equal_frames(older, newer) && !close_frames(key, older, newer)) return false;
    } else {
      const uint8_t* stored = expected_frame(k, env, j + 1);
      if (!equal_stored(key, older, stored, frame_phase(phase, j, true)) && !close_stored(key, older, stored))
        return false;
    }
  }
  return true;
}

Replay::Segment Replay::check(const RowsIn& in, int64_t r, int64_t env) const {
  const auto fail = [&](size_t k, const char* what) {
    throw FrameStackError("observation '" + keys_[k].name + "' of row " + std::to_string(r) +
                          " (environment " + std::to_string(env) + "): " + what + kContractRemedy);
  };
  Segment segment{count_[env] == ended_[env], false};
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
  uint8_t* stored = const_cast<uint8_t*>(key.recent.data) + slot * key.recent.frame_bytes();
  store_frame(key, frame_of(key, observation, position), stored);
  if (key.recent.data != key.frames.data)
    writes_.push_back({static_cast<int64_t>(k), env * key.frames.slots + number % key.frames.slots, stored});
}

void Replay::append(const RowsIn& in, int64_t r, int64_t env, Segment segment) {
  const int64_t t = count_[env], to = row(env, t);
  if (segment.cuts_previous) {
    flags_[row(env, t - 1)] |= kCut;
    ended_[env] = t;
  }
  for (size_t k = 0; k < keys_.size(); ++k) {
    ObservationKey& key = keys_[k];
    const int64_t stack = key.frames.stack;
    const uint8_t* obs = in.obs[k] + r * in.obs_stride[k];
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
      const StackPlan plan = stack_after(static_cast<int64_t>(k), env);
      key.depth[to] = static_cast<uint8_t>(plan.depth | (plan.zero_padding ? kZeroPadding : 0));
    }
    key.newest[to] = key.written[env] - 1;
    write_frame(k, env, in.next_obs[k] + r * in.next_obs_stride[k], stack - 1);
  }
  for (size_t c = 0; c < columns_.size(); ++c)
    std::memcpy(columns_[c].data + to * columns_[c].bytes, in.columns[c] + r * columns_[c].bytes,
                static_cast<size_t>(columns_[c].bytes));
  time_[to] = segment.fresh ? 0 : time_[row(env, t - 1)] + 1;
  reward_[to] = in.reward[r];
  flags_[to] =
      static_cast<uint8_t>((in.terminated[r] ? kTerminated : 0) | (in.truncated[r] ? kTruncated : 0));
  count_[env] = t + 1;
  if (flags_[to]) ended_[env] = t + 1;
  evict(env);
}

// Drops transitions whose row or whose oldest frame was overwritten.
void Replay::evict(int64_t env) {
  int64_t& first = first_[env];
  first = std::max(first, count_[env] - limit(env));
  const auto lost_a_frame = [&](int64_t t) {
    const int64_t at = row(env, t);
    return std::any_of(keys_.begin(), keys_.end(), [&](const ObservationKey& key) {
      return key.newest[at] - (key.depth[at] & ~kZeroPadding) < key.written[env] - key.frames.slots;
    });
  };
  while (first < count_[env] && lost_a_frame(first)) ++first;
  ended_[env] = std::max(ended_[env], first);
}

void Replay::add(const RowsIn& in, int64_t* ids) {
  segments_.resize(static_cast<size_t>(in.rows));
  const auto env_of = [&](int64_t r) { return in.env_ids ? in.env_ids[r] : r; };
  if (in.rows > 0) prefetch_check(in, 0, env_of(0));
  for (int64_t r = 0; r < in.rows; ++r) {
    if (r + 1 < in.rows) prefetch_check(in, r + 1, env_of(r + 1));
    segments_[static_cast<size_t>(r)] = check(in, r, env_of(r));
  }
  for (int64_t r = 0; r < in.rows; ++r) {
    ids[r] = count_[env_of(r)] * num_envs_ + env_of(r);
    append(in, r, env_of(r), segments_[static_cast<size_t>(r)]);
    jumps_ += segments_[static_cast<size_t>(r)].cuts_previous;
  }
  rows_added_ += in.rows;
  finish_streaming();
}

void Replay::cut(const int64_t* env_ids, int64_t n) {
  for (int64_t i = 0; i < (env_ids ? n : num_envs_); ++i) {
    const int64_t env = env_ids ? env_ids[i] : i;
    if (count_[env] == ended_[env]) continue;
    flags_[row(env, count_[env] - 1)] |= kCut;
    ended_[env] = count_[env];
  }
}

std::vector<FrameWrite> Replay::take_writes() { return std::exchange(writes_, {}); }

const FrameLayout& Replay::frames(int64_t key) const { return keys_[static_cast<size_t>(key)].frames; }

void Replay::draw(uint64_t seed, uint64_t batch, double recency, int64_t recency_floor, int64_t* ids,
                  int64_t n) const {
  std::vector<int64_t> before(static_cast<size_t>(num_envs_) + 1,
                              0);  // samplable transitions of earlier streams
  for (int64_t e = 0; e < num_envs_; ++e)
    before[static_cast<size_t>(e) + 1] = before[static_cast<size_t>(e)] + ready_end(e) - first_[e];
  const int64_t total = before.back();
  if (total == 0) throw std::out_of_range(kNothingToSample);
  for (int64_t i = 0; i < n; ++i) {
    const Random128 random = philox(seed, batch, static_cast<uint32_t>(i), kDrawIndex);
    const int64_t pick =
        static_cast<int64_t>(below(random.word[0], random.word[1], static_cast<uint64_t>(total)));
    const int64_t env = std::upper_bound(before.begin(), before.end(), pick) - before.begin() - 1;
    const int64_t size = before[static_cast<size_t>(env) + 1] - before[static_cast<size_t>(env)];
    int64_t age = pick - before[static_cast<size_t>(env)];
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
  for (int64_t i = 0; i < out.rows; ++i) {
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
      std::memcpy(out.columns[c] + i * columns_[c].bytes, columns_[c].data + at * columns_[c].bytes,
                  static_cast<size_t>(columns_[c].bytes));
    if (out.offsets) {
      const Random128 random = philox(seed, batch, static_cast<uint32_t>(i), kDrawShift);
      for (int64_t j = 0; j < 4; ++j)
        out.offsets[(j / 2) * out.rows * 2 + i * 2 + j % 2] =
            below(random.word[j], static_cast<uint32_t>(out.offset_range));
    }
  }
}

void Replay::plan(int64_t key, const BatchOut& out, StackPlan* obs, StackPlan* next_obs) const {
  const ObservationKey& k = keys_[static_cast<size_t>(key)];
  const auto shift = [&](StackPlan& plan, int64_t which, int64_t i) {
    if (!out.offsets) return;
    const int64_t* yx = out.offsets + which * out.rows * 2 + i * 2;
    plan.shift_y = static_cast<int16_t>(yx[0] - out.shift_origin);
    plan.shift_x = static_cast<int16_t>(yx[1] - out.shift_origin);
  };
  for (int64_t i = 0; i < out.rows; ++i) {
    const int64_t env = out.ids[i] % num_envs_, t = out.ids[i] / num_envs_;
    StackPlan plan{};
    plan.stream_slot = env * k.frames.slots;
    const auto point_at = [&](int64_t at) {
      plan.newest = k.newest[at];
      plan.depth = static_cast<int16_t>(k.depth[at] & ~kZeroPadding);
      plan.zero_padding = (k.depth[at] & kZeroPadding) != 0;
    };
    point_at(row(env, t));
    obs[i] = plan;
    shift(obs[i], 0, i);
    if (!next_obs) continue;
    point_at(row(env, t + steps(env, t, out.n_step) - 1));
    plan.newest += 1;
    plan.depth = static_cast<int16_t>(std::min<int64_t>(plan.depth + 1, k.frames.stack - 1));
    next_obs[i] = plan;
    shift(next_obs[i], 1, i);
  }
}

void Replay::gather_key(int64_t key, const BatchOut& out, int threads) const {
  const KeyOut& to = out.keys[static_cast<size_t>(key)];
  const FrameLayout& frames = keys_[static_cast<size_t>(key)].frames;
  std::vector<StackPlan> plans(static_cast<size_t>(out.rows) * 2);
  StackPlan* next_plans = to.next_obs ? plans.data() + out.rows : nullptr;
  plan(key, out, plans.data(), next_plans);
  for (const StackPlan& plan : plans)
    __builtin_prefetch(frames.data + stack_slot(plan, frames.slots, 0) * frames.frame_bytes());
  const int64_t bytes = to.target.row_bytes(frames);
  // Batches that fit the last-level cache are about to be read from it.
  const bool streaming = out.rows * bytes > (4 << 20);
  parallel_for(out.rows, 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      gather_observation(frames, plans[static_cast<size_t>(i)], to.target, to.obs + i * bytes, streaming);
      // Right after obs: most of its frames are the same and still in the cache.
      if (to.next_obs)
        gather_observation(frames, next_plans[i], to.target, to.next_obs + i * bytes, streaming);
    }
    if (streaming) finish_streaming();
  });
}

}  // namespace covr
