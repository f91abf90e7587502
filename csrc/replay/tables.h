// The bookkeeping of a replay buffer as plain pointers, and what is read off it: which transitions are
// stored, which may be sampled, their n-step returns, and how their observations are rebuilt. The pointers
// are to host memory (replay.h), or to its mirror in device memory, which only kernels may follow.
//
// Every environment is a stream. A stream numbers its transitions 0, 1, 2, ...; transition t lies in row
// `env * rows_per_stream + t % limit`. Its public id, `t * num_envs + env`, is never reused, so an id whose
// transition was overwritten is recognised.
#pragma once

#include "common/macros.h"
#include "replay/gather.h"
#include "replay/gather_index.h"

namespace covr {

// Transition flags.
constexpr uint8_t kTerminated = 1, kTruncated = 2, kCut = 4;  // kCut: the stream broke off after this one
constexpr uint8_t kEnd = kTerminated | kTruncated | kCut;

constexpr uint8_t kZeroPadding = 0x80;  // of a depth: see KeyTable

// Products and sums as written: compilers for a GPU would fuse them into one rounding, and the results would
// not be those of the CPU.
COVR_HD double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

COVR_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
COVR_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A return over the steps from one transition on.
struct NStepReturn {
  float reward;
  float discount;  // of the value of what follows; 0 after a termination
  bool terminated, truncated;
  int64_t steps;
};

struct Tables {
  int64_t num_envs = 0, n_step = 1, rows_per_stream = 0;
  int64_t shorter_limit = 0, longer_streams = 0;  // these first streams have room for one transition more
  double gamma = 1;
  int64_t *count = nullptr, *first = nullptr, *ended = nullptr;  // [num_envs]
  float* reward = nullptr;                                       // [rows]
  uint8_t* flags = nullptr;                                      // [rows]
  int32_t* time = nullptr;                                       // [rows] steps since the episode began

  COVR_HD int64_t rows() const { return num_envs * rows_per_stream; }
  COVR_HD int64_t limit(int64_t env) const { return shorter_limit + (env < longer_streams); }
  COVR_HD int64_t row(int64_t env, int64_t t) const { return env * rows_per_stream + t % limit(env); }
  COVR_HD int64_t id(int64_t env, int64_t t) const { return t * num_envs + env; }

  // Transition t is complete when n steps follow it or its episode ends within them. Both are monotone in t,
  // so what may be sampled of a stream is the contiguous range [first, ready_end).
  COVR_HD int64_t ready_end(int64_t env) const {
    return larger(larger(first[env], ended[env]), count[env] - n_step + 1);
  }
  COVR_HD int64_t ready(int64_t env) const { return ready_end(env) - first[env]; }

  // The row of an id, or -1 if that transition is not stored.
  COVR_HD int64_t find(int64_t id) const {
    if (id < 0) return -1;
    const int64_t env = id % num_envs, t = id / num_envs;
    return t >= first[env] && t < count[env] ? row(env, t) : -1;
  }
  // The same, or -1 if its n steps are not complete.
  COVR_HD int64_t find_ready(int64_t id) const {
    const int64_t row = find(id);
    return row >= 0 && id / num_envs < ready_end(id % num_envs) ? row : -1;
  }
  // The id of the transition in a row, or -1.
  COVR_HD int64_t id_in_row(int64_t row) const {
    const int64_t env = row / rows_per_stream, position = row % rows_per_stream, size = limit(env);
    const int64_t last = count[env] - 1;
    if (position >= size || last < 0) return -1;
    const int64_t in_last = last % size;  // the ring's newest position
    const int64_t t = last - in_last + position - (position > in_last ? size : 0);
    return t >= first[env] ? id(env, t) : -1;
  }

  // The return over `n` steps from t, or fewer where its episode, or what was added so far, ends.
  COVR_HD NStepReturn n_step_return(int64_t env, int64_t t, int64_t n) const {
    const int64_t most = smaller(n, count[env] - t), size = limit(env);
    const int64_t begin = env * rows_per_stream;
    int64_t place = t % size, steps = 0;
    double sum = 0, factor = 1;
    uint8_t last = 0;
    do {
      sum += product(factor, static_cast<double>(reward[begin + place]));
      factor = product(factor, gamma);
      last = flags[begin + place];
      place = place + 1 == size ? 0 : place + 1;
    } while (++steps < most && !(last & kEnd));
    return {static_cast<float>(sum), last & kTerminated ? 0.0f : static_cast<float>(factor),
            (last & kTerminated) != 0, (last & kTruncated) != 0, steps};
  }
};

// One observation key.
struct KeyTable {
  FrameLayout frames;          // the ring that samples are read from
  int64_t* written = nullptr;  // [num_envs] frames written so far
  int64_t* newest = nullptr;   // [rows] number of the newest frame of obs
  uint8_t* depth = nullptr;    // [rows] older frames stored for obs; kZeroPadding is added to it

