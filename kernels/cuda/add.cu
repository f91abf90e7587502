// The GPU side of add(), see replay/device_add.h. Rows that lie in device memory take three launches: inspect
// compares frames, decide makes records of what was found, apply changes the ring and the tables. Rows that
// the CPU has decided only need the last one.
#include <algorithm>

#include "launch.h"
#include "replay/closeness.h"
#include "replay/device_add.h"

namespace covr {
namespace {

constexpr int kThreads = 256;
constexpr int kDecideThreads = 1024;
constexpr int64_t kVector = 16;

// ---- frames ----

// A frame in device memory, in whatever layout. Steps are in bytes.
struct Frame {
  const uint8_t* data;  // null: all bytes are zero
  int32_t channel_step, pixel_step;
};

__device__ Frame dense_frame(const FrameLayout& f, const uint8_t* data) {
  return {data, static_cast<int32_t>(f.plane_items() * f.item_bytes), static_cast<int32_t>(f.item_bytes)};
}

// Frame number `position` of an observation as it is given.
__device__ Frame input_frame(const FrameLayout& f, bool channels_last, const uint8_t* observation,
                             int64_t position) {
  if (!channels_last) return dense_frame(f, observation + position * f.frame_bytes());
  const auto pixel = static_cast<int32_t>(f.channels * f.item_bytes);
  return {observation + position * pixel, static_cast<int32_t>(f.item_bytes),
          static_cast<int32_t>(f.stack) * pixel};
}

__device__ Frame stored_frame(const FrameLayout& f, int64_t slot) {
  return dense_frame(f, slot == kBlankFrame ? nullptr : f.data + slot * f.frame_bytes());
}

__device__ bool is_dense(const FrameLayout& f, const Frame& frame) {
  return !frame.data || frame.pixel_step == f.item_bytes;
}

__device__ bool in_vectors(const void* data) { return reinterpret_cast<uintptr_t>(data) % kVector == 0; }

// Item n of a frame, counted channels first.
__device__ const uint8_t* item_of(const Frame& frame, int32_t plane, int32_t n) {
  return frame.data + int64_t{n / plane} * frame.channel_step + int64_t{n % plane} * frame.pixel_step;
}

// Whether this thread's share of two frames differs in a byte.
__device__ bool share_differs(const FrameLayout& f, const Frame& a, const Frame& b) {
  bool differs = false;
  if (is_dense(f, a) && is_dense(f, b)) {
    const auto bytes = static_cast<int32_t>(f.frame_bytes());
    const int32_t vectors = in_vectors(a.data) && in_vectors(b.data) ? bytes / kVector : 0;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    for (int32_t v = threadIdx.x; v < vectors; v += kThreads) {
      const uint4 x = a.data ? reinterpret_cast<const uint4*>(a.data)[v] : zero;
      const uint4 y = b.data ? reinterpret_cast<const uint4*>(b.data)[v] : zero;
      differs |= x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w;
    }
    for (int32_t i = vectors * kVector + threadIdx.x; i < bytes; i += kThreads)
      differs |= (a.data ? a.data[i] : 0) != (b.data ? b.data[i] : 0);
    return differs;
  }
  const auto items = static_cast<int32_t>(f.frame_items()), plane = static_cast<int32_t>(f.plane_items());
  for (int32_t n = threadIdx.x; n < items; n += kThreads)
    for (int32_t byte = 0; byte < f.item_bytes; ++byte)
      differs |= (a.data ? item_of(a, plane, n)[byte] : 0) != (b.data ? item_of(b, plane, n)[byte] : 0);
  return differs;
}

// Whether `own` is true in any thread of the block.
__device__ bool any_thread(bool own) {
  __shared__ uint32_t any;
  __syncthreads();  // the result of the call before has been read
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  if (own) atomicOr(&any, 1u);
  __syncthreads();
  return any != 0;
}

__device__ double number_in(const FrameLayout& f, const Frame& frame, int32_t n) {
  if (!frame.data) return 0.0;
  return number(item_of(frame, static_cast<int32_t>(f.plane_items()), n), static_cast<int>(f.item_bytes));
}

// Of frames of floats: see closeness.h. The same in every thread, as of all functions that ask the whole
// block.
__device__ bool close_frames(const FrameLayout& f, const Frame& a, const Frame& b) {
  __shared__ unsigned long long largest_bits;  // magnitudes are ordered as their bits are
  const auto items = static_cast<int32_t>(f.frame_items());
  __syncthreads();
  if (threadIdx.x == 0) largest_bits = 0;
  __syncthreads();
  double largest = 0;
  for (int32_t n = threadIdx.x; n < items; n += kThreads)
    largest = larger_magnitude(largest, number_in(f, a, n), number_in(f, b, n));
  atomicMax(&largest_bits, static_cast<unsigned long long>(__double_as_longlong(largest)));
  __syncthreads();
  largest = __longlong_as_double(static_cast<long long>(largest_bits));
  bool apart = false;
  for (int32_t n = threadIdx.x; n < items; n += kThreads)
    apart |= !close_numbers(number_in(f, a, n), number_in(f, b, n), tolerance(f.item_bytes), largest);
  return !any_thread(apart);
}

// Whether a value of floats in `data` is not one that may be stored.
__device__ bool share_has_no_number(const uint8_t* data, int bytes, int64_t items, bool infinite) {
  bool found = false;
  for (int64_t n = threadIdx.x; n < items; n += kThreads) {
    const double value = number(data + n * bytes, bytes);
    found |= infinite ? isnan(value) : !isfinite(value);
  }
  return found;
}

// ---- inspect ----

// What is found in frame j of a row's obs and next_obs ...
constexpr uint32_t kNotContinued = 1;  // obs differs from the stream
constexpr uint32_t kNotSlidingOn = 2;  // next_obs differs from the stream
constexpr uint32_t kNotSliding = 4;    // next_obs differs from obs
constexpr uint32_t kNotRepeated = 8;   // obs differs from its newest frame
constexpr uint32_t kNotBlank = 16;     // obs is not black
constexpr uint32_t kObsNoNumber = 32, kNextNoNumber = 64;
// ... and in its values: 1 + the number of the first argument that is not a number, or 0.

__device__ uint32_t inspect_values(const DeviceTables& to, const DeviceRows& in, const Block& block,
                                   int64_t r) {
  uint32_t found = isfinite(in.reward[r]) ? 0 : 1 + kRewardArgument;
  for (int c = 0; c < to.num_columns; ++c) {
    const DeviceRows::Values& column = in.columns[c];
    const int64_t bytes = to.columns[c].bytes;
    const uint8_t* values = column.data + r * bytes;
    uint8_t* packed = block.data + block.layout.column(to.columns, c) + r * bytes;
    for (int64_t i = threadIdx.x; i < bytes; i += kThreads) packed[i] = values[i];
    if (column.float_bytes == 0) continue;
    const int64_t items = bytes / column.float_bytes;
    if (any_thread(share_has_no_number(values, column.float_bytes, items, column.infinite)) && !found)
      found = static_cast<uint32_t>(1 + first_column(to.num_keys) + c);
  }
  return found;
}

__device__ uint32_t inspect_frame(const DeviceTables& to, const DeviceRows& in, int64_t r, int64_t env, int k,
                                  int64_t j) {
  const KeyTable& key = to.keys[k];
  const FrameLayout& f = key.frames;
  const DeviceRows::Observation& given = in.keys[k];
  const int64_t count = to.tables.count[env], last = f.stack - 1, row_bytes = f.stack * f.frame_bytes();
  const bool continues = count != to.tables.ended[env];
  const auto of_obs = [&](int64_t position) {
    return input_frame(f, given.channels_last, given.obs + r * row_bytes, position);
  };
  const auto of_next = [&](int64_t position) {
    return input_frame(f, given.channels_last, given.next_obs + r * row_bytes, position);
  };
  const auto expected = [&](int64_t position) {  // of the stream's next obs
    const StackPlan plan = key.plan(to.tables.row(env, count - 1), env * f.slots, true);
    return stored_frame(f, stack_slot(plan, f.slots, last - position));
  };
  const bool begins = j < last && (!continues || in.may_jump);  // or it may: then the older frames count too
  uint32_t found = 0;
  // A loop, so that the comparison is compiled once.
  for (uint32_t what = kNotContinued; what <= kNotBlank; what *= 2) {
    if (what == kNotContinued ? !continues : what == kNotSlidingOn ? !continues || j == last : !begins)
      continue;
    const Frame a = what == kNotSlidingOn || what == kNotSliding ? of_next(j) : of_obs(j);
    const Frame b = what == kNotContinued   ? expected(j)
                    : what == kNotSlidingOn ? expected(j + 1)
                    : what == kNotSliding   ? of_obs(j + 1)
                    : what == kNotRepeated  ? of_obs(last)
                                            : dense_frame(f, nullptr);
    if (!any_thread(share_differs(f, a, b))) continue;
    const bool exactly = what == kNotRepeated || what == kNotBlank;
    if (exactly || !given.floating || !close_frames(f, a, b)) found |= what;
  }
  // The frames of a row in the order of memory: that each is looked at once is all that counts.
  if (!given.floating) return found;
  const auto bytes = static_cast<int>(f.item_bytes);
  const int64_t items = f.frame_items(), at = r * row_bytes + j * f.frame_bytes();
  if (any_thread(share_has_no_number(given.obs + at, bytes, items, false))) found |= kObsNoNumber;
  if (any_thread(share_has_no_number(given.next_obs + at, bytes, items, false))) found |= kNextNoNumber;
  return found;
}

__global__ void __launch_bounds__(kThreads)
    inspect_kernel(DeviceTables to, DeviceRows in, Block block, uint32_t* findings) {
  const int64_t r = blockIdx.x, env = in.env(r);
  uint32_t found = 0;
  if (blockIdx.y == 0) {
    found = inspect_values(to, in, block, r);
  } else if (env >= 0 && env < to.tables.num_envs) {
    int64_t j = blockIdx.y - 1;
    int k = 0;
    for (; j >= to.keys[k].frames.stack; ++k) j -= to.keys[k].frames.stack;
    found = inspect_frame(to, in, r, env, k, j);
  }
  if (threadIdx.x == 0) findings[r * gridDim.y + blockIdx.y] = found;
}

// ---- decide ----

__device__ int64_t decide_row(const DeviceTables& to, const DeviceRows& in, const Block& block, int64_t r,
                              const uint32_t* findings) {
  const Tables& tables = to.tables;
  const int64_t env = in.env(r), count = tables.count[env];
  if (findings[0] != 0) return refusal_code(r, findings[0] - 1, Refusal::kNotANumber);
  RowRecord row{env, count, in.reward[r]};
  row.flags = static_cast<uint8_t>((in.terminated[r] ? kTerminated : 0) | (in.truncated[r] ? kTruncated : 0));
  row.fresh = count == tables.ended[env];
  const auto found_in = [&](int k) {
    const uint32_t* of_key = findings + 1;
    for (int before = 0; before < k; ++before) of_key += to.keys[before].frames.stack;
    uint32_t found = 0;
    for (int64_t j = 0; j < to.keys[k].frames.stack; ++j) found |= of_key[j];
    return found;
  };
  for (int k = 0; k < to.num_keys && !row.fresh; ++k)
    if ((in.cut_at_jumps || to.keys[k].frames.stack == 1) && (found_in(k) & kNotContinued))
      row.fresh = row.cuts_previous = true;
  int64_t refused = kAccepted;
  for (int k = 0; k < to.num_keys; ++k) {
    const KeyTable& key = to.keys[k];
    const uint32_t found = found_in(k);
    const auto refuse = [&](int64_t argument, Refusal why) {
      refused = smaller(refused, refusal_code(r, argument, why));
    };
    if (found & (kObsNoNumber | kNextNoNumber))
      refuse(obs_argument(k, !(found & kObsNoNumber)), Refusal::kNotANumber);
    else if (!row.fresh && (found & kNotContinued))
      refuse(k, Refusal::kNotContinued);
    else if (found & (row.fresh ? kNotSliding : kNotSlidingOn))
      refuse(k, Refusal::kNotSliding);
    KeyRecord& record = block.keys(r)[k] = {key.written[env], kNoSource, 0};
    if (row.fresh) {
      record.depth = first_depth(key.frames.stack, !(found & kNotRepeated), !(found & kNotBlank));
    } else {
      const StackPlan plan = key.plan(tables.row(env, count - 1), 0, true);
      record.depth = static_cast<uint8_t>(plan.depth | (plan.zero_padding ? kZeroPadding : 0));
    }
  }
  block.row(r) = row;
  return refused;
}

// One block: all rows are added, or none.
__global__ void __launch_bounds__(kDecideThreads)
    decide_kernel(DeviceTables to, DeviceRows in, Block block, AddWorkspace workspace, int64_t inspections,
                  int64_t* ids) {
  __shared__ unsigned long long first_refusal;
  if (threadIdx.x == 0) first_refusal = kAccepted;
  const auto exists = [&](int64_t env) { return env >= 0 && env < to.tables.num_envs; };
  for (int64_t r = threadIdx.x; r < in.rows; r += blockDim.x)
    if (exists(in.env(r))) atomicAdd(&workspace.claims[in.env(r)], 1);
  __syncthreads();
  for (int64_t r = threadIdx.x; r < in.rows; r += blockDim.x) {
    const int64_t env = in.env(r);
    int64_t refused;
    if (!exists(env))
      refused = refusal_code(r, 0, Refusal::kEnvironment);
    else if (__ldcg(&workspace.claims[env]) != 1)
      refused = refusal_code(r, 0, Refusal::kTwice);
    else
      refused = decide_row(to, in, block, r, workspace.findings + r * inspections);
    if (refused != kAccepted) {
      block.row(r).env = env;  // for the message
      atomicMin(&first_refusal, static_cast<unsigned long long>(refused));
    }
  }
  __syncthreads();
  for (int64_t r = threadIdx.x; r < in.rows; r += blockDim.x) {
    const int64_t env = in.env(r);
    ids[r] = first_refusal == kAccepted ? to.tables.id(env, to.tables.count[env]) : -1;
    if (exists(env)) workspace.claims[env] = 0;
  }
  if (threadIdx.x == 0) block.refusal() = static_cast<int64_t>(first_refusal);
}

// ---- apply ----

// Part `slice` of `slices` of a frame.
__device__ void copy_frame(const FrameLayout& f, const Frame& from, uint8_t* to, int slice, int slices) {
  const int32_t start = slice * kThreads + threadIdx.x, step = slices * kThreads;
  if (is_dense(f, from)) {
    const auto bytes = static_cast<int32_t>(f.frame_bytes());
    const int32_t vectors = in_vectors(from.data) && in_vectors(to) ? bytes / kVector : 0;
    for (int32_t v = start; v < vectors; v += step)
      reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<const uint4*>(from.data)[v];
    for (int32_t i = vectors * kVector + start; i < bytes; i += step) to[i] = from.data[i];
    return;
  }
  const auto items = static_cast<int32_t>(f.frame_items()), plane = static_cast<int32_t>(f.plane_items());
  for (int32_t n = start; n < items; n += step)
    for (int32_t byte = 0; byte < f.item_bytes; ++byte)
      to[n * f.item_bytes + byte] = item_of(from, plane, n)[byte];
}

// Frame i of those that a row writes.
__device__ Frame written_frame(const FrameLayout& f, const DeviceRows::Observation& given, int64_t r,
                               int64_t i, int64_t frames) {
  const int64_t row_bytes = f.stack * f.frame_bytes();
  if (i + 1 == frames)
    return input_frame(f, given.channels_last, given.next_obs + r * row_bytes, f.stack - 1);
  return input_frame(f, given.channels_last, given.obs + r * row_bytes, f.stack - frames + 1 + i);
}

// A row of blocks per row of the call: its frames and columns; and one block for the tables, whose functions
// read nothing that the others write. kGiven: the frames are those of `in` instead of the block's.
template <bool kGiven>
__global__ void __launch_bounds__(kThreads) apply_kernel(DeviceTables to, DeviceRows in, Block block) {
  if (block.refusal() != kAccepted) return;
  const int64_t r = blockIdx.x;
  const int slice = static_cast<int>(blockIdx.y), slices = static_cast<int>(gridDim.y);
  if (r == block.layout.rows) {
    if (slice != 0) return;
    for (int64_t each = threadIdx.x; each < block.layout.rows; each += kThreads)
      apply_row(to.tables, to.keys, to.num_keys, block.row(each), block.keys(each));
    return;
  }
  const RowRecord row = block.row(r);
  for (int k = 0; k < to.num_keys; ++k) {
    const FrameLayout& f = to.keys[k].frames;
    const KeyRecord record = block.keys(r)[k];
    const int64_t frames = record.frames(row);
    if (!kGiven && record.source == kNoSource) continue;  // the CPU has written where samples are read from
    for (int64_t i = 0; i < frames; ++i) {
      const Frame from = kGiven ? written_frame(f, in.keys[k], r, i, frames)
                                : dense_frame(f, block.data + record.source + i * f.frame_bytes());
      const int64_t slot = row.env * f.slots + (record.first + i) % f.slots;
      copy_frame(f, from, f.data + slot * f.frame_bytes(), slice, slices);
    }
  }
  const int64_t at = to.tables.row(row.env, row.t);
  for (int c = 0; c < to.num_columns; ++c) {
    const int64_t bytes = to.columns[c].bytes;
    const uint8_t* values = block.data + block.layout.column(to.columns, c) + r * bytes;
    for (int64_t i = slice * kThreads + threadIdx.x; i < bytes; i += slices * kThreads)
      to.columns[c].values[at * bytes + i] = values[i];
  }
}

template <bool kGiven>
void launch_apply(const DeviceTables& to, const DeviceRows& in, const Block& block, int slices,
                  uintptr_t stream) {
  const dim3 grid(static_cast<unsigned>(block.layout.rows + 1), static_cast<unsigned>(slices));
  apply_kernel<kGiven><<<grid, kThreads, 0, cuda::as_stream(stream)>>>(to, in, block);
  cuda::check(cudaGetLastError(), "apply kernel of add()");
}

}  // namespace

void apply_cuda(const DeviceTables& to, const Block& block, int slices, uintptr_t stream) {
  if (block.layout.rows > 0) launch_apply<false>(to, {}, block, slices, stream);
}

void add_cuda(const DeviceTables& to, const DeviceRows& in, const Block& block, const AddWorkspace& workspace,
              int64_t inspections, int slices, int64_t* ids, uintptr_t stream) {
  if (in.rows == 0) return;
  const auto rows = static_cast<unsigned>(in.rows);
  const auto s = cuda::as_stream(stream);
  const dim3 grid(rows, static_cast<unsigned>(inspections));
  inspect_kernel<<<grid, kThreads, 0, s>>>(to, in, block, workspace.findings);
  cuda::check(cudaGetLastError(), "inspect kernel of add()");
  const unsigned threads = std::min<unsigned>(kDecideThreads, (rows + 31) / 32 * 32);
  decide_kernel<<<1, threads, 0, s>>>(to, in, block, workspace, inspections, ids);
  cuda::check(cudaGetLastError(), "decide kernel of add()");
  launch_apply<true>(to, in, block, slices, stream);
}

void copy_async(void* to, const void* from, int64_t bytes, uintptr_t stream) {
  cuda::check(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, cuda::as_stream(stream)),
      "copy of a block of add()");
}

}  // namespace covr
