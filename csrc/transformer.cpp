// What a transformer does between its matrix products, for float32 inference on the CPU: RMS norm, gated
// activation, and attention with rotary positions: causal over a cache of keys and values, or within segments
// that see all of themselves. torch's operations cost more to dispatch and to pass through memory than to
// compute at the sizes of a model that answers in milliseconds.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exp.h"
#include "parallel.h"

namespace py = pybind11;

namespace covr {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kGrain = 1 << 14;  // numbers worth a thread

// Sixteen floats at any address; the compiler splits them where registers are shorter.
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

COVR_HD Lanes& lanes(float* at) { return *reinterpret_cast<Lanes*>(at); }
COVR_HD const Lanes& lanes(const float* at) { return *reinterpret_cast<const Lanes*>(at); }

typedef int Places __attribute__((vector_size(kLanes * sizeof(int))));

// Combines all lanes: each step with those that lie kDistance further.
template <int kDistance = kLanes / 2, typename Combine>
COVR_HD float reduce(Lanes x, const Combine& combine) {
  constexpr Places kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  x = combine(x, __builtin_shuffle(x, (kNumbers + kDistance) % kLanes));
  if constexpr (kDistance == 1)
    return x[0];
  else
    return reduce<kDistance / 2>(x, combine);
}

COVR_HD float sum(Lanes x) {
  return reduce(x, [](Lanes a, Lanes b) { return a + b; });
}

COVR_HD Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// ------------------------------------------------------------------ norm and gate

COVR_CLONES void norm_rows(float* out, const float* in, const float* weight, int64_t rows, int64_t width,
                           float epsilon) {
  const int64_t whole = width - width % kLanes;
  for (int64_t row = 0; row < rows; ++row, in += width, out += width) {
    Lanes squares = {};
    for (int64_t i = 0; i < whole; i += kLanes) squares += lanes(in + i) * lanes(in + i);
    float total = sum(squares);
    for (int64_t i = whole; i < width; ++i) total += in[i] * in[i];
    const float scale = 1 / std::sqrt(total / static_cast<float>(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) out[i] = weight[i] * (in[i] * scale);
  }
}

// out[rows, width] = silu(gate) * up of in[rows, gate | up].
COVR_CLONES void gate_rows(float* out, const float* in, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, in += 2 * width, out += width)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      const float x = in[i], e = exp_nonpositive(x < 0 ? x : -x);
      out[i] = (x < 0 ? x * e : x) / (1 + e) * in[width + i];
    }
}

// ------------------------------------------------------------------ attention

// Keys and values of a head. Keys lie transposed, [dim, capacity], so that the scores of neighbouring keys
// are one vector; capacity is a multiple of kLanes, and scores of its unused end are dropped.
struct Block {
  float* keys;
  float* values;  // [capacity, dim]
  int64_t capacity;

  Block at(int64_t head, int64_t dim) const {
    return {keys + head * dim * capacity, values + head * capacity * dim, capacity};
  }
};

// One call over `rows` rows of `count` positions. Before them stand a prefix that all rows share, [kv] heads
// of `prefix_length` positions, and `begin` positions of each row's own, in [rows, kv] heads.
struct Attention {
  float* out;        // [rows, count - first, kv * groups * dim]
  const float* qkv;  // [rows, count, (groups + 2) * kv * dim]: queries, keys, values
  const float* cos;  // [count, dim], of every row
  const float* sin;  // the same; its first half negated
  Block prefix, own;
  int64_t prefix_length, rows, count, first, begin, kv, groups, dim;
  float scale;

  int64_t width() const { return (groups + 2) * kv * dim; }
  Block own_of(int64_t row, int64_t head) const { return own.at(row * kv + head, dim); }
};

COVR_HD int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

COVR_HD void rotate(float* out, const float* in, const float* cos, const float* sin, int64_t dim,
                    float scale) {
  const int64_t half = dim / 2;
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const float a = in[i], b = in[i + half];
    out[i] = scale * (a * cos[i] + b * sin[i]);
    out[i + half] = scale * (b * cos[i + half] + a * sin[i + half]);
  }
}

constexpr int kQueries = 4;  // that share what is loaded

// kQueries queries at a time. Scores, then probabilities, lie in rows of `stride`: those of the prefix,
// filled up to whole vectors, then those of the row's own positions.
struct Tile {
  float* q;       // [kQueries, dim]
  float* scores;  // [kQueries, stride]
  int64_t stride;
  int used;  // queries, at most kQueries; what is computed for the others is dropped
  float* out[kQueries];
  Block own[kQueries];
  int64_t seen[kQueries];  // positions of its own row that a query sees
  bool one_row;
  float inverse[kQueries];  // of the sums of exponentials
};

