// EDDF on the CPU: one pass for moments and a histogram, the ranks from the few bins with them, one
// counting pass and one compacting pass. Nothing is sorted and no z-score is written.
#include "ops/filter.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "common/border.h"
#include "common/parallel.h"

namespace covr {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values worth a thread
constexpr int64_t kTile = 1 << 12;   // values that stay in L1 between the two halves of a pass
constexpr int64_t kSortBelow = 512;

struct Moments {
  double sum = 0, squares = 0;
};

COVR_CLONES Moments tile_moments(const float* values, int64_t n, float shift) {
  constexpr int kLanes = 16;
  double sum[kLanes] = {}, squares[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const double centred = static_cast<double>(values[i + lane]) - shift;
      sum[lane] += centred;
      squares[lane] += centred * centred;
    }
  for (; i < n; ++i) {
    const double centred = static_cast<double>(values[i]) - shift;
    sum[0] += centred;
    squares[0] += centred * centred;
  }
  Moments total;
  for (int lane = 0; lane < kLanes; ++lane) {
    total.sum += sum[lane];
    total.squares += squares[lane];
  }
  return total;
}

COVR_CLONES int64_t count_above(const float* values, int64_t n, float threshold) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t end = std::min(n, begin + kTile);
    int32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += values[i] > threshold;
    total += count;
  }
  return total;
}

// Ranks to find among keys, and where each answer goes.
struct Query {
  int64_t rank;
  int slot;
};

// Radix selection among keys that agree above their lowest `shift` bits: a histogram of the next eight of
// them, then on into the bins with a rank.
void select_keys(std::vector<uint32_t>& keys, int shift, std::vector<Query> queries, uint32_t* found) {
  const auto n = static_cast<int64_t>(keys.size());
  if (n <= kSortBelow || shift == 0) {
    auto rest = keys.begin();             // all before it are in their places
    for (const Query& query : queries) {  // their ranks ascend
      const auto at = keys.begin() + query.rank;
      if (at >= rest) std::nth_element(rest, at, keys.end());
      rest = std::max(rest, at + 1);
      found[query.slot] = *at;
    }
    return;
  }
  constexpr int kBits = 8;
  const int below = std::max(shift - kBits, 0);
  std::array<int64_t, 1 << kBits> counts{};
  auto digit = [&](uint32_t key) { return key >> below & ((1u << (shift - below)) - 1); };
  for (uint32_t key : keys) ++counts[digit(key)];
  int64_t before = 0;
  for (uint32_t bin = 0; bin < counts.size(); before += counts[bin++]) {
    std::vector<Query> inside;
    for (const Query& query : queries)
      if (query.rank >= before && query.rank < before + counts[bin])
        inside.push_back({query.rank - before, query.slot});
    if (inside.empty()) continue;
    std::vector<uint32_t> members;
    members.reserve(counts[bin]);
    for (uint32_t key : keys)
      if (digit(key) == bin) members.push_back(key);
    select_keys(members, below, std::move(inside), found);
  }
}

// A first-level bin with some of the ranks.
struct Bin {
  uint32_t digit;
  std::vector<Query> queries;
  std::vector<std::vector<uint32_t>> members;  // of each thread's piece
};

template <int kBits>
void histogram(const float* values, int64_t n, uint32_t* counts) {
  for (int64_t i = 0; i < n; ++i) ++counts[ordered_key(values[i]) >> (32 - kBits)];
}

COVR_CLONES bool any_within(const float* values, int64_t n, float low, float high) {
  int inside = 0;
  for (int64_t i = 0; i < n; ++i) inside |= (values[i] >= low) & (values[i] <= high);
  return inside;
}

