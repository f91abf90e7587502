#include "product.h"

#include <pybind11/pybind11.h>

#include <algorithm>

#include "lanes.h"
#include "parallel.h"

namespace py = pybind11;

namespace covr {
namespace {

constexpr int kPanel = Packed::kPanel;
constexpr int kAhead = 32;          // rows of a panel that are asked for before they are needed
constexpr int64_t kWork = 1 << 21;  // multiplications worth a thread

struct Product {
  float* out;
  const float* in;
  int64_t rows;
  const Packed& w;
};

// What fits into the registers of a machine: sums of kRows rows of kVectors vectors, one row of a panel and a
// factor. With 16 lanes come 32 registers.
template <typename L>
struct Shape : L {
  static constexpr int kRows = L::width == 16 ? 12 : 6, kVectors = 2;
};

// `kRows` rows of a part of a panel: the sums stay in registers while the panel's weights pass by. kFirst:
// the rows that bring the panel into the cache, where the others find it.
template <typename S, int kRows, bool kAdd, bool kFirst>
COVR_HD void tile(float* out, int64_t out_stride, const float* in, int64_t depth, const float* panel,
                  const float* bias) {
  typename S::Vector sums[kRows][S::kVectors] = {};
  for (int64_t i = 0; i < depth; ++i, panel += kPanel) {
    typename S::Vector weights[S::kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < S::kVectors; ++v) {
      weights[v] = S::load(panel + v * S::width);
      if (kFirst) __builtin_prefetch(panel + kAhead * kPanel + v * S::width);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < S::kVectors; ++v) sums[r][v] += weights[v] * in[r * depth + i];
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < S::kVectors; ++v) {
      // Last: summed onto a large residual, every product would be rounded as coarsely as that.
      float* to = out + r * out_stride + v * S::width;
      sums[r][v] += S::load(bias + v * S::width);
      S::store(to, kAdd ? S::load(to) + sums[r][v] : sums[r][v]);
    }
}

// The same for 1 <= rows <= kRows.
template <typename S, int kRows, bool kAdd, bool kFirst>
COVR_HD void tile_of(int64_t rows, float* out, int64_t out_stride, const float* in, int64_t depth,
                     const float* panel, const float* bias) {
  if constexpr (kRows > 1)
    if (rows < kRows)
      return tile_of<S, kRows - 1, kAdd, kFirst>(rows, out, out_stride, in, depth, panel, bias);
  tile<S, kRows, kAdd, kFirst>(out, out_stride, in, depth, panel, bias);
}

// Pieces [begin, end) of a product: all rows of a panel, in `count` tiles of about equal height, then the
// next panel.
template <typename S, bool kAdd>
COVR_HD void tiles(const Product& p, int64_t count, int64_t begin, int64_t end) {
  const int64_t depth = p.w.in, width = p.w.out;
  float edge[S::kRows * kPanel];
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t n = piece / count, first = p.rows * (piece % count) / count;
    const int64_t rows = p.rows * (piece % count + 1) / count - first;
    const float *in = p.in + first * depth, *panel = p.w.panels + n * depth * kPanel;
    float* out = p.out + first * width + n * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, width - n * kPanel);
    const bool whole = columns == kPanel;
    if (!whole && kAdd)
      for (int64_t r = 0; r < rows; ++r) std::copy_n(out + r * width, columns, edge + r * kPanel);
    float* to = whole ? out : edge;
    const int64_t stride = whole ? width : kPanel;
    for (int c = 0; c < kPanel; c += S::kVectors * S::width) {
      const float* bias = p.w.bias + n * kPanel + c;
      if (first == 0)
        tile_of<S, S::kRows, kAdd, true>(rows, to + c, stride, in, depth, panel + c, bias);
      else
        tile_of<S, S::kRows, kAdd, false>(rows, to + c, stride, in, depth, panel + c, bias);
    }
    if (!whole)
      for (int64_t r = 0; r < rows; ++r) std::copy_n(edge + r * kPanel, columns, out + r * width);
  }
}

}  // namespace

void product(float* out, const float* in, int64_t rows, const Packed& w, bool add, int threads) {
  const Product p = {out, in, rows, w};
  const int64_t height = lanes_in_use() == 16 ? Shape<Lanes<16>>::kRows : Shape<Lanes<8>>::kRows;
  const int64_t count = (rows + height - 1) / height, panels = (w.out + kPanel - 1) / kPanel;
  const int64_t grain = std::max<int64_t>(1, kWork / (height * kPanel * w.in));
  parallel_for(panels * count, grain, threads, [&](int64_t begin, int64_t end) {
    on_this_machine([&](auto lanes) COVR_INLINE {
      using S = Shape<decltype(lanes)>;
      add ? tiles<S, true>(p, count, begin, end) : tiles<S, false>(p, count, begin, end);
    });
  });
}

int64_t pieces_of(int64_t rows, int threads) {
  constexpr int64_t kMost = 128, kLeast = 32;
  const int64_t pieces = std::max((rows + kMost - 1) / kMost, std::min<int64_t>(threads, rows / kLeast));
  return pieces < threads ? std::max<int64_t>(pieces, 1) : (pieces + threads - 1) / threads * threads;
}

void bind_product(py::module_& m) {
  py::class_<Packed>(m, "Packed").def(py::init([](uintptr_t panels, uintptr_t bias, int64_t in, int64_t out) {
    return Packed{reinterpret_cast<const float*>(panels), reinterpret_cast<const float*>(bias), in, out};
  }));
  m.def(
      "product",
      [](uintptr_t out, uintptr_t in, int64_t rows, const Packed& w, bool add, int threads) {
        product(reinterpret_cast<float*>(out), reinterpret_cast<const float*>(in), rows, w, add, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace covr