// scores[r][key] = q[r] . keys[r][:, key] for `n` keys; of one block for all queries where kShared.
template <bool kShared, int kVectors>
COVR_HD void score_vectors(float* scores, int64_t stride, const float* q, const float* const* keys,
                           int64_t capacity, int64_t dim) {
  Lanes sums[kQueries][kVectors] = {};
  for (int64_t c = 0; c < dim; ++c)
    for (int v = 0; v < kVectors; ++v) {
      const Lanes k = lanes(keys[0] + c * capacity + v * kLanes);
      for (int r = 0; r < kQueries; ++r)
        sums[r][v] += (kShared ? k : lanes(keys[r] + c * capacity + v * kLanes)) * q[r * dim + c];
    }
  for (int r = 0; r < kQueries; ++r)
    for (int v = 0; v < kVectors; ++v) lanes(scores + r * stride + v * kLanes) = sums[r][v];
}

template <bool kShared>
COVR_HD void score(const Tile& t, int64_t at, const Block* blocks, int64_t n, int64_t dim) {
  const float* keys[kQueries];
  for (int r = 0; r < kQueries; ++r) keys[r] = blocks[kShared ? 0 : r].keys;
  const int64_t capacity = blocks[0].capacity;
  int64_t key = 0;
  for (; key + kLanes < n; key += 2 * kLanes) {
    score_vectors<kShared, 2>(t.scores + at + key, t.stride, t.q, keys, capacity, dim);
    for (const float*& k : keys) k += 2 * kLanes;
  }
  if (key < n) score_vectors<kShared, 1>(t.scores + at + key, t.stride, t.q, keys, capacity, dim);
}

// Scores to probabilities times a sum that goes to `inverse`. Places that hold no score become zero. The
// queries take each step together: alone, each would wait for its own reductions.
COVR_HD void softmax(Tile& t, int64_t prefix, int64_t most) {
  const int64_t own = whole_lanes(prefix), end = own + whole_lanes(most);
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  Lanes peaks[kQueries], sums[kQueries] = {};
  float* rows[kQueries];
  for (int r = 0; r < kQueries; ++r) {
    rows[r] = t.scores + r * t.stride;
    std::fill(rows[r] + prefix, rows[r] + own, kNothing);
    std::fill(rows[r] + own + t.seen[r], rows[r] + end, kNothing);
    peaks[r] = lanes(rows[r]);
  }
  for (int64_t key = kLanes; key < end; key += kLanes)
    for (int r = 0; r < kQueries; ++r) peaks[r] = larger(peaks[r], lanes(rows[r] + key));
  float peak[kQueries];
  for (int r = 0; r < kQueries; ++r) peak[r] = reduce(peaks[r], larger);
  for (int64_t key = 0; key < end; key += kLanes)
    for (int r = 0; r < kQueries; ++r) {
      float* scores = rows[r] + key;
#pragma GCC ivdep
      for (int lane = 0; lane < kLanes; ++lane) scores[lane] = exp_nonpositive(scores[lane] - peak[r]);
      sums[r] += lanes(scores);
    }
  for (int r = 0; r < kQueries; ++r) t.inverse[r] = 1 / sum(sums[r]);
}

// sums[r] += weights[r][key] * values[r][key, :] over `n` keys.
template <bool kShared, int kVectors>
COVR_HD void mix(Lanes (&sums)[kQueries][kVectors], const Tile& t, int64_t at, const Block* blocks, int64_t c,
                 int64_t n, int64_t dim) {
  const float* values[kQueries];
  for (int r = 0; r < kQueries; ++r) values[r] = blocks[kShared ? 0 : r].values + c;
  const float* weights = t.scores + at;
  for (int64_t key = 0; key < n; ++key)
    for (int v = 0; v < kVectors; ++v) {
      const Lanes x = lanes(values[0] + key * dim + v * kLanes);
      for (int r = 0; r < kQueries; ++r)
        sums[r][v] += (kShared ? x : lanes(values[r] + key * dim + v * kLanes)) * weights[r * t.stride + key];
    }
}

template <int kVectors>
COVR_HD void mix_all(const Tile& t, const Block& prefix, int64_t prefix_length, int64_t most, int64_t c,
                     int64_t dim) {
  Lanes sums[kQueries][kVectors] = {};
  mix<true>(sums, t, 0, &prefix, c, prefix_length, dim);
  if (t.one_row)
    mix<true>(sums, t, whole_lanes(prefix_length), t.own, c, most, dim);
  else
    mix<false>(sums, t, whole_lanes(prefix_length), t.own, c, most, dim);
  for (int r = 0; r < t.used; ++r)
    for (int v = 0; v < kVectors; ++v) lanes(t.out[r] + c + v * kLanes) = sums[r][v] * t.inverse[r];
}

