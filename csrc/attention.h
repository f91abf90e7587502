// Attention with rotary positions: causal over a cache of keys and values, or within segments that see all of
// themselves.
#pragma once

#include <cstdint>

namespace covr {

constexpr int kGroup = 16;  // of numbers that vectors of any width divide

// Keys and values of a head. Keys lie transposed, [dim, capacity], so that the scores of neighbouring keys
// are one vector; capacity is a multiple of kGroup, as is dim, and scores of its unused end are dropped.
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
  const float* cos;  // [positions, dim], counted from the prefix's first
  const float* sin;  // the same; its first half negated
  Block prefix, own;
  int64_t prefix_length, rows, count, first, begin, kv, groups, dim;
  float scale;

  int64_t width() const { return (groups + 2) * kv * dim; }
  Block own_of(int64_t row, int64_t head) const { return own.at(row * kv + head, dim); }
};

void attend(const Attention& a, int threads);

// Every position sees all of its segment and nothing else; no keys are kept.
struct Segments {
  float* out;        // [segments, count, heads * dim]
  const float* qkv;  // [segments, count, 3 * heads * dim]: queries, keys, values
  const float* cos;  // [periods, count, dim]; segment s takes s % periods
  const float* sin;  // the same; its first half negated
  int64_t segments, count, periods, heads, dim;
  float scale;
};

void attend_segments(const Segments& a, int threads);

}  // namespace covr
