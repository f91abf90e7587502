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
constexpr const char* kNotContinuedText = "obs is not next_obs of the step before.";
constexpr const char* kNotSlidingText = "the older frames of next_obs are not the newer frames of obs.";

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

// What the row is, before anything is written.
RowRecord Replay::check(const RowsIn& in, int64_t r, int64_t env) const {
  const auto fail = [&](size_t k, const char* what) {
    throw FrameStackError(contradiction(k, r, env, what));
  };
  RowRecord row{env, tables_.count[env], in.reward[r]};
  row.flags = static_cast<uint8_t>((in.terminated[r] ? kTerminated : 0) | (in.truncated[r] ? kTruncated : 0));
  row.fresh = tables_.count[env] == tables_.ended[env];
  // A single frame cannot contradict a stream: a jump is stored as the start of a new segment.
  for (size_t k = 0; k < keys_.size() && !row.fresh; ++k)
    if ((cut_at_jumps || keys_[k].frames.stack == 1) && !continues(in, r, env, k))
      row.fresh = row.cuts_previous = true;
  for (size_t k = 0; k < keys_.size(); ++k) {
    if (keys_[k].frames.stack == 1) continue;
    if (!row.fresh && !cut_at_jumps && !continues(in, r, env, k)) fail(k, kNotContinuedText);
    if (!slides(in, r, env, k, row.fresh)) fail(k, kNotSlidingText);
  }
  return row;
}

std::string Replay::contradiction(size_t k, int64_t row, int64_t env, const char* what) const {
  return "observation '" + keys_[k].name + "' of row " + std::to_string(row) + " (environment " +
         std::to_string(env) + "): " + what + kContractRemedy;
}

// Which frames of key k the row writes.
KeyRecord Replay::new_frames(const RowsIn& in, int64_t r, const RowRecord& row, size_t k) const {
  const ObservationKey& key = keys_[k];
  const int64_t stack = key.frames.stack;
  KeyRecord record{key.written[row.env], kNoSource, 0};
  if (!row.fresh) {
    const StackPlan plan = next_stack(k, row.env);
    record.depth = static_cast<uint8_t>(plan.depth | (plan.zero_padding ? kZeroPadding : 0));
    return record;
  }
  // The first stack of an episode is usually one frame repeated, or one frame after black ones. Anything else
  // is stored in full.
  const uint8_t* obs = in.obs[k][r];
  const FrameView newest = frame_of(key, obs, stack - 1);
  bool repeated = true, blank = true;
  for (int64_t j = 0; j + 1 < stack && (repeated || blank); ++j) {
    const FrameView older = frame_of(key, obs, j);
    repeated = repeated && equal_frames(older, newest);
    blank = blank && blank_frame(older);
  }
  record.depth = first_depth(stack, repeated, blank);
  return record;
}

// Writes the row's frames of key k to where the CPU reads, and, unless samples are read from there, to
// `block`.
void Replay::write_frames(const RowsIn& in, int64_t r, const RowRecord& row, size_t k,
                          const KeyRecord& record, uint8_t* block) {
  const ObservationKey& key = keys_[k];
  const int64_t frames = record.frames(row), bytes = key.recent.frame_bytes(), stack = key.frames.stack;
  for (int64_t i = 0; i < frames; ++i) {
    const bool last = i + 1 == frames;
    const FrameView frame = last ? frame_of(key, in.next_obs[k][r], stack - 1)
                                 : frame_of(key, in.obs[k][r], stack - frames + 1 + i);
    const int64_t slot = row.env * key.recent.slots + (record.first + i) % key.recent.slots;
    uint8_t* stored = key.recent.data + slot * bytes;
    store_frame(key, frame, stored);
    if (record.source != kNoSource)
      std::memcpy(block + record.source + i * bytes, stored, static_cast<size_t>(bytes));
  }
}

