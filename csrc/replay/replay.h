// Bookkeeping of the replay buffer: which transition lives where, which of them may be sampled, and which
// frames rebuild its observations. All memory belongs to the caller (torch tensors); this class knows
// addresses.
//
// Every environment is a stream. A stream numbers its transitions 0, 1, 2, ...; transition t lies in row
// `env * rows_per_stream + t % limit`. Its public id, `t * num_envs + env`, is never reused, so an id whose
// transition was overwritten is recognised as such. Observations are stacks of single frames from a second,
// slightly longer ring per stream: an episode of n transitions has n + 1 frames.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "replay/gather.h"
#include "replay/shared_lock.h"

namespace covr {

// Transition flags.
constexpr uint8_t kTerminated = 1, kTruncated = 2, kCut = 4;  // kCut: the stream broke off after this one
constexpr uint8_t kEnd = kTerminated | kTruncated | kCut;

// One observation key.
struct ObservationKey {
  std::string name;
  FrameLayout frames;  // the ring that samples are read from; on a GPU, a device address
  FrameLayout recent;  // the same frames where the CPU can read the latest `stack` of each stream
  bool input_channels_last = false;
  bool floating = false;       // observations are compared as numbers then, not as bytes
  int64_t* written = nullptr;  // [num_envs] frames written so far
  int64_t* newest = nullptr;   // [rows] number of the newest frame of obs
  uint8_t* depth = nullptr;    // [rows] older frames stored for obs; kZeroPadding on top
};
constexpr uint8_t kZeroPadding = 0x80;

// An observation contradicts its stream.
class FrameStackError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

constexpr const char* kNothingToSample =
    "nothing to sample: no transition with all its n steps is stored yet; add() some first";

struct Column {
  uint8_t* data;
  int64_t bytes;  // per transition
};

// One call's rows, as addresses. Row r of key k begins at obs[k] + r * obs_stride[k].
struct RowsIn {
  int64_t rows;
  const int64_t* env_ids;  // nullptr: 0 .. rows-1
  std::vector<const uint8_t*> obs, next_obs;
  std::vector<int64_t> obs_stride, next_obs_stride;
  const float* reward;
  const uint8_t *terminated, *truncated;
  std::vector<const uint8_t*> columns;
};

struct KeyOut {
  GatherTarget target;
  uint8_t *obs, *next_obs;  // either may be null
};

struct BatchOut {
  int64_t rows, n_step;
  int64_t* ids;
  float *reward, *discount;
  uint8_t *terminated, *truncated;
  float* weight;
  std::vector<uint8_t*> columns;
  std::vector<KeyOut> keys;
  int64_t* offsets;      // [2, rows, 2] of obs and next_obs, y before x; null without augmentation
  int64_t offset_range;  // offsets are drawn from [0, offset_range)
  int64_t shift_origin;  // the offset that leaves the picture where it is
};

// One frame that was written, for storage that the CPU cannot write itself.
struct FrameWrite {
  int64_t key, slot;
  const uint8_t* source;
};

class Replay {
 public:
  Replay(int64_t capacity, int64_t num_envs, int64_t n_step, double gamma, int64_t* count, int64_t* first,
         int64_t* ended, float* reward, uint8_t* flags, int32_t* time);

  int64_t add_key(ObservationKey key);
  void add_column(Column column) { columns_.push_back(column); }

  // Appends the rows; their ids go to `ids`. Throws FrameStackError, with nothing written, where an
  // observation contradicts its stream.
  void add(const RowsIn& in, int64_t* ids);
  // The next row of these streams (all, if null) begins a new segment.
  void cut(const int64_t* env_ids, int64_t n);
  std::vector<FrameWrite> take_writes();
  const FrameLayout& frames(int64_t key) const;

  int64_t rows_per_stream() const { return rows_per_stream_; }
  int64_t limit(int64_t env) const { return limit_ + (env < longer_streams_); }
  int64_t size() const;       // transitions held
  int64_t samplable() const;  // transitions whose n steps are complete
  int64_t row(int64_t env, int64_t t) const { return env * rows_per_stream_ + t % limit(env); }
  // The row of an id, or -1 if that transition is not held (any more).
  int64_t find(int64_t id) const;
  int64_t find_ready(int64_t id) const;  // the same, or -1 if its n steps are not complete
  int64_t id_in_row(int64_t row) const;  // the id of the transition in a row, or -1

  // Draws ids: uniform for recency >= 1, else each row from the most recent part of every stream, the part's
  // size being max(recency_floor, samplable * recency^u), u uniform in [0, 1).
  void draw(uint64_t seed, uint64_t batch, double recency, int64_t recency_floor, int64_t* ids,
            int64_t n) const;
  // Fills everything but the observations.
  void gather_rows(const BatchOut& out, uint64_t seed, uint64_t batch) const;
  // The observation plans of one key: obs and next_obs of each id (next_obs after n steps).
  void plan(int64_t key, const BatchOut& out, StackPlan* obs, StackPlan* next_obs) const;
  void gather_key(int64_t key, const BatchOut& out, int threads) const;

  SharedLock lock;
  // An obs that does not continue its stream begins a new segment instead of being refused.
  bool cut_at_jumps = false;
  int64_t rows_added() const { return rows_added_; }
  int64_t jumps() const { return jumps_; }  // rows added that began a new segment because of their obs

  // The transitions of a stream that may be sampled are those from first(env) up to ready_end(env).
  int64_t first(int64_t env) const { return first_[env]; }
  int64_t ready_end(int64_t env) const;
  int64_t num_envs() const { return num_envs_; }

 private:
  struct Segment {  // what add() decided about a row before writing anything
    bool fresh, cuts_previous;
  };
  int64_t steps(int64_t env, int64_t t, int64_t n_step) const;
  StackPlan stack_after(int64_t key, int64_t env) const;
  Segment check(const RowsIn& in, int64_t row, int64_t env) const;
  int64_t probe_phase(const RowsIn& in, int64_t row, int64_t env, size_t key) const;
  static int64_t frame_phase(int64_t phase, int64_t position, bool next);
  void prefetch_check(const RowsIn& in, int64_t row, int64_t env) const;
  const uint8_t* expected_frame(size_t key, int64_t env, int64_t position) const;
  bool continues(const RowsIn& in, int64_t row, int64_t env, size_t key) const;
  bool slides(const RowsIn& in, int64_t row, int64_t env, size_t key, bool fresh) const;
  void append(const RowsIn& in, int64_t row, int64_t env, Segment segment);
  void write_frame(size_t key, int64_t env, const uint8_t* observation, int64_t position);
  void evict(int64_t env);

  const int64_t num_envs_, n_step_, rows_per_stream_;
  const int64_t limit_, longer_streams_;  // these first streams hold one transition more
  const double gamma_;
  int64_t *count_, *first_, *ended_;
  float* reward_;
  uint8_t* flags_;
  int32_t* time_;
  std::vector<ObservationKey> keys_;
  std::vector<Column> columns_;
  std::vector<FrameWrite> writes_;
  std::vector<Segment> segments_;
  int64_t rows_added_ = 0, jumps_ = 0;
};

}  // namespace covr