  // How obs of the transition in `row` is rebuilt from the ring that begins at stream_slot, or its next_obs,
  // which has one newer frame.
  COVR_HD StackPlan plan(int64_t row, int64_t stream_slot, bool next) const {
    const int64_t older = smaller((depth[row] & ~kZeroPadding) + next, frames.stack - 1);
    const bool zero_padding = depth[row] & kZeroPadding;
    return {stream_slot, newest[row] + next, static_cast<int16_t>(older), zero_padding, 0, 0};
  }
  // Whether the oldest frame of obs of the stream's transition in `row` was overwritten.
  COVR_HD bool lost_a_frame(int64_t env, int64_t row) const {
    return newest[row] - (depth[row] & ~kZeroPadding) < written[env] - frames.slots;
  }
};

// The values of one column, `bytes` per row.
struct ColumnTable {
  uint8_t* values = nullptr;
  int64_t bytes = 0;
};

// Where "recent" draws come from: the part recency^u of every stream, u uniform in [0, 1), but at least
// `floor` transitions in all. The power is a product, which every machine rounds alike.
struct Recency {
  static constexpr int kDigits = 6, kDigitBits = 4;  // of u, in base 16
  bool uniform = true;                               // draw from everything instead
  int64_t floor = 1;
  double powers[kDigits][1 << kDigitBits] = {};  // [k][d]: recency^(d / 16^(k + 1))

  COVR_HD double part(uint32_t random, int64_t total) const {
    if (uniform) return 1.0;
    double power = 1;
    for (int k = 0; k < kDigits; ++k)
      power = product(power, powers[k][random >> (32 - kDigitBits * (k + 1)) & ((1u << kDigitBits) - 1)]);
    const double least = static_cast<double>(floor) / static_cast<double>(total);
    return power > least ? power : least < 1.0 ? least : 1.0;
  }
};

// One of the `total` transitions that may be sampled, counted stream by stream, before its stream is known.
struct Draw {
  int64_t place;
  double part;  // draws come from the latest `part` of the stream
};

COVR_HD Draw draw_place(uint64_t seed, uint64_t batch, int64_t i, int64_t total, const Recency& recency) {
  const Random128 random = philox(seed, batch, static_cast<uint32_t>(i), kDrawIndex);
  const auto place = below(random.word[0], random.word[1], static_cast<uint64_t>(total));
  return {static_cast<int64_t>(place), recency.part(random.word[2], total)};
}

// The id drawn, once the stream is known in which the draw lies, and how many transitions the ones before it
// have.
COVR_HD int64_t drawn_id(const Tables& tables, const Draw& draw, const Recency& recency, int64_t env,
                         int64_t before) {
  const int64_t offset = draw.place - before;
  if (recency.uniform) return tables.id(env, tables.first[env] + offset);
  const auto age = static_cast<int64_t>(product(static_cast<double>(offset), draw.part));
  return tables.id(env, tables.ready_end(env) - 1 - age);
}

// The augmentation's offsets of row i of a batch: y and x of obs, then of next_obs.
struct Offsets {
  int64_t of[4];
};

COVR_HD Offsets draw_offsets(uint64_t seed, uint64_t batch, int64_t i, const Augmentation& augmentation) {
  const Random128 random = philox(seed, batch, static_cast<uint32_t>(i), kDrawShift);
  Offsets offsets{};
  const auto range = static_cast<uint32_t>(augmentation.range);
  for (int j = 0; j < 4; ++j) offsets.of[j] = below(random.word[augmentation.translate ? j % 2 : j], range);
  return offsets;
}

// The jitter of row i of a prioritized batch, in [0, 1).
COVR_HD double draw_jitter(uint64_t seed, uint64_t batch, int64_t i) {
  const Random128 random = philox(seed, batch, static_cast<uint32_t>(i), kDrawIndex);
  return unit(random.word[0], random.word[1]);
}

}  // namespace covr