void Replay::add(const RowsIn& in, int64_t* ids, const TakeBlock& take_block) {
  const auto num_keys = static_cast<int64_t>(keys_.size());
  records_.resize(static_cast<size_t>(in.rows));
  key_records_.resize(static_cast<size_t>(in.rows * num_keys));
  if (in.rows > 0) prefetch_check(in, 0, in.env_ids[0]);
  for (int64_t r = 0; r < in.rows; ++r) {
    if (r + 1 < in.rows) prefetch_check(in, r + 1, in.env_ids[r + 1]);
    records_[r] = check(in, r, in.env_ids[r]);
  }
  const BlockLayout layout(in.rows, num_keys);
  int64_t bytes = layout.column(columns_, static_cast<int64_t>(columns_.size()));
  for (int64_t r = 0; r < in.rows; ++r)
    for (int64_t k = 0; k < num_keys; ++k) {
      KeyRecord& record = key_records_[r * num_keys + k] = new_frames(in, r, records_[r], k);
      if (!take_block || keys_[k].recent.data == keys_[k].frames.data) continue;
      record.source = bytes;
      bytes += BlockLayout::aligned(record.frames(records_[r]) * keys_[k].frames.frame_bytes());
    }
  uint8_t* block = take_block ? take_block(bytes) : nullptr;  // may throw: nothing is written yet
  for (int64_t r = 0; r < in.rows; ++r) {
    const RowRecord& row = records_[r];
    ids[r] = tables_.id(row.env, row.t);
    const int64_t to = tables_.row(row.env, row.t);
    for (int64_t k = 0; k < num_keys; ++k) write_frames(in, r, row, k, key_records_[r * num_keys + k], block);
    for (size_t c = 0; c < columns_.size(); ++c)
      std::memcpy(columns_[c].values.data + to * columns_[c].bytes, in.columns[c][r],
                  static_cast<size_t>(columns_[c].bytes));
    apply_row(tables_, keys_, num_keys, row, &key_records_[r * num_keys]);
    jumps_ += row.cuts_previous;
  }
  rows_added_ += in.rows;
  if (block) {
    const Block out{block, layout};
    out.refusal() = kAccepted;
    std::copy(records_.begin(), records_.end(), &out.row(0));
    std::copy(key_records_.begin(), key_records_.end(), out.keys(0));
    for (size_t c = 0; c < columns_.size(); ++c)
      for (int64_t r = 0; r < in.rows; ++r)
        std::memcpy(block + layout.column(columns_, c) + r * columns_[c].bytes, in.columns[c][r],
                    static_cast<size_t>(columns_[c].bytes));
  }
  finish_streaming();
}

// Rows that a kernel has added to device memory, in the order in which it did.
void Replay::follow(const Block& block) {
  if (const int64_t code = block.refusal(); code != kAccepted) return refuse(code, block);
  for (int64_t r = 0; r < block.layout.rows; ++r) {
    const RowRecord& row = block.row(r);
    const int64_t to = tables_.row(row.env, row.t);
    for (size_t c = 0; c < columns_.size(); ++c)
      std::memcpy(columns_[c].values.data + to * columns_[c].bytes,
                  block.data + block.layout.column(columns_, c) + r * columns_[c].bytes,
                  static_cast<size_t>(columns_[c].bytes));
    apply_row(tables_, keys_, static_cast<int64_t>(keys_.size()), row, block.keys(r));
    jumps_ += row.cuts_previous;
  }
  rows_added_ += block.layout.rows;
}

void Replay::refuse(int64_t code, const Block& block) const {
  const auto why = static_cast<Refusal>(code & 0xff);
  const int64_t argument = code >> 8 & 0xffff, r = code >> 24, env = block.row(r).env;
  const std::string row = " of row " + std::to_string(r), nothing = "; nothing of that call was added";
  switch (why) {
    case Refusal::kNotContinued:
      throw FrameStackError(contradiction(argument, r, env, kNotContinuedText));
    case Refusal::kNotSliding:
      throw FrameStackError(contradiction(argument, r, env, kNotSlidingText));
    case Refusal::kEnvironment:
      throw std::invalid_argument("env_ids[" + std::to_string(r) + "] = " + std::to_string(env) +
                                  " is not in [0, num_envs = " + std::to_string(num_envs()) + ")" + nothing);
    case Refusal::kTwice:
      throw std::invalid_argument("env_ids contains " + std::to_string(env) +
                                  " twice: add the steps of one environment in separate calls, in order" +
                                  nothing);
    default:
      throw std::invalid_argument(argument_name(argument) + row + " is NaN, infinite or too large" + nothing +
                                  "; mend where it comes from");
  }
}

// As kernels count the arguments of add(): the reward, obs and next_obs of each key, the columns.
std::string Replay::argument_name(int64_t argument) const {
  const auto num_keys = static_cast<int64_t>(keys_.size());
  if (argument == kRewardArgument) return "reward";
  if (argument < first_column(num_keys))
    return (argument % 2 ? "obs '" : "next_obs '") + keys_[(argument - 1) / 2].name + "'";
  return columns_[argument - first_column(num_keys)].name;
}

void Replay::cut(const std::vector<int64_t>& env_ids) {
  for (int64_t env : env_ids) {
    if (tables_.count[env] == tables_.ended[env]) continue;
    tables_.flags[tables_.row(env, tables_.count[env] - 1)] |= kCut;
    tables_.ended[env] = tables_.count[env];
  }
}

}  // namespace covr
