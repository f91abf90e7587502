// CUDA's small vectors, with the alignment that they have there.
#pragma once

#include <cstdint>

#define COVR_VECTOR(name, type)                                                               \
  struct name##1 { type x; };                                                                 \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                           \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##1 make_##name##1(type x) { return {x}; }                                       \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

COVR_VECTOR(char, signed char)
COVR_VECTOR(uchar, unsigned char)
COVR_VECTOR(short, short)
COVR_VECTOR(ushort, unsigned short)
COVR_VECTOR(int, int)
COVR_VECTOR(uint, unsigned)
COVR_VECTOR(longlong, long long)
COVR_VECTOR(ulonglong, unsigned long long)
COVR_VECTOR(float, float)
COVR_VECTOR(double, double)
#undef COVR_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
