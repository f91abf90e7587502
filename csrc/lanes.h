// Vectors of floats as wide as the machine's registers. What computes with them is written for any width and
// compiled for each kind of machine; `on_this_machine` picks one when it runs. Vectors wider than a register
// would be simpler, but GCC keeps them in memory.
#pragma once

#include <cstdint>
#include <utility>

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define COVR_X86_64
#endif

namespace covr {

template <int kWidth>
struct VectorOf {
  typedef float floats __attribute__((vector_size(kWidth * sizeof(float))));
  typedef int places __attribute__((vector_size(kWidth * sizeof(int))));
};

template <int kWidth>
struct Lanes {
  static constexpr int width = kWidth;
  using Vector = typename VectorOf<kWidth>::floats;

  // From and to any address.
  COVR_HD static Vector load(const float* x) {
    Vector vector;
    __builtin_memcpy(&vector, x, sizeof vector);
    return vector;
  }
  COVR_HD static void store(float* x, const Vector& vector) { __builtin_memcpy(x, &vector, sizeof vector); }

  COVR_HD static float sum(Vector& x) {
    return reduce(x, [](Vector& a, const Vector& b) COVR_INLINE { a += b; });
  }
  COVR_HD static float largest(Vector& x) {
    return reduce(x, [](Vector& a, const Vector& b) COVR_INLINE { keep_larger(a, b); });
  }

  COVR_HD static void keep_larger(Vector& a, const Vector& b) { a = a > b ? a : b; }

 private:
  // Combines all lanes, in `x`: each step with those that lie kDistance further.
  template <int kDistance = kWidth / 2, typename Combine>
  COVR_HD static float reduce(Vector& x, const Combine& combine) {
    fold<kDistance>(x, combine, std::make_integer_sequence<int, kWidth>());
    if constexpr (kDistance > 1) reduce<kDistance / 2>(x, combine);
    return x[0];
  }

  template <int kDistance, typename Combine, int... kPlaces>
  COVR_HD static void fold(Vector& x, const Combine& combine, std::integer_sequence<int, kPlaces...>) {
#ifdef __clang__
    combine(x, __builtin_shufflevector(x, x, ((kPlaces + kDistance) % kWidth)...));
#else
    const typename VectorOf<kWidth>::places further = {(kPlaces + kDistance) % kWidth...};
    combine(x, __builtin_shuffle(x, further));
#endif
  }
};

// Lanes of this machine's vectors: 16, 8 or 4. A test may ask for fewer than there are, while nothing
// computes.
int lanes_in_use();
void use_lanes(int lanes);  // std::invalid_argument if the machine does not have them

#ifdef COVR_X86_64
template <typename Body>
__attribute__((target("arch=x86-64-v4"))) void on_avx512(const Body& body) {
  body(Lanes<16>());
}

template <typename Body>
__attribute__((target("arch=x86-64-v3"))) void on_avx2(const Body& body) {
  body(Lanes<8>());
}
#endif

// Calls body(Lanes<...>()), which has to be COVR_INLINE, as all that it calls with vectors.
template <typename Body>
void on_this_machine(const Body& body) {
#ifdef COVR_X86_64
  if (lanes_in_use() == 16) return on_avx512(body);
  if (lanes_in_use() == 8) return on_avx2(body);
#endif
  body(Lanes<4>());
}

}  // namespace covr
