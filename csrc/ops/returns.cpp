// Discounted returns within episodes: a segmented scan over time, last step first; over a horizon, direct
// sums.
#include "ops/returns.h"

#include <algorithm>
#include <array>
#include <variant>

#include "common/border.h"
#include "common/parallel.h"

namespace covr {
namespace {

constexpr int64_t kBlock = 256;      // columns whose running returns stay in registers and L1
constexpr int64_t kFewColumns = 4;   // fewer are quicker one after the other
constexpr int kStreams = 8;          // independent episodes in flight, to hide the latency of the recurrence
constexpr int64_t kGrain = 1 << 15;  // steps worth a thread

// Columns [begin, end) side by side: the recurrence runs down in time, the vector lanes across columns.
template <typename T>
COVR_HD void scan_columns_of(T* out, const T* rewards, const uint8_t* ends, int64_t steps, int64_t columns,
                             int64_t begin, int64_t end, T gamma) {
  T next[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t width = std::min(kBlock, end - first);
    std::fill(next, next + width, T(0));
    for (int64_t t = steps - 1; t >= 0; --t) {
      const T* __restrict__ reward = rewards + t * columns + first;
      const uint8_t* __restrict__ ended = ends + t * columns + first;
      T* __restrict__ result = out + t * columns + first;
      for (int64_t j = 0; j < width; ++j)
        result[j] = next[j] = return_step(reward[j], ended[j], gamma, next[j]);
    }
  }
}

// Clones cannot be templates.
COVR_CLONES void scan_columns(double* out, const double* rewards, const uint8_t* ends, int64_t steps,
                              int64_t columns, int64_t begin, int64_t end, double gamma) {
  scan_columns_of(out, rewards, ends, steps, columns, begin, end, gamma);
}

COVR_CLONES void scan_columns(float* out, const float* rewards, const uint8_t* ends, int64_t steps,
                              int64_t columns, int64_t begin, int64_t end, float gamma) {
  scan_columns_of(out, rewards, ends, steps, columns, begin, end, gamma);
}

// Steps [begin, end) of one column, where step end - 1 ends an episode or the column. They are cut near equal
// parts, but only where an episode ends, so that the parts are independent and the result is that of the
// plain scan, bit by bit.
template <typename T>
void scan_column(T* out, const T* rewards, const uint8_t* ends, int64_t stride, int64_t begin, int64_t end,
                 T gamma) {
  std::array<int64_t, kStreams + 1> cut;
  cut[0] = begin;
  for (int i = 1; i <= kStreams; ++i) {
    int64_t at = begin + (end - begin) * i / kStreams;
    while (at < end && at > begin && !ends[(at - 1) * stride]) ++at;
    cut[i] = std::max(at, cut[i - 1]);
  }
  std::array<int64_t, kStreams> t;  // the next step of each stream
  std::array<T, kStreams> next{};
  int64_t together = end - begin;
  for (int i = 0; i < kStreams; ++i) {
    t[i] = cut[i + 1] - 1;
    together = std::min(together, cut[i + 1] - cut[i]);
  }
  for (int64_t k = 0; k < together; ++k)
    for (int i = 0; i < kStreams; ++i) {
      const int64_t at = t[i]-- * stride;
      out[at] = next[i] = return_step(rewards[at], ends[at], gamma, next[i]);
    }
  for (int i = 0; i < kStreams; ++i)
    for (; t[i] >= cut[i]; --t[i]) {
      const int64_t at = t[i] * stride;
      out[at] = next[i] = return_step(rewards[at], ends[at], gamma, next[i]);
    }
}

template <typename T>
void scan(T* out, const T* rewards, const uint8_t* ends, int64_t steps, int64_t columns, T gamma,
          int threads) {
  if (columns >= kFewColumns) {
    parallel_for(columns, std::max<int64_t>(16, kGrain / std::max<int64_t>(steps, 1)), threads,
                 [&](int64_t begin, int64_t end) {
                   scan_columns(out, rewards, ends, steps, columns, begin, end, gamma);
                 });
    return;
  }
  for (int64_t column = 0; column < columns; ++column) {
    const uint8_t* ended = ends + column;
    // A thread's part begins and ends where an episode does, for the same reason as above.
    auto boundary = [&](int64_t t) {
      while (t > 0 && t < steps && !ended[(t - 1) * columns]) ++t;
      return t;
    };
    parallel_for(steps, kGrain, threads, [&](int64_t begin, int64_t end) {
      begin = boundary(begin), end = boundary(end);
      if (begin < end) scan_column(out + column, rewards + column, ended, columns, begin, end, gamma);
    });
  }
}

// Elements [begin, end) of the flat arrays side by side, whatever the number of columns: the reward k steps
// after an element lies k * columns further on.
template <typename T>
COVR_HD void sum_horizons_of(T* out, const T* rewards, const uint8_t* ends, int64_t size, int64_t columns,
                             int64_t begin, int64_t end, double gamma, int64_t horizon) {
  double sum[kBlock];
  int32_t alive[kBlock];  // whether the episode goes on
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t width = std::min(kBlock, end - first);
    std::fill(sum, sum + width, 0.0);
    std::fill(alive, alive + width, 1);
    double power = 1;
    int32_t any = 1;
    for (int64_t k = 0; k < horizon && any; ++k, power *= gamma) {
      const T* __restrict__ reward = rewards + first + k * columns;
      const uint8_t* __restrict__ ended = ends + first + k * columns;
      const int64_t inside =
          std::min(width, size - first - k * columns);  // of the others the last step is past
      any = 0;
      for (int64_t j = 0; j < inside; ++j) {
        const double term = horizon_term(reward[j], power);
        sum[j] += alive[j] ? term : 0.0;
        alive[j] = ended[j] ? 0 : alive[j];
        any |= alive[j];
      }
    }
    for (int64_t j = 0; j < width; ++j) out[first + j] = static_cast<T>(sum[j]);
  }
}

COVR_CLONES void sum_horizons(double* out, const double* rewards, const uint8_t* ends, int64_t size,
                              int64_t columns, int64_t begin, int64_t end, double gamma, int64_t horizon) {
  sum_horizons_of(out, rewards, ends, size, columns, begin, end, gamma, horizon);
}

COVR_CLONES void sum_horizons(float* out, const float* rewards, const uint8_t* ends, int64_t size,
                              int64_t columns, int64_t begin, int64_t end, double gamma, int64_t horizon) {
  sum_horizons_of(out, rewards, ends, size, columns, begin, end, gamma, horizon);
}

// float32 or float64 [T, N].
template <Device kOn>
using Out = std::variant<View<float, 2, kOn>, View<double, 2, kOn>>;
template <Device kOn>
using Rewards = std::variant<View<const float, 2, kOn>, View<const double, 2, kOn>>;

void discounted_returns(Out<Device::kCpu> outs, Rewards<Device::kCpu> rewards_, View<const bool, 2> ends,
                        double gamma, int threads) {
  std::visit(
      [&]<typename T>(View<const T, 2> rewards) {
        const auto out = same_dtype<View<T, 2>>(outs, "out", "rewards");
        require_shape("out", out.shape, rewards.shape);
        require_shape("ends", ends.shape, rewards.shape);
        scan(out.data, rewards.data, bytes(ends.data), rewards.shape[0], rewards.shape[1],
             static_cast<T>(gamma), threads);
      },
      rewards_);
}

void horizon_returns(Out<Device::kCpu> outs, Rewards<Device::kCpu> rewards_, View<const bool, 2> ends,
                     double gamma, int64_t horizon, int threads) {
  std::visit(
      [&]<typename T>(View<const T, 2> rewards) {
        const auto out = same_dtype<View<T, 2>>(outs, "out", "rewards");
        require_shape("out", out.shape, rewards.shape);
        require_shape("ends", ends.shape, rewards.shape);
        horizon = std::clamp<int64_t>(horizon, 1, std::max<int64_t>(rewards.shape[0], 1));
        parallel_for(rewards.size(), std::max(kBlock, kGrain / horizon), threads,
                     [&](int64_t begin, int64_t end) {
                       sum_horizons(out.data, rewards.data, bytes(ends.data), rewards.size(),
                                    rewards.shape[1], begin, end, gamma, horizon);
                     });
      },
      rewards_);
}

#ifdef COVR_WITH_CUDA
using Workspace = std::variant<CudaView<float, 1>, CudaView<double, 1>>;

void discounted_returns_cuda(Out<Device::kCuda> outs, Rewards<Device::kCuda> rewards_,
                             CudaView<const bool, 2> ends, double gamma, Workspace workspaces,
                             uintptr_t stream) {
  std::visit(
      [&]<typename T>(CudaView<const T, 2> rewards) {
        const auto out = same_dtype<CudaView<T, 2>>(outs, "out", "rewards");
        const auto workspace = same_dtype<CudaView<T, 1>>(workspaces, "workspace", "rewards");
        require_shape("out", out.shape, rewards.shape);
        require_shape("ends", ends.shape, rewards.shape);
        require_shape("workspace", workspace.shape,
                      {cuda::discounted_returns_workspace(rewards.shape[0], rewards.shape[1])});
        cuda::discounted_returns<T>(out, rewards, ends, static_cast<T>(gamma), workspace, stream);
      },
      rewards_);
}

void horizon_returns_cuda(Out<Device::kCuda> outs, Rewards<Device::kCuda> rewards_,
                          CudaView<const bool, 2> ends, double gamma, int64_t horizon, uintptr_t stream) {
  std::visit(
      [&]<typename T>(CudaView<const T, 2> rewards) {
        const auto out = same_dtype<CudaView<T, 2>>(outs, "out", "rewards");
        require_shape("out", out.shape, rewards.shape);
        require_shape("ends", ends.shape, rewards.shape);
        cuda::horizon_returns<T>(out, rewards, ends, gamma, horizon, stream);
      },
      rewards_);
}
#endif

}  // namespace

void bind_returns(pybind11::module_& m) {
  define(m, "discounted_returns", &discounted_returns, "out", "rewards", "ends", "gamma", "threads");
  define(m, "horizon_returns", &horizon_returns, "out", "rewards", "ends", "gamma", "horizon", "threads");
#ifdef COVR_WITH_CUDA
  define(m, "discounted_returns_workspace", &cuda::discounted_returns_workspace, "steps", "columns");
  define(m, "discounted_returns_cuda", &discounted_returns_cuda, "out", "rewards", "ends", "gamma",
         "workspace", "stream");
  define(m, "horizon_returns_cuda", &horizon_returns_cuda, "out", "rewards", "ends", "gamma", "horizon",
         "stream");
#endif
}

}  // namespace covr
