// Rows of logits for the return-weighted cross-entropy: one pass that reduces a row, one that writes its
// gradient. Rows of scale zero are not read.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <variant>

#include "common/border.h"
#include "common/half.h"
#include "common/parallel.h"

namespace covr {
namespace {

constexpr int64_t kTile = 4096;      // logits that stay in L1 between finding their maximum and summing them
constexpr int kLanes = 16;           // independent sums, so that additions vectorise
constexpr int64_t kGrain = 1 << 15;  // logits worth a thread

constexpr float kLowest = -87.33654f;  // below it exp underflows the normal floats

// exp(x) for x <= 0 to 2 ulp, without branches: 2^n * exp(r) with |r| <= ln(2) / 2. Zero below kLowest.
COVR_HD float exp_nonpositive(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float clamped = x < kLowest ? kLowest : x;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.3888889e-3f;  // 1/6!, 1/5!, ...
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 0.16666667f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float power = float_of((bits_of(shifted) << 23) + 0x3f800000u);
  return x < kLowest ? 0.0f : p * power;
}

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
    parallel_for_each(rows, std::max<int64_t>(1, kGrain / vocabulary), threads, body);
  }
};

// Logits and their gradient: float32, bfloat16 or float16 [R, V].
using Logits = std::variant<View<const float, 2>, View<const BFloat16, 2>, View<const Float16, 2>>;
using Gradient = std::variant<View<float, 2>, View<BFloat16, 2>, View<Float16, 2>>;

Rows make_rows(const std::array<int64_t, 2>& logits, View<const int64_t, 1> labels,
               View<const float, 1> scale, const std::array<int64_t, 2>& normaliser, double smoothing,
               int threads) {
  const auto [rows, vocabulary] = logits;
  require_shape("labels", labels.shape, {rows});
  require_shape("scale", scale.shape, {rows});
  require_shape("normaliser", normaliser, {2, rows});
  return {labels.data, scale.data, rows, vocabulary, static_cast<float>(smoothing), threads};
}

void cross_entropy_reduce(View<float, 1> losses, View<float, 2> normaliser, Logits any_logits,
                          View<const int64_t, 1> labels, View<const float, 1> scale, double smoothing,
                          int threads) {
  const auto reduce = [&](auto logits) {
    const Rows r = make_rows(logits.shape, labels, scale, normaliser.shape, smoothing, threads);
    require_shape("losses", losses.shape, labels.shape);
    float *peaks = normaliser.data, *log_sums = peaks + r.rows;
    r.for_each([&](int64_t row) {
      losses[row] = peaks[row] = log_sums[row] = 0;
      if (r.scale[row] == 0) return;
      const int64_t label = r.labels[row];
      if (label < 0 || label >= r.vocabulary)
        throw std::invalid_argument("label " + std::to_string(label) + " is not in [0, " +
                                    std::to_string(r.vocabulary) + ")");
      const auto* x = logits.data + row * r.vocabulary;
      const RowSum sum = reduce_row(x, r.vocabulary);
      const double peak = sum.peak;
      double loss = sum.log_sum + (1.0 - r.smoothing) * (peak - to_float(x[label]));
      // Only where asked for: a logit of -inf would turn it into 0 * inf.
      if (r.smoothing > 0) loss += r.smoothing * (peak - sum.sum / static_cast<double>(r.vocabulary));
      losses[row] = static_cast<float>(r.scale[row] * loss);
      peaks[row] = sum.peak;
      log_sums[row] = static_cast<float>(sum.log_sum);
    });
  };
  std::visit(reduce, any_logits);
}

void cross_entropy_gradient(Gradient any_out, View<const float, 2> normaliser, double upstream,
                            Logits any_logits, View<const int64_t, 1> labels, View<const float, 1> scale,
                            double smoothing, int threads) {
  const auto write = [&]<typename T>(View<const T, 2> logits) {
    const Rows r = make_rows(logits.shape, labels, scale, normaliser.shape, smoothing, threads);
    const auto out = same_dtype<View<T, 2>>(any_out, "out", "logits");
    require_shape("out", out.shape, logits.shape);
    const float *peaks = normaliser.data, *log_sums = peaks + r.rows;
    const float uniform = r.smoothing / static_cast<float>(r.vocabulary);
    r.for_each([&](int64_t row) {
      const T* x = logits.data + row * r.vocabulary;
      T* g = out.data + row * r.vocabulary;
      if (r.scale[row] == 0) {
        std::fill(g, g + r.vocabulary, from_float<T>(0.0f));
        return;
      }
      const float c = static_cast<float>(upstream) * r.scale[row];
      const int64_t label = r.labels[row];
      const float probability =
          std::exp(to_float(x[label]) - peaks[row] - log_sums[row]);  // before it is overwritten
      softmax_row(g, x, r.vocabulary, peaks[row], log_sums[row], c, uniform);
      g[label] = from_float<T>(c * (probability - uniform - (1.0f - r.smoothing)));
    });
  };
  std::visit(write, any_logits);
}

}  // namespace

void bind_loss(pybind11::module_& m) {
  define(m, "cross_entropy_reduce", &cross_entropy_reduce, "losses", "normaliser", "logits", "labels",
         "scale", "smoothing", "threads");
  define(m, "cross_entropy_gradient", &cross_entropy_gradient, "out", "normaliser", "upstream", "logits",
         "labels", "scale", "smoothing", "threads");
}

}  // namespace covr
