// Products of activations with a matrix of weights, for float32 on the CPU. The weights are packed once, so a
// product reads them front to back, and what follows a product (its bias, a residual) costs no further pass.
#pragma once

#include <cstdint>

namespace covr {

// Weights of a linear layer in panels of kPanel outputs. What fills the last panel up is zero.
struct Packed {
  static constexpr int kPanel = 32;

  const float* panels;  // [ceil(out / kPanel), in, kPanel]
  const float* bias;    // [ceil(out / kPanel), kPanel]
  int64_t in, out;
};

// out[rows, w.out] = (add ? out : 0) + in[rows, w.in] @ weights + bias.
void product(float* out, const float* in, int64_t rows, const Packed& w, bool add, int threads);

// Into how many pieces to cut `rows` that go through several products: each piece stays in the cache between
// them and is long enough for the weights to be worth reading; if there is enough for that, every thread gets
// as many.
int64_t pieces_of(int64_t rows, int threads);

}  // namespace covr
