// What add() has decided about its rows, and what that changes in the tables. Rows are decided by the CPU
// (add.cpp), or by a kernel when they lie in device memory (kernels/cuda/add.cu). The same records are then
// applied to the host's tables and to their mirror in device memory, so that both stay equal.
#pragma once

#include "replay/tables.h"

namespace covr {

// One row.
struct RowRecord {
  int64_t env = 0;
  int64_t t = 0;  // number of the transition in its stream
  float reward = 0;
  uint8_t flags = 0;           // kTerminated, kTruncated
  bool fresh = false;          // obs begins a segment
  bool cuts_previous = false;  // and that in the middle of an episode: obs does not continue the stream
};

constexpr int64_t kNoSource = -1;

// One row's observation of one key. A row writes the newest frame of next_obs; before it, if fresh, obs' own.
struct KeyRecord {
  int64_t first = 0;   // number of the first frame that is written
  int64_t source = 0;  // where these frames begin in the block that brings them, or kNoSource
  uint8_t depth = 0;   // see KeyTable

  COVR_HD int64_t frames(const RowRecord& row) const { return row.fresh ? (depth & ~kZeroPadding) + 2 : 1; }
};

// Why rows decided by a kernel were refused: none of the call was added.
enum class Refusal : int32_t { kNone, kNotANumber, kEnvironment, kTwice, kNotContinued, kNotSliding };

// The first refusal of a call, as one number that kernels can take the minimum of; or kAccepted.
constexpr int64_t kAccepted = INT64_MAX;

// `argument` is the number of a key; of a value that is not a number, the number of the argument.
COVR_HD int64_t refusal_code(int64_t row, int64_t argument, Refusal why) {
  return row << 24 | argument << 8 | static_cast<int64_t>(why);
}

// Numbers of arguments: the reward, obs and next_obs of each key, the columns.
constexpr int64_t kRewardArgument = 0;
COVR_HD int64_t obs_argument(int64_t key, bool next) { return 1 + 2 * key + next; }
COVR_HD int64_t first_column(int64_t num_keys) { return 1 + 2 * num_keys; }

// How many frames of an episode's first stack are stored besides the newest one: none if it is that frame
// repeated, or that frame after black ones.
COVR_HD uint8_t first_depth(int64_t stack, bool repeated, bool blank) {
  if (repeated) return 0;
  return blank ? kZeroPadding : static_cast<uint8_t>(stack - 1);
}

// Where things lie in the block of bytes that one call of add() sends to the device, or gets back from it:
//   int64  first refusal | RowRecord [rows] | KeyRecord [rows, keys] | each column [rows, bytes] | frames
struct BlockLayout {
  int64_t rows = 0, keys = 0;
  int64_t row_records = 0, key_records = 0, columns = 0;  // where they begin

  static constexpr int64_t kAlign = 16;
  COVR_HD static int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

  COVR_HD BlockLayout(int64_t rows_, int64_t keys_) : rows(rows_), keys(keys_) {
    row_records = kAlign;
    key_records = row_records + aligned(rows * static_cast<int64_t>(sizeof(RowRecord)));
    columns = key_records + aligned(rows * keys * static_cast<int64_t>(sizeof(KeyRecord)));
  }
  // Where column c begins, and so, for the number of columns, where the frames begin.
  template <typename Columns>
  COVR_HD int64_t column(const Columns& tables, int64_t c) const {
    int64_t at = columns;
    for (int64_t before = 0; before < c; ++before) at += aligned(rows * tables[before].bytes);
    return at;
  }
};

struct Block {
  uint8_t* data;
  BlockLayout layout;

  COVR_HD int64_t& refusal() const { return *reinterpret_cast<int64_t*>(data); }
  COVR_HD RowRecord& row(int64_t r) const {
    return reinterpret_cast<RowRecord*>(data + layout.row_records)[r];
  }
  COVR_HD KeyRecord* keys(int64_t r) const {
    return reinterpret_cast<KeyRecord*>(data + layout.key_records) + r * layout.keys;
  }
};

// Drops transitions whose row or whose oldest frame was overwritten.
template <typename Keys>
COVR_HD void evict(const Tables& tables, const Keys& keys, int64_t num_keys, int64_t env) {
  int64_t first = larger(tables.first[env], tables.count[env] - tables.limit(env));
  for (int64_t k = 0; k < num_keys; ++k)
    while (first < tables.count[env] && keys[k].lost_a_frame(env, tables.row(env, first))) ++first;
  tables.first[env] = first;
  tables.ended[env] = larger(tables.ended[env], first);
}

// Everything that a row changes except its columns and its frames. `records` has one per key.
template <typename Keys>
COVR_HD void apply_row(const Tables& tables, const Keys& keys, int64_t num_keys, const RowRecord& row,
                       const KeyRecord* records) {
  const int64_t env = row.env, t = row.t, to = tables.row(env, t);
  if (row.cuts_previous) {
    tables.flags[tables.row(env, t - 1)] |= kCut;
    tables.ended[env] = t;
  }
  for (int64_t k = 0; k < num_keys; ++k) {
    const int64_t last = records[k].first + records[k].frames(row) - 1;
    keys[k].depth[to] = records[k].depth;
    keys[k].newest[to] = last - 1;
    keys[k].written[env] = last + 1;
  }
  tables.time[to] = row.fresh ? 0 : tables.time[tables.row(env, t - 1)] + 1;
  tables.reward[to] = row.reward;
  tables.flags[to] = row.flags;
  tables.count[env] = t + 1;
  if (row.flags) tables.ended[env] = t + 1;
  evict(tables, keys, num_keys, env);
}

}  // namespace covr
