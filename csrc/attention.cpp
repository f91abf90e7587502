#include "attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "exp.h"
#include "lanes.h"
#include "parallel.h"

namespace covr {
namespace {

COVR_HD int64_t whole_groups(int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

constexpr int64_t kGrain = 1 << 14;  // products of two numbers worth a thread

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
// filled up to whole groups, then those of the row's own positions.
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
template <typename L, bool kShared, int kVectors>
COVR_HD void score_vectors(float* scores, int64_t stride, const float* q, const float* const* keys,
                           int64_t capacity, int64_t dim) {
  typename L::Vector sums[kQueries][kVectors] = {};
  for (int64_t c = 0; c < dim; ++c)
    for (int v = 0; v < kVectors; ++v) {
      const typename L::Vector k = L::load(keys[0] + c * capacity + v * L::width);
      for (int r = 0; r < kQueries; ++r)
        sums[r][v] += (kShared ? k : L::load(keys[r] + c * capacity + v * L::width)) * q[r * dim + c];
    }
  for (int r = 0; r < kQueries; ++r)
    for (int v = 0; v < kVectors; ++v) L::store(scores + r * stride + v * L::width, sums[r][v]);
}

template <typename L, bool kShared>
COVR_HD void score(const Tile& t, int64_t at, const Block* blocks, int64_t n, int64_t dim) {
  const float* keys[kQueries];
  for (int r = 0; r < kQueries; ++r) keys[r] = blocks[kShared ? 0 : r].keys;
  const int64_t capacity = blocks[0].capacity;
  int64_t key = 0;
  for (; key + L::width < n; key += 2 * L::width) {
    score_vectors<L, kShared, 2>(t.scores + at + key, t.stride, t.q, keys, capacity, dim);
    for (const float*& k : keys) k += 2 * L::width;
  }
  if (key < n) score_vectors<L, kShared, 1>(t.scores + at + key, t.stride, t.q, keys, capacity, dim);
}

// Scores to probabilities times a sum that goes to `inverse`. Places that hold no score become zero. The
// queries take each step together: alone, each would wait for its own reductions.
template <typename L>
COVR_HD void softmax(Tile& t, int64_t prefix, int64_t most) {
  const int64_t own = whole_groups(prefix), end = own + whole_groups(most);
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  typename L::Vector peaks[kQueries], sums[kQueries] = {};
  float* rows[kQueries];
  for (int r = 0; r < kQueries; ++r) {
    rows[r] = t.scores + r * t.stride;
    std::fill(rows[r] + prefix, rows[r] + own, kNothing);
    std::fill(rows[r] + own + t.seen[r], rows[r] + end, kNothing);
    peaks[r] = L::load(rows[r]);
  }
  for (int64_t key = L::width; key < end; key += L::width)
    for (int r = 0; r < kQueries; ++r) L::keep_larger(peaks[r], L::load(rows[r] + key));
  float peak[kQueries];
  for (int r = 0; r < kQueries; ++r) peak[r] = L::largest(peaks[r]);
  for (int64_t key = 0; key < end; key += L::width)
    for (int r = 0; r < kQueries; ++r) {
      float* scores = rows[r] + key;
#pragma GCC ivdep
      for (int lane = 0; lane < L::width; ++lane) scores[lane] = exp_nonpositive(scores[lane] - peak[r]);
      sums[r] += L::load(scores);
    }
  for (int r = 0; r < kQueries; ++r) t.inverse[r] = 1 / L::sum(sums[r]);
}

// sums[r] += weights[r][key] * values[r][key, :] over `n` keys.
template <typename L, bool kShared, int kVectors>
COVR_HD void mix(typename L::Vector (&sums)[kQueries][kVectors], const Tile& t, int64_t at,
                 const Block* blocks, int64_t c, int64_t n, int64_t dim) {
  const float* values[kQueries];
  for (int r = 0; r < kQueries; ++r) values[r] = blocks[kShared ? 0 : r].values + c;
  const float* weights = t.scores + at;
  for (int64_t key = 0; key < n; ++key)
    for (int v = 0; v < kVectors; ++v) {
      const typename L::Vector x = L::load(values[0] + key * dim + v * L::width);
      for (int r = 0; r < kQueries; ++r)
        sums[r][v] +=
            (kShared ? x : L::load(values[r] + key * dim + v * L::width)) * weights[r * t.stride + key];
    }
}

template <typename L, int kVectors>
COVR_HD void mix_all(const Tile& t, const Block& prefix, int64_t prefix_length, int64_t most, int64_t c,
                     int64_t dim) {
  typename L::Vector sums[kQueries][kVectors] = {};
  mix<L, true>(sums, t, 0, &prefix, c, prefix_length, dim);
  if (t.one_row)
    mix<L, true>(sums, t, whole_groups(prefix_length), t.own, c, most, dim);
  else
    mix<L, false>(sums, t, whole_groups(prefix_length), t.own, c, most, dim);
  for (int r = 0; r < t.used; ++r)
    for (int v = 0; v < kVectors; ++v) L::store(t.out[r] + c + v * L::width, sums[r][v] * t.inverse[r]);
}

// A tile over a prefix and what its queries see of their own rows.
template <typename L>
COVR_HD void attend_tile(Tile& t, const Block& prefix, int64_t prefix_length, int64_t dim) {
  const int64_t most = *std::max_element(t.seen, t.seen + t.used);
  score<L, true>(t, 0, &prefix, prefix_length, dim);
  if (t.one_row)
    score<L, true>(t, whole_groups(prefix_length), t.own, most, dim);
  else
    score<L, false>(t, whole_groups(prefix_length), t.own, most, dim);
  softmax<L>(t, prefix_length, most);
  int64_t c = 0;
  for (; c + L::width < dim; c += 2 * L::width) mix_all<L, 2>(t, prefix, prefix_length, most, c, dim);
  if (c < dim) mix_all<L, 1>(t, prefix, prefix_length, most, c, dim);
}

// Keys of one head, rotated, and their values go to `own` from place `begin` on. Both are given in rows of
// `width`. Keys are transposed kGroup at a time, by way of `rotated` [kGroup, dim]: alone, each would touch
// a line of memory per number, and where lines lie a power of two apart the cache holds few of them.
COVR_HD void hold(const Block& own, int64_t begin, const float* keys, const float* values, int64_t width,
                  const float* cos, const float* sin, int64_t count, int64_t dim, float* rotated) {
  for (int64_t first = 0; first < count; first += kGroup) {
    const int64_t n = std::min<int64_t>(kGroup, count - first);
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
template <typename L>
COVR_HD void attend_head(const Attention& a, int64_t head, int64_t begin, int64_t end, float* q,
                         float* scores, int64_t stride) {
  const int64_t asking = a.count - a.first, width = a.kv * a.groups * a.dim;
  const int64_t angles = (a.prefix_length + a.begin) * a.dim;
  const float *cos = a.cos + angles, *sin = a.sin + angles;
  const Block prefix = a.prefix.at(head, a.dim);
  for (int64_t row = begin; row < end; ++row) {
    const float* keys = a.qkv + row * a.count * a.width() + (a.groups * a.kv + head) * a.dim;
    hold(a.own_of(row, head), a.begin, keys, keys + a.kv * a.dim, a.width(), cos, sin, a.count, a.dim, q);
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
        rotate(q + r * a.dim, a.qkv + (row * a.count + i) * a.width() + query, cos + i * a.dim,
               sin + i * a.dim, a.dim, a.scale);
        t.out[r] = a.out + (row * asking + i - a.first) * width + query;
        t.own[r] = a.own_of(row, head);
        t.seen[r] = a.begin + i + 1;
        if (++i == a.count) i = a.first, ++row;
      }
      for (int r = t.used; r < kQueries; ++r) t.own[r] = t.own[0], t.seen[r] = t.seen[0];
      t.one_row = t.own[0].keys == t.own[t.used - 1].keys;
      attend_tile<L>(t, prefix, a.prefix_length, a.dim);
    }
  }
}

}  // namespace

void attend(const Attention& a, int threads) {
  constexpr int64_t kRows = kQueries;  // of a piece: they fill a tile when each asks one query
  const int64_t blocks = (a.rows + kRows - 1) / kRows,
                stride = whole_groups(a.prefix_length) + a.own.capacity;
  const int64_t work = kRows * a.count * (a.prefix_length + a.begin + a.count) * a.groups * a.dim;
  parallel_for(a.kv * blocks, std::max<int64_t>(1, kGrain / work), threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(kGroup * a.dim + kQueries * stride);
    float *q = scratch.data(), *scores = q + kGroup * a.dim;
    on_this_machine([&](auto lanes) COVR_INLINE {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % blocks * kRows;
        attend_head<decltype(lanes)>(a, i / blocks, row, std::min(row + kRows, a.rows), q, scores, stride);
      }
    });
  });
}

namespace {

// One head of one segment. `own` has room for its keys and values, `q` and `scores` for a tile.
template <typename L>
COVR_HD void attend_segment(const Segments& a, int64_t segment, int64_t head, const Block& own, float* q,
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
    attend_tile<L>(t, own, 0, a.dim);
  }
}

}  // namespace

void attend_segments(const Segments& a, int threads) {
  const int64_t capacity = whole_groups(a.count), block = capacity * a.dim;
  const int64_t work = a.count * a.count * a.dim;
  const int64_t grain = std::max<int64_t>(1, kGrain / work);
  parallel_for(a.segments * a.heads, grain, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * block + kGroup * a.dim + kQueries * capacity);
    const Block own = {scratch.data(), scratch.data() + block, capacity};
    float* q = scratch.data() + 2 * block;
    on_this_machine([&](auto lanes) COVR_INLINE {
      for (int64_t i = begin; i < end; ++i)
        attend_segment<decltype(lanes)>(a, i / a.heads, i % a.heads, own, q, q + kGroup * a.dim);
    });
  });
}

}  // namespace covr
