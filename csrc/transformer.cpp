// A transformer's layer in one call, for float32 inference on the CPU. At the sizes of a model that answers
// in milliseconds, torch's operations cost more to dispatch and to pass through memory than to compute.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"
#include "exp.h"
#include "lanes.h"
#include "parallel.h"
#include "product.h"

namespace py = pybind11;

namespace covr {
namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers worth a thread, where each takes a few operations

// ------------------------------------------------------------------ norm and gate

struct Norm {
  const float* weight;
  float epsilon;
};

template <typename L>
COVR_HD void norm_rows(float* out, const float* in, const Norm& norm, int64_t rows, int64_t width) {
  const int64_t whole = width - width % L::width;
  for (int64_t row = 0; row < rows; ++row, in += width, out += width) {
    typename L::Vector squares = {};
    for (int64_t i = 0; i < whole; i += L::width) squares += L::load(in + i) * L::load(in + i);
    float total = L::sum(squares);
    for (int64_t i = whole; i < width; ++i) total += in[i] * in[i];
    const float scale = 1 / std::sqrt(total / static_cast<float>(width) + norm.epsilon);
    for (int64_t i = 0; i < width; ++i) out[i] = norm.weight[i] * (in[i] * scale);
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

template <typename Body>
void for_rows(int64_t rows, int64_t width, int threads, const Body& body) {
  parallel_for(rows, std::max<int64_t>(1, kGrain / width), threads,
               [&](int64_t begin, int64_t end) { body(begin, end - begin); });
}

void norm(float* out, const float* in, const Norm& norm, int64_t rows, int64_t width, int threads) {
  for_rows(rows, width, threads, [&](int64_t begin, int64_t n) {
    on_this_machine([&](auto lanes) COVR_INLINE {
      norm_rows<decltype(lanes)>(out + begin * width, in + begin * width, norm, n, width);
    });
  });
}

// ------------------------------------------------------------------ a layer

// x += out(attention(qkv(norm(x)))); x += down(silu(gate(norm(x))) * up(norm(x))).
struct Layer {
  Norm input;
  Packed qkv, out;
  Norm query, key;  // of heads; without weights where there is none
  Norm mlp;
  Packed gate_up, down;
  int64_t kv, groups, dim;  // heads of keys, of queries for each; numbers in one
  float scale;
};

void norm_heads(const Layer& l, float* qkv, int64_t rows) {
  const int64_t queries = l.kv * l.groups;
  on_this_machine([&](auto lanes) COVR_INLINE {
    for (int64_t row = 0; row < rows; ++row, qkv += l.qkv.out) {
      float* keys = qkv + queries * l.dim;
      norm_rows<decltype(lanes)>(qkv, qkv, l.query, queries, l.dim);
      norm_rows<decltype(lanes)>(keys, keys, l.key, l.kv, l.dim);
    }
  });
}

// `out` [batch, count - first, D] becomes what the layer makes of `x` [batch, count, D], all of it at once;
// it is `x` if first is 0. attend(attended, qkv) does what lies between.
template <typename Attend>
void forward_together(const Layer& l, float* out, const float* x, int64_t batch, int64_t count, int64_t first,
                      int threads, const Attend& attend) {
  const int64_t width = l.qkv.in, heads = l.out.in, middle = l.down.in;
  const int64_t asking = count - first, seen = batch * count, asked = batch * asking;
  // Kept from call to call, unless it is large: fresh memory would cost a page fault every 4 KiB.
  constexpr size_t kKept = 1 << 24;
  thread_local std::vector<float> scratch;
  const size_t needed = seen * (width + l.qkv.out) + asked * (heads + 3 * middle);
  if (scratch.size() < needed) scratch.resize(needed);
  float* normed = scratch.data();
  float* qkv = normed + seen * width;
  float* attended = qkv + seen * l.qkv.out;
  float* gate_up = attended + asked * heads;
  float* gated = gate_up + asked * 2 * middle;
  norm(normed, x, l.input, seen, width, threads);
  product(qkv, normed, seen, l.qkv, false, threads);
  if (l.query.weight != nullptr)
    for_rows(seen, l.qkv.out, threads,
             [&](int64_t begin, int64_t n) { norm_heads(l, qkv + begin * l.qkv.out, n); });
  attend(attended, qkv);
  if (first > 0)
    for (int64_t row = 0; row < batch; ++row)
      std::copy_n(x + (row * count + first) * width, asking * width, out + row * asking * width);
  product(out, attended, asked, l.out, true, threads);
  norm(normed, out, l.mlp, asked, width, threads);
  product(gate_up, normed, asked, l.gate_up, false, threads);
  for_rows(asked, middle, threads, [&](int64_t begin, int64_t n) {
    gate_rows(gated + begin * middle, gate_up + begin * 2 * middle, n, middle);
  });
  product(out, gated, asked, l.down, true, threads);
  if (scratch.size() > kKept) std::vector<float>().swap(scratch);
}

// The same in pieces of the batch: attend(attended, qkv, row, n, threads) handles the rows [row, row + n).
template <typename Attend>
void forward(const Layer& l, float* out, const float* x, int64_t batch, int64_t count, int64_t first,
             int threads, const Attend& attend) {
  const int64_t pieces = std::min(batch, pieces_of(batch * count, threads));
  const bool apart = pieces >= threads;
  parallel_for(pieces, 1, apart ? threads : 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = batch * piece / pieces, n = batch * (piece + 1) / pieces - row;
      const int inner = apart ? 1 : threads;
      forward_together(l, out + row * (count - first) * l.qkv.in, x + row * count * l.qkv.in, n, count, first,
                       inner,
                       [&](float* attended, const float* qkv) { attend(attended, qkv, row, n, inner); });
    }
  });
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

}  // namespace

void bind_transformer(py::module_& m) {
  py::class_<Norm>(m, "Norm").def(
      py::init([](uintptr_t weight, float epsilon) { return Norm{floats(weight), epsilon}; }));
  m.def(
      "rms_norm",
      [](uintptr_t out, uintptr_t in, const Norm& weights, int64_t rows, int64_t width, int threads) {
        norm(floats(out), floats(in), weights, rows, width, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<Layer>(m, "Layer")
      .def(py::init([](const Norm& input, const Packed& qkv, const Packed& out, const Norm& query,
                       const Norm& key, const Norm& mlp, const Packed& gate_up, const Packed& down,
                       int64_t kv, int64_t groups, int64_t dim, float scale) {
             return Layer{input, qkv, out, query, key, mlp, gate_up, down, kv, groups, dim, scale};
           }),
           py::kw_only(), py::arg("input"), py::arg("qkv"), py::arg("out"), py::arg("query"), py::arg("key"),
           py::arg("mlp"), py::arg("gate_up"), py::arg("down"), py::arg("kv"), py::arg("groups"),
           py::arg("dim"), py::arg("scale"))
      .def(
          "decode",
          [](const Layer& l, uintptr_t out, uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t prefix_keys,
             uintptr_t prefix_values, uintptr_t keys, uintptr_t values, int64_t prefix_capacity,
             int64_t capacity, int64_t prefix_length, int64_t batch, int64_t count, int64_t first,
             int64_t begin, int threads) {
            const Block prefix = {floats(prefix_keys), floats(prefix_values), prefix_capacity};
            const Block own = {floats(keys), floats(values), capacity};
            forward(l, floats(out), floats(x), batch, count, first, threads,
                    [&](float* attended, const float* qkv, int64_t row, int64_t n, int inner) {
                      attend({attended, qkv, floats(cos), floats(sin), prefix, own.at(row * l.kv, l.dim),
                              prefix_length, n, count, first, begin, l.kv, l.groups, l.dim, l.scale},
                             inner);
                    });
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "encode",
          [](const Layer& l, uintptr_t x, uintptr_t cos, uintptr_t sin, int64_t segment, int64_t batch,
             int64_t count, int threads) {
            const int64_t periods = count / segment;
            forward(l, floats(x), floats(x), batch, count, 0, threads,
                    [&](float* attended, const float* qkv, int64_t, int64_t n, int inner) {
                      attend_segments({attended, qkv, floats(cos), floats(sin), n * periods, segment, periods,
                                       l.kv, l.dim, l.scale},
                                      inner);
                    });
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace covr
