// Rows of logits for the return-weighted cross-entropy: one pass that reduces a row, one that writes its
// gradient. Rows of scale zero are not read.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "ops/exp.h"
#include "common/half.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace covr {
namespace {

constexpr int64_t kTile = 4096;      // logits that stay in L1 between finding their maximum and summing them
constexpr int kLanes = 16;           // independent sums, so that additions vectorise
constexpr int64_t kGrain = 1 << 15;  // logits worth a thread

struct RowSum {
  float peak;      // the largest logit
  double log_sum;  // log of the sum of exp(logit - peak)
  double sum;
};

template <typename T>
COVR_HD RowSum reduce_row_of(const T* logits, int64_t n) {
  float peak = -std::numeric_limits<float>::infinity();
  double total = 0, sum = 0;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = std::min(kTile, n - begin), whole = size - size % kLanes;
    const T* tile = logits + begin;
    float maxima[kLanes], sums[kLanes] = {}, exps[kLanes] = {};
    std::fill(maxima, maxima + kLanes, peak);
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float x = to_float(tile[i + lane]);
        maxima[lane] = x > maxima[lane] ? x : maxima[lane];
        sums[lane] += x;
      }
    for (int64_t i = whole; i < size; ++i) {
      const float x = to_float(tile[i]);
      maxima[0] = x > maxima[0] ? x : maxima[0];
      sums[0] += x;
    }
    const float higher = *std::max_element(maxima, maxima + kLanes);
    for (float lane : sums) sum += lane;
    // exp(-inf - -inf) is NaN; a row of -inf alone keeps a total of zero, and NaN shows in `sum`.
    if (higher == -std::numeric_limits<float>::infinity()) continue;
    total *= std::exp(static_cast<double>(peak) - higher);
    peak = higher;
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane)
        exps[lane] += exp_nonpositive(to_float(tile[i + lane]) - peak);
    for (int64_t i = whole; i < size; ++i) exps[0] += exp_nonpositive(to_float(tile[i]) - peak);
    for (float lane : exps) total += lane;
  }
  return {peak, std::log(total), sum};
}

// out = c * (softmax - uniform) except at the label, where the caller writes; may be in place.
template <typename T>
COVR_HD void softmax_row_of(T* out, const T* logits, int64_t n, float peak, float log_sum, float c,
                            float uniform) {
#pragma GCC ivdep  // out is logits or apart from it; the compiler's own check would take in place for overlap
  for (int64_t i = 0; i < n; ++i) {
    const float x = to_float(logits[i]) - peak - log_sum;
    out[i] = from_float<T>(c * (exp_nonpositive(x) - uniform));
  }
}

// Clones cannot be templates: one overload for each element type.
#define COVR_ROW_KERNELS(T)                                                                            \
  COVR_CLONES RowSum reduce_row(const T* logits, int64_t n) { return reduce_row_of(logits, n); }       \
  COVR_CLONES void softmax_row(T* out, const T* logits, int64_t n, float peak, float log_sum, float c, \
                               float uniform) {                                                        \
    softmax_row_of(out, logits, n, peak, log_sum, c, uniform);                                         \
  }
COVR_ROW_KERNELS(float)
COVR_ROW_KERNELS(BFloat16)
COVR_ROW_KERNELS(Float16)
#undef COVR_ROW_KERNELS

struct Rows {
  const int64_t* labels;
  const float* scale;
  int64_t rows, vocabulary;
  float smoothing;
  int threads;

  template <typename Body>
  void for_each(const Body& body) const {
    parallel_for(rows, std::max<int64_t>(1, kGrain / vocabulary), threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row);
    });
  }
};