// A tile over a prefix and what its queries see of their own rows.
COVR_HD void attend_tile(Tile& t, const Block& prefix, int64_t prefix_length, int64_t dim) {
  const int64_t most = *std::max_element(t.seen, t.seen + t.used);
  score<true>(t, 0, &prefix, prefix_length, dim);
  if (t.one_row)
    score<true>(t, whole_lanes(prefix_length), t.own, most, dim);
  else
    score<false>(t, whole_lanes(prefix_length), t.own, most, dim);
  softmax(t, prefix_length, most);
  int64_t c = 0;
  for (; c + kLanes < dim; c += 2 * kLanes) mix_all<2>(t, prefix, prefix_length, most, c, dim);
  if (c < dim) mix_all<1>(t, prefix, prefix_length, most, c, dim);
}

// Keys of one head, rotated, and their values go to `own` from place `begin` on. Both are given in rows of
// `width`. Keys are transposed kLanes at a time, by way of `rotated` [kLanes, dim]: alone, each would touch
// a line of memory per number, and where lines lie a power of two apart the cache holds few of them.
COVR_HD void hold(const Block& own, int64_t begin, const float* keys, const float* values, int64_t width,
                  const float* cos, const float* sin, int64_t count, int64_t dim, float* rotated) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, count - first);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = first + i;
      rotate(rotated + i * dim, keys + at * width, cos + at * dim, sin + at * dim, dim, 1);
      std::copy_n(values + at * width, dim, own.values + (begin + at) * dim);
    }
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t i = 0; i < n; ++i) own.keys[c * own.capacity + begin + first + i] = rotated[i * dim + c];
  }
}

// Head `head` of the rows [begin, end), with all the queries that share its keys.
COVR_CLONES void attend_head(const Attention& a, int64_t head, int64_t begin, int64_t end, float* q,
                             float* scores, int64_t stride) {
  const int64_t asking = a.count - a.first, width = a.kv * a.groups * a.dim;
  const Block prefix = a.prefix.at(head, a.dim);
  for (int64_t row = begin; row < end; ++row) {
    const float* keys = a.qkv + row * a.count * a.width() + (a.groups * a.kv + head) * a.dim;
    hold(a.own_of(row, head), a.begin, keys, keys + a.kv * a.dim, a.width(), a.cos, a.sin, a.count, a.dim, q);
  }
  Tile t;
  t.q = q;
  t.scores = scores;
  t.stride = stride;
  for (int64_t group = 0; group < a.groups; ++group) {
    const int64_t query = (head * a.groups + group) * a.dim;
    int64_t row = begin, i = a.first;
    for (int64_t left = (end - begin) * asking; left > 0; left -= kQueries) {
      t.used = static_cast<int>(std::min<int64_t>(kQueries, left));
      for (int r = 0; r < t.used; ++r) {
        rotate(q + r * a.dim, a.qkv + (row * a.count + i) * a.width() + query, a.cos + i * a.dim,
               a.sin + i * a.dim, a.dim, a.scale);
        t.out[r] = a.out + (row * asking + i - a.first) * width + query;
        t.own[r] = a.own_of(row, head);
        t.seen[r] = a.begin + i + 1;
        if (++i == a.count) i = a.first, ++row;
      }
      for (int r = t.used; r < kQueries; ++r) t.own[r] = t.own[0], t.seen[r] = t.seen[0];
      t.one_row = t.own[0].keys == t.own[t.used - 1].keys;
      attend_tile(t, prefix, a.prefix_length, a.dim);
    }
  }
}

void attend(const Attention& a, int threads) {
  constexpr int64_t kRows = kQueries;  // of a piece: they fill a tile when each asks one query
  const int64_t blocks = (a.rows + kRows - 1) / kRows, stride = whole_lanes(a.prefix_length) + a.own.capacity;
  const int64_t work = kRows * a.count * (a.prefix_length + a.begin + a.count) * a.groups * a.dim;
  parallel_for(a.kv * blocks, std::max<int64_t>(1, kGrain / work), threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(kLanes * a.dim + kQueries * stride);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % blocks * kRows;
      attend_head(a, i / blocks, row, std::min(row + kRows, a.rows), scratch.data(),
                  scratch.data() + kLanes * a.dim, stride);
    }
  });
}

// ------------------------------------------------------------------ attention within segments

