// Bookkeeping of the replay buffer: which transition lives where, which of them may be sampled, and which
// frames rebuild its observations. All memory belongs to the caller (torch tensors); this class has views.
//
// tables.h says where transitions lie. Observations are stacks of single frames from a second, slightly
// longer ring per stream: an episode of n transitions has n + 1 frames.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "replay/gather.h"
#include "replay/record.h"
#include "replay/shared_lock.h"
#include "replay/tables.h"

namespace covr {

// One observation key.
struct ObservationKey : KeyTable {
  std::string name;
  DType dtype{};  // floats are compared as numbers, all others as bytes
  bool input_channels_last = false;
  Device device{};     // of frames
  FrameLayout recent;  // the same frames where the CPU can read the latest `stack` of each stream

  int64_t input_bytes() const { return frames.stack * frames.frame_bytes(); }  // of an observation
};

// An observation contradicts its stream.
class FrameStackError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

constexpr const char* kNothingToSample =
    "nothing to sample: no transition with all its n steps is stored yet; add() some first";

struct Column {
  std::string name;
  AnyView values;  // [rows, ...]
  int64_t bytes;   // per transition

  ColumnTable table() const { return {values.data, bytes}; }
};

struct Rows {
  const uint8_t* data;
  int64_t stride;  // in bytes

  const uint8_t* operator[](int64_t row) const { return data + row * stride; }
};

// The rows of one call of add().
struct RowsIn {
  int64_t rows;
  std::vector<int64_t> env_ids;
  std::vector<Rows> obs, next_obs, columns;
  const float* reward;
  const bool *terminated, *truncated;
};

// Where the observations of some transitions are written. All tensors are on device kOn.
template <Device kOn>
struct ObservationsOutOn {
  struct Key {
    GatherTarget target;
    AnyView obs;
    std::optional<AnyView> next_obs;
  };
  View<int64_t, 1, kOn> ids;
  int64_t n_step = 1;  // next_obs is that of so many steps later
  std::vector<Key> keys{};
  std::optional<View<int64_t, 2, kOn>> obs_offset{}, next_obs_offset{};  // [rows, 2], y before x; or neither
  Augmentation augmentation{};

  int64_t rows() const { return ids.size(); }
  // One key after the other, in their order in the buffer.
  void add_key(GatherTarget target, AnyView obs, std::optional<AnyView> next_obs) {
    target.dtype = obs.dtype;
    keys.push_back({target, std::move(obs), std::move(next_obs)});
  }
};

// Where a whole batch is written.
template <Device kOn>
struct BatchOutOn : ObservationsOutOn<kOn> {
  View<float, 1, kOn> reward, discount;
  View<bool, 1, kOn> terminated, truncated;
  View<float, 1, kOn> weight;
  std::vector<AnyView> columns;
};

using ObservationsOut = ObservationsOutOn<Device::kCpu>;
using BatchOut = BatchOutOn<Device::kCpu>;

// Gives memory for the block of so many bytes that one call of add() fills: see record.h.
using TakeBlock = std::function<uint8_t*(int64_t)>;

class Replay {
 public:
  // count, first and ended have one value per stream, reward, flags and time one per row.
  Replay(int64_t capacity, int64_t num_envs, int64_t n_step, double gamma, View<int64_t, 1> count,
         View<int64_t, 1> first, View<int64_t, 1> ended, View<float, 1> reward, View<uint8_t, 1> flags,
         View<int32_t, 1> time);

  void add_key(ObservationKey key) { keys_.push_back(std::move(key)); }
  void add_column(Column column) { columns_.push_back(std::move(column)); }
  const std::vector<ObservationKey>& keys() const { return keys_; }
  const std::vector<Column>& columns() const { return columns_; }

  // Appends the rows; their ids go to `ids`. Throws FrameStackError, with nothing written, where an
  // observation contradicts its stream. A buffer with a mirror on a GPU takes a block, and sends it there.
  void add(const RowsIn& in, int64_t* ids, const TakeBlock& take_block = {});
  // Follows rows that a kernel has added to the mirror. Throws what add() would have if they were refused.
  void follow(const Block& block);
  // The next row of these streams begins a new segment.
  void cut(const std::vector<int64_t>& env_ids);

  const Tables& tables() const { return tables_; }
  int64_t num_envs() const { return tables_.num_envs; }
  int64_t rows() const { return tables_.rows(); }
  int64_t size() const;       // transitions stored
  int64_t samplable() const;  // transitions whose n steps are complete
  void draw(uint64_t seed, uint64_t batch, const Recency& recency, int64_t* ids, int64_t n) const;
  // Fills everything but the observations.
  void gather_rows(const BatchOut& out, uint64_t seed, uint64_t batch) const;
  // The observation plans of one key: obs and next_obs of each id (next_obs after n steps).
  void plan(size_t key, const ObservationsOut& out, StackPlan* obs, StackPlan* next_obs) const;
  void gather_key(size_t key, const ObservationsOut& out, int threads) const;

  SharedLock lock;
  // An obs that does not continue its stream begins a new segment instead of being refused.
  bool cut_at_jumps = false;
  int64_t rows_added() const { return rows_added_; }
  int64_t jumps() const { return jumps_; }  // rows added that began a new segment because of their obs

 private:
  StackPlan next_stack(size_t key, int64_t env) const;
  RowRecord check(const RowsIn& in, int64_t row, int64_t env) const;
  int64_t probe_phase(const RowsIn& in, int64_t row, int64_t env, size_t key) const;
  static int64_t frame_phase(int64_t phase, int64_t position, bool next);
  void prefetch_check(const RowsIn& in, int64_t row, int64_t env) const;
  const uint8_t* expected_frame(size_t key, int64_t env, int64_t position) const;
  bool continues(const RowsIn& in, int64_t row, int64_t env, size_t key) const;
  bool slides(const RowsIn& in, int64_t row, int64_t env, size_t key, bool fresh) const;
  KeyRecord new_frames(const RowsIn& in, int64_t r, const RowRecord& row, size_t key) const;
  void write_frames(const RowsIn& in, int64_t r, const RowRecord& row, size_t key, const KeyRecord& record,
                    uint8_t* block);
  std::string contradiction(size_t key, int64_t row, int64_t env, const char* what) const;
  std::string argument_name(int64_t argument) const;
  [[noreturn]] void refuse(int64_t code, const Block& block) const;

  Tables tables_;
  std::vector<ObservationKey> keys_;
  std::vector<Column> columns_;
  std::vector<RowRecord> records_;      // of add(), kept for their memory
  std::vector<KeyRecord> key_records_;  // [rows, keys]
  int64_t rows_added_ = 0, jumps_ = 0;
};

}  // namespace covr
