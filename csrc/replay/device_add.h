// add() on a GPU: the launches of kernels/cuda/add.cu. None waits for the device.
#pragma once

#include "common/view.h"
#include "replay/record.h"

namespace covr {

// The mirror of a buffer's tables: everything that is pointed to is in device memory (frames may be pinned).
struct DeviceTables {
  Tables tables;
  const KeyTable* keys = nullptr;
  const ColumnTable* columns = nullptr;
  int32_t num_keys = 0, num_columns = 0;
};

// The rows of one call of add() as tensors in device memory, each contiguous.
struct DeviceRows {
  static constexpr int kMaxKeys = 8, kMaxColumns = 24;  // so that this fits into a kernel's arguments

  struct Observation {
    const uint8_t *obs = nullptr, *next_obs = nullptr;
    bool floating = false;
    bool channels_last = false;
  };
  struct Values {
    const uint8_t* data = nullptr;
    int32_t float_bytes = 0;  // of an item, if these are floats
    bool infinite = false;    // infinity is a value
  };

  int64_t rows = 0;
  bool cut_at_jumps = false;
  bool may_jump = false;             // an obs that does not continue its stream may begin a segment
  const int64_t* env_ids = nullptr;  // null: row r is of environment r
  const float* reward = nullptr;
  const bool *terminated = nullptr, *truncated = nullptr;
  Observation keys[kMaxKeys];
  Values columns[kMaxColumns];

  COVR_HD int64_t env(int64_t r) const { return env_ids ? env_ids[r] : r; }
};

// Memory for add_cuda.
struct AddWorkspace {
  // One inspection of a row: of its values, and of each frame of its stacks.
  uint32_t* findings = nullptr;  // [rows, inspections]
  int32_t* claims = nullptr;     // [num_envs], zero between calls
};

// How many inspections a row needs.
template <typename Keys>
int64_t inspections(const Keys& keys) {
  int64_t n = 1;
  for (const auto& key : keys) n += key.frames.stack;
  return n;
}

#ifdef COVR_WITH_CUDA
// Applies a block that the CPU has filled: `block` is its copy in device memory. `slices`: blocks per row.
void apply_cuda(const DeviceTables& to, const Block& block, int slices, uintptr_t stream);

// Decides the rows as add() does, but compares whole frames; then adds them all, or none. Their records and
// columns are written to `block`, in device memory, for Replay::follow; their ids to `ids`, -1 if refused.
void add_cuda(const DeviceTables& to, const DeviceRows& in, const Block& block, const AddWorkspace& workspace,
              int64_t inspections, int slices, int64_t* ids, uintptr_t stream);

void copy_async(void* to, const void* from, int64_t bytes, uintptr_t stream);
#endif

}  // namespace covr