// Returns false when a value is NaN or infinite.
template <int kBits>
bool ranked_values(const float* values, int64_t n, int threads, double* ranked, Moments& moments) {
  constexpr int kShift = 32 - kBits;
  const int64_t pieces = std::clamp<int64_t>(n / kGrain, 1, std::max(threads, 1));
  std::vector<std::vector<uint32_t>> counts(pieces);
  // Moments are added tile by tile in a fixed order: the result does not depend on the number of threads.
  std::vector<Moments> tiles((n + kTile - 1) / kTile);
  auto piece_begin = [&](int64_t piece) { return static_cast<int64_t>(tiles.size()) * piece / pieces; };
  parallel_for_each(pieces, 1, threads, [&](int64_t piece) {
    counts[piece].assign(size_t{1} << kBits, 0);
    for (int64_t tile = piece_begin(piece); tile < piece_begin(piece + 1); ++tile) {
      const int64_t size = std::min(kTile, n - tile * kTile);
      tiles[tile] = tile_moments(values + tile * kTile, size, values[0]);
      histogram<kBits>(values + tile * kTile, size, counts[piece].data());
    }
  });
  for (const Moments& tile : tiles) {
    moments.sum += tile.sum;
    moments.squares += tile.squares;
  }
  if (!std::isfinite(moments.squares)) return false;

  std::vector<Bin> bins;
  int64_t before = 0;
  int next = 0;  // ranks ascend (from four values on), so one sweep places them all
  for (uint32_t digit = 0; next < kRanks; ++digit) {
    int64_t count = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) count += counts[piece][digit];
    if (quartile_rank(n, next) < before + count) {
      Bin bin{digit, {}, std::vector<std::vector<uint32_t>>(pieces)};
      for (; next < kRanks && quartile_rank(n, next) < before + count; ++next)
        bin.queries.push_back({quartile_rank(n, next) - before, next});
      bins.push_back(std::move(bin));
    }
    before += count;
  }

  parallel_for_each(pieces, 1, threads, [&](int64_t piece) {
    constexpr int64_t kStrip = 64;
    const int64_t last = std::min(n, piece_begin(piece + 1) * kTile);
    for (Bin& bin : bins) {
      const float low = value_of_key(bin.digit << kShift);
      const float high = value_of_key((bin.digit << kShift) + ((1u << kShift) - 1));
      auto& members = bin.members[piece];
      members.resize(counts[piece][bin.digit] + 1);  // every key is written, and only a member stays
      uint32_t* member = members.data();
      for (int64_t strip = piece_begin(piece) * kTile; strip < last; strip += kStrip) {
        const int64_t size = std::min(kStrip, last - strip);
        if (!any_within(values + strip, size, low, high)) continue;
        for (int64_t i = strip; i < strip + size; ++i) {
          const uint32_t key = ordered_key(values[i]);
          *member = key;
          member += key >> kShift == bin.digit;
        }
      }
      members.pop_back();
    }
  });
  uint32_t found[kRanks];
  for (Bin& bin : bins) {
    auto& keys = bin.members[0];
    for (int64_t piece = 1; piece < pieces; ++piece)
      keys.insert(keys.end(), bin.members[piece].begin(), bin.members[piece].end());
    select_keys(keys, kShift, bin.queries, found);
  }
  for (int i = 0; i < kRanks; ++i) ranked[i] = value_of_key(found[i]);
  return true;
}

// The same for a few values, where sorting is quicker than clearing a histogram.
bool sorted_values(const float* values, int64_t n, double* ranked, Moments& moments) {
  moments = tile_moments(values, n, values[0]);
  if (!std::isfinite(moments.squares)) return false;
  std::vector<float> ordered(values, values + n);
  std::sort(ordered.begin(), ordered.end());
  for (int i = 0; i < kRanks; ++i) ranked[i] = ordered[quartile_rank(n, i)];
  return true;
}

// Writes the statistics and returns how many values are above the cutoff, or -1 for a NaN or infinite value.
int64_t exploration_threshold(View<const float, 1> returns, double scale, View<double, 1> statistics,
                              int threads) {
  const float* values = returns.data;
  const int64_t n = returns.size();
  if (n == 0) throw std::invalid_argument("returns are empty");
  require_shape("statistics", statistics.shape, {4});
  double ranked[kRanks];
  Moments moments;
  // 65,536 bins leave few values to look at again, but only a large input repays clearing and reading them.
  const bool finite = n <= kSortBelow ? sorted_values(values, n, ranked, moments)
                      : n < (1 << 17) ? ranked_values<11>(values, n, threads, ranked, moments)
                                      : ranked_values<16>(values, n, threads, ranked, moments);
  if (!finite) return -1;
  const FilterStatistics s = filter_statistics(n, ranked, values[0], moments.sum, moments.squares, scale);
  std::memcpy(statistics.data, &s, sizeof s);
  if (s.std == 0) return 0;
  std::atomic<int64_t> count = 0;
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    count += count_above(values + begin, end - begin, float_at_or_below(s.cutoff));
  });
  return count;
}

// Indices of the returns above the cutoff, ascending; `indices` has as many elements as there are.
void indices_above(View<const float, 1> returns, double cutoff, View<int64_t, 1> indices, int threads) {
  const float* values = returns.data;
  int64_t* out = indices.data;
  const int64_t n = returns.size();
  const float threshold = float_at_or_below(cutoff);
  const int64_t pieces = std::clamp<int64_t>(n / kGrain, 1, std::max(threads, 1));
  std::vector<int64_t> offset(pieces + 1, 0);
  parallel_for_each(pieces, 1, threads, [&](int64_t piece) {
    offset[piece + 1] =
        count_above(values + n * piece / pieces, n * (piece + 1) / pieces - n * piece / pieces, threshold);
  });
  for (int64_t piece = 0; piece < pieces; ++piece) offset[piece + 1] += offset[piece];
  require_shape("indices", indices.shape, {offset[pieces]});
  parallel_for_each(pieces, 1, threads, [&](int64_t piece) {
    int64_t* position = out + offset[piece];
    const int64_t* limit = out + offset[piece + 1];
    // Every index is written and only a kept one advances, which costs no branch; the loop stops at the
    // last kept value, so nothing is written past the piece's share.
    for (int64_t i = n * piece / pieces; position < limit; ++i) {
      *position = i;
      position += values[i] > threshold;
    }
  });
}

}  // namespace

void bind_filter(pybind11::module_& m) {
  define(m, "exploration_threshold", &exploration_threshold, "returns", "scale", "statistics", "threads");
  define(m, "indices_above", &indices_above, "returns", "cutoff", "indices", "threads");
#ifdef COVR_WITH_CUDA
  define(m, "exploration_filter_workspace", &cuda::exploration_filter_workspace, "n");
  define(m, "exploration_filter_cuda", &cuda::exploration_filter, "returns", "scale", "indices", "kept",
         "statistics", "workspace", "stream");
#endif
}

}  // namespace covr