template <typename T>
void reduce(const Rows& r, const T* logits, float* losses, float* peaks, float* log_sums) {
  r.for_each([&](int64_t row) {
    losses[row] = peaks[row] = log_sums[row] = 0;
    if (r.scale[row] == 0) return;
    const int64_t label = r.labels[row];
    if (label < 0 || label >= r.vocabulary)
      throw std::invalid_argument("label " + std::to_string(label) + " is not in [0, " +
                                  std::to_string(r.vocabulary) + ")");
    const T* x = logits + row * r.vocabulary;
    const RowSum sum = reduce_row(x, r.vocabulary);
    const double peak = sum.peak;
    double loss = sum.log_sum + (1.0 - r.smoothing) * (peak - to_float(x[label]));
    // Only where asked for: a logit of -inf would turn it into 0 * inf.
    if (r.smoothing > 0) loss += r.smoothing * (peak - sum.sum / static_cast<double>(r.vocabulary));
    losses[row] = static_cast<float>(r.scale[row] * loss);
    peaks[row] = sum.peak;
    log_sums[row] = static_cast<float>(sum.log_sum);
  });
}

template <typename T>
void gradient(const Rows& r, const T* logits, T* out, const float* peaks, const float* log_sums,
              float upstream) {
  const float uniform = r.smoothing / static_cast<float>(r.vocabulary);
  r.for_each([&](int64_t row) {
    const T* x = logits + row * r.vocabulary;
    T* g = out + row * r.vocabulary;
    if (r.scale[row] == 0) {
      std::fill(g, g + r.vocabulary, from_float<T>(0.0f));
      return;
    }
    const float c = upstream * r.scale[row];
    const int64_t label = r.labels[row];
    const float probability =
        std::exp(to_float(x[label]) - peaks[row] - log_sums[row]);  // before it is overwritten
    softmax_row(g, x, r.vocabulary, peaks[row], log_sums[row], c, uniform);
    g[label] = from_float<T>(c * (probability - uniform - (1.0f - r.smoothing)));
  });
}

// Calls f with a null pointer of the element type that Python numbers so.
template <typename F>
void with_format(int format, const F& f) {
  switch (format) {
    case 0:
      return f(static_cast<float*>(nullptr));
    case 1:
      return f(static_cast<BFloat16*>(nullptr));
    case 2:
      return f(static_cast<Float16*>(nullptr));
  }
  throw std::invalid_argument("unknown element format");
}

Rows make_rows(uintptr_t labels, uintptr_t scale, int64_t rows, int64_t vocabulary, double smoothing,
               int threads) {
  return {reinterpret_cast<const int64_t*>(labels),
          reinterpret_cast<const float*>(scale),
          rows,
          vocabulary,
          static_cast<float>(smoothing),
          threads};
}

void cross_entropy_reduce(uintptr_t losses, uintptr_t normaliser, uintptr_t logits, uintptr_t labels,
                          uintptr_t scale, int64_t rows, int64_t vocabulary, double smoothing, int format,
                          int threads) {
  with_format(format, [&]<typename T>(T*) {
    reduce(make_rows(labels, scale, rows, vocabulary, smoothing, threads), reinterpret_cast<const T*>(logits),
           reinterpret_cast<float*>(losses), reinterpret_cast<float*>(normaliser),
           reinterpret_cast<float*>(normaliser) + rows);
  });
}

void cross_entropy_gradient(uintptr_t out, uintptr_t normaliser, double upstream, uintptr_t logits,
                            uintptr_t labels, uintptr_t scale, int64_t rows, int64_t vocabulary,
                            double smoothing, int format, int threads) {
  with_format(format, [&]<typename T>(T*) {
    gradient(make_rows(labels, scale, rows, vocabulary, smoothing, threads),
             reinterpret_cast<const T*>(logits), reinterpret_cast<T*>(out),
             reinterpret_cast<const float*>(normaliser), reinterpret_cast<const float*>(normaliser) + rows,
             static_cast<float>(upstream));
  });
}

}  // namespace

void bind_loss(py::module_& m) {
  m.def("cross_entropy_reduce", &cross_entropy_reduce, py::call_guard<py::gil_scoped_release>());
  m.def("cross_entropy_gradient", &cross_entropy_gradient, py::call_guard<py::gil_scoped_release>());
}

}  // namespace covr