// Every position sees all of its segment and nothing else; no keys are kept.
struct Segments {
  float* out;        // [segments, count, heads * dim]
  const float* qkv;  // [segments, count, 3 * heads * dim]: queries, keys, values
  const float* cos;  // [periods, count, dim]; segment s takes s % periods
  const float* sin;  // the same; its first half negated
  int64_t segments, count, periods, heads, dim;
  float scale;
};

// One head of one segment. `own` has room for its keys and values, `q` and `scores` for a tile.
COVR_CLONES void attend_segment(const Segments& a, int64_t segment, int64_t head, const Block& own, float* q,
                                float* scores) {
  const int64_t width = a.heads * a.dim, angles = segment % a.periods * a.count * a.dim;
  const float* queries = a.qkv + segment * a.count * 3 * width + head * a.dim;
  const float *keys = queries + width, *values = keys + width, *cos = a.cos + angles, *sin = a.sin + angles;
  float* out = a.out + segment * a.count * width + head * a.dim;
  hold(own, 0, keys, values, 3 * width, cos, sin, a.count, a.dim, q);
  Tile t;
  t.q = q;
  t.scores = scores;
  t.stride = own.capacity;
  t.one_row = true;
  std::fill_n(t.own, kQueries, own);
  std::fill_n(t.seen, kQueries, a.count);
  for (int64_t i = 0; i < a.count; i += kQueries) {
    t.used = static_cast<int>(std::min<int64_t>(kQueries, a.count - i));
    for (int r = 0; r < t.used; ++r) {
      const int64_t at = i + r;
      rotate(q + r * a.dim, queries + at * 3 * width, cos + at * a.dim, sin + at * a.dim, a.dim, a.scale);
      t.out[r] = out + at * width;
    }
    attend_tile(t, own, 0, a.dim);
  }
}

void attend_segments(const Segments& a, int threads) {
  const int64_t capacity = whole_lanes(a.count), block = capacity * a.dim;
  const int64_t work = a.count * a.count * a.dim;
  const int64_t grain = std::max<int64_t>(1, kGrain / work);
  parallel_for(a.segments * a.heads, grain, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * block + kLanes * a.dim + kQueries * capacity);
    const Block own = {scratch.data(), scratch.data() + block, capacity};
    float* q = scratch.data() + 2 * block;
    for (int64_t i = begin; i < end; ++i)
      attend_segment(a, i / a.heads, i % a.heads, own, q, q + kLanes * a.dim);
  });
}

}  // namespace

void bind_transformer(py::module_& m) {
  m.def(
      "rms_norm",
      [](uintptr_t out, uintptr_t in, uintptr_t weight, int64_t rows, int64_t width, float epsilon,
         int threads) {
        parallel_for(rows, std::max<int64_t>(1, kGrain / width), threads, [&](int64_t begin, int64_t end) {
          norm_rows(reinterpret_cast<float*>(out) + begin * width,
                    reinterpret_cast<const float*>(in) + begin * width,
                    reinterpret_cast<const float*>(weight), end - begin, width, epsilon);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "silu_gate",
      [](uintptr_t out, uintptr_t in, int64_t rows, int64_t width, int threads) {
        parallel_for(rows, std::max<int64_t>(1, kGrain / width), threads, [&](int64_t begin, int64_t end) {
          gate_rows(reinterpret_cast<float*>(out) + begin * width,
                    reinterpret_cast<const float*>(in) + begin * 2 * width, end - begin, width);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "attend",
      [](uintptr_t out, uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t prefix_keys,
         uintptr_t prefix_values, uintptr_t keys, uintptr_t values, int64_t prefix_capacity, int64_t capacity,
         int64_t prefix_length, int64_t rows, int64_t count, int64_t first, int64_t begin, int64_t kv,
         int64_t groups, int64_t dim, float scale, int threads) {
        const auto floats = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
        attend({floats(out),
                floats(qkv),
                floats(cos),
                floats(sin),
                {floats(prefix_keys), floats(prefix_values), prefix_capacity},
                {floats(keys), floats(values), capacity},
                prefix_length,
                rows,
                count,
                first,
                begin,
                kv,
                groups,
                dim,
                scale},
               threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "attend_segments",
      [](uintptr_t out, uintptr_t qkv, uintptr_t cos, uintptr_t sin, int64_t segments, int64_t count,
         int64_t periods, int64_t heads, int64_t dim, float scale, int threads) {
        attend_segments({reinterpret_cast<float*>(out), reinterpret_cast<const float*>(qkv),
                         reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin), segments,
                         count, periods, heads, dim, scale},
                        threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace covr
