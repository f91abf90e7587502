// The mirror of a buffer's tables in device memory, from which kernels draw, plan and gather whole batches:
// the host is asked nothing. Only in builds with CUDA. All memory belongs to the caller (torch tensors).
//
// Whoever changes the host's tables brings the mirror up to date (covr_fast/buffer/mirror.py); rows that a
// kernel adds to the mirror reach the host's tables later (device_add.h). Nothing here waits for the device
// or locks: covr_fast/buffer/gpu.py says what waits for what.
#pragma once

#include <optional>

#include "ops/sum_tree.h"
#include "replay/priorities.h"
#include "replay/replay.h"

namespace covr {

using CudaObservationsOut = ObservationsOutOn<Device::kCuda>;
using CudaBatchOut = BatchOutOn<Device::kCuda>;

// Which batch comes next. In device memory, so that a CUDA graph draws another batch whenever it is launched.
struct Sequence {
  uint64_t seed;
  uint64_t next;   // number of the next batch
  uint64_t drawn;  // number of the one before it
  double beta;     // exponent of the importance weights
};

// What rows_kernel fills besides observations; without `reward` only their plans.
struct RowsOut {
  const int64_t* ids;
  int64_t rows, n_step;
  float *reward, *discount;
  bool *terminated, *truncated;
  int64_t *obs_offset, *next_obs_offset;  // [rows, 2], or null
  Augmentation augmentation;
};

// The plans of one key's observations; those of next_obs may be null.
struct KeyPlans {
  KeyTable key;
  StackPlan *obs, *next_obs;
};

// Where one column of a batch goes.
struct ColumnOut {
  ColumnTable column;
  uint8_t* out;
};

class Mirror {
 public:
  // tables: those of `host`, with pointers to device memory. The host's object must outlive this one.
  Mirror(const Replay& host, Tables tables, Sequence* sequence)
      : host_(host), tables_(tables), sequence_(sequence) {}

  // In the order of the host's.
  void add_key(KeyTable key) { keys_.push_back(key); }
  void add_column(ColumnTable column) { columns_.push_back(column); }
  // claims: an int32 per leaf, zero.
  void prioritize(PriorityTables priorities, int32_t* claims) {
    priorities_ = priorities;
    claims_ = claims;
  }

  // The next batch of the sequence. plans: device memory, [keys, 2, rows].
  void sample(const CudaBatchOut& out, const Recency& recency, StackPlan* plans, uintptr_t stream) const;
  // The batch of the ids in `out`, which must be stored. It counts as the next batch of the sequence.
  void get(const CudaBatchOut& out, StackPlan* plans, uintptr_t stream) const;
  // Only their observations; it does not count. plans: [keys, 1, rows].
  void observe(const CudaObservationsOut& out, StackPlan* plans, uintptr_t stream) const;

  // After the tables changed: new transitions get the largest priority, those that are gone none.
  void follow(uintptr_t stream) const;
  // New priorities, as Priorities::set, but a priority that is negative or not finite is skipped. rows and
  // leaves are workspace, one value per id.
  void set_priorities(CudaView<const int64_t, 1> ids, CudaView<const float, 1> priority, int64_t* rows,
                      float* leaves, uintptr_t stream) const;

  const Replay& host() const { return host_; }
  const Tables& tables() const { return tables_; }
  const std::vector<KeyTable>& keys() const { return keys_; }
  const std::vector<ColumnTable>& columns() const { return columns_; }
  bool prioritized() const { return priorities_.has_value(); }

 private:
  void fill(const CudaBatchOut& out, StackPlan* plans, uintptr_t stream) const;
  void plan_and_gather(const RowsOut& rows, const CudaObservationsOut& out,
                       const std::vector<ColumnOut>& columns, StackPlan* plans, uintptr_t stream) const;

  const Replay& host_;
  Tables tables_;
  Sequence* sequence_;
  std::vector<KeyTable> keys_;
  std::vector<ColumnTable> columns_;
  std::optional<PriorityTables> priorities_;
  int32_t* claims_ = nullptr;
};

// In kernels/cuda/sample.cu.
namespace cuda {

constexpr int kParts = 8;  // keys and columns per launch

struct Parts {
  int keys = 0, columns = 0;
  KeyPlans key[kParts];
  ColumnOut column[kParts];
};

void draw_uniform(const Tables& tables, Sequence* sequence, const Recency& recency, int64_t rows,
                  int64_t* ids, float* weight, uintptr_t stream);
void draw_prioritized(const Tables& tables, const PriorityTables& priorities, Sequence* sequence,
                      int64_t rows, int64_t* ids, float* weight, uintptr_t stream);
// Counts one batch of given ids, whose weights are ones.
void draw_given(Sequence* sequence, int64_t rows, float* weight, uintptr_t stream);
void fill_rows(const Tables& tables, const Sequence* sequence, const RowsOut& out, const Parts& parts,
               uintptr_t stream);

// In kernels/cuda/priorities.cu.
void follow_priorities(const Tables& tables, const PriorityTables& priorities, uintptr_t stream);
// Leaves and rows of new priorities; the row is -1 where one is skipped.
void priority_leaves(const Tables& tables, const PriorityTables& priorities, const int64_t* ids,
                     const float* priority, int64_t n, int64_t* rows, float* leaves, uintptr_t stream);

}  // namespace cuda

}  // namespace covr
