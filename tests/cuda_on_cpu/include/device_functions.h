// CUDA's built-in device functions, as far as the kernels use them: what is missing here does not compile.
// Add it with the meaning that the CUDA C++ Programming Guide gives it.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "emulator.h"

using std::isfinite, std::isinf, std::isnan, std::max, std::min, std::nan;

// ---- barriers and fences ----

inline void __syncthreads(const std::source_location& place = std::source_location::current()) {
  emulator::block_barrier(false, place);
}
inline int __syncthreads_count(int predicate,
                               const std::source_location& place = std::source_location::current()) {
  return emulator::block_barrier(predicate != 0, place).count;
}
inline int __syncthreads_or(int predicate,
                            const std::source_location& place = std::source_location::current()) {
  return emulator::block_barrier(predicate != 0, place).count > 0;
}
inline int __syncthreads_and(int predicate,
                             const std::source_location& place = std::source_location::current()) {
  const emulator::Votes votes = emulator::block_barrier(predicate != 0, place);
  return votes.count == votes.threads;
}
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

// ---- warps ----

namespace emulator {

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// `source` is the lane that is read; outside its segment of `width` lanes a lane gets its own value.
template <typename T>
T shuffle(const char* name, uint32_t mask, T value, int source, int width) {
  const int segment = lane() / width * width;
  if (source < segment || source >= segment + width) source = lane();
  return from_bits<T>(warp_collective(
      {name, mask, [](const uint64_t* values, uint32_t, int, int from) { return values[from]; },
       to_bits(value), source}));
}

// The same for all lanes: a sum, a largest value or the like of what the lanes of the mask bring.
template <typename T, typename Join>
T reduce(const char* name, uint32_t mask, T value, Join) {
  return from_bits<T>(warp_collective({name, mask,
                                       [](const uint64_t* values, uint32_t mask, int, int) {
                                         T all = from_bits<T>(values[std::countr_zero(mask)]);
                                         for (uint32_t rest = mask & (mask - 1); rest; rest &= rest - 1)
                                           all = Join()(all, from_bits<T>(values[std::countr_zero(rest)]));
                                         return to_bits(all);
                                       },
                                       to_bits(value)}));
}

}  // namespace emulator

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int segment = emulator::lane() / width * width;
  return emulator::shuffle("__shfl_sync", mask, value, segment + (source & (width - 1)), width);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle("__shfl_up_sync", mask, value, emulator::lane() - static_cast<int>(delta), width);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle("__shfl_down_sync", mask, value, emulator::lane() + static_cast<int>(delta),
                           width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  return emulator::shuffle("__shfl_xor_sync", mask, value, emulator::lane() ^ bits, width);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return static_cast<uint32_t>(
      emulator::warp_collective({"__ballot_sync", mask,
                                 [](const uint64_t* values, uint32_t mask, int, int) {
                                   uint64_t ballot = 0;
                                   for (int lane = 0; lane < 32; ++lane)
                                     if (mask >> lane & 1) ballot |= values[lane] << lane;
                                   return ballot;
                                 },
                                 predicate != 0}));
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value) {
  return static_cast<uint32_t>(
      emulator::warp_collective({"__match_any_sync", mask,
                                 [](const uint64_t* values, uint32_t mask, int lane, int) {
                                   uint64_t equal = 0;
                                   for (int other = 0; other < 32; ++other)
                                     if (mask >> other & 1 && values[other] == values[lane])
                                       equal |= uint64_t{1} << other;
                                   return equal;
                                 },
                                 emulator::to_bits(value)}));
}
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emulator::warp_collective(
      {"__syncwarp", mask, [](const uint64_t*, uint32_t, int, int) { return uint64_t{0}; }});
}
// Lanes need not run together, so this may be the caller alone; here it always is.
inline uint32_t __activemask() { return 1u << emulator::lane(); }

#define COVR_REDUCE(name, type, expression)                                                \
  inline type name(uint32_t mask, type value) {                                            \
    return emulator::reduce(#name, mask, value,                                            \
                            [](type a, type b) { return static_cast<type>(expression); }); \
  }
COVR_REDUCE(__reduce_add_sync, uint32_t, a + b)
COVR_REDUCE(__reduce_add_sync, int32_t, static_cast<uint32_t>(a) + static_cast<uint32_t>(b))
COVR_REDUCE(__reduce_min_sync, uint32_t, std::min(a, b))
COVR_REDUCE(__reduce_min_sync, int32_t, std::min(a, b))
COVR_REDUCE(__reduce_max_sync, uint32_t, std::max(a, b))
COVR_REDUCE(__reduce_max_sync, int32_t, std::max(a, b))
COVR_REDUCE(__reduce_and_sync, uint32_t, a& b)
COVR_REDUCE(__reduce_or_sync, uint32_t, a | b)
COVR_REDUCE(__reduce_xor_sync, uint32_t, a ^ b)
#undef COVR_REDUCE

// ---- memory ----

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldca(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
T __ldcv(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, std::type_identity_t<T> value) {
  *to = value;
}
template <typename T>
void __stcs(T* to, std::type_identity_t<T> value) {
  *to = value;
}
template <typename T>
void __stwt(T* to, std::type_identity_t<T> value) {
  *to = value;
}

// A thread is left only where it waits, so these need nothing else. T is what CUDA has the atomic for.
namespace emulator {
template <typename T>
using Value = std::type_identity_t<T>;

template <typename T>
constexpr bool kAtomicInteger =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
template <typename T>
constexpr bool kAtomic = kAtomicInteger<T> || std::is_same_v<T, long long>;
template <typename T>
constexpr bool kAtomicSum = kAtomicInteger<T> || std::is_floating_point_v<T>;

template <typename T, typename Change>
T atomic(T* at, Change change) {
  const T before = *at;
  *at = change(before);
  return before;
}
}  // namespace emulator

template <typename T>
  requires emulator::kAtomicSum<T>
T atomicAdd(T* at, emulator::Value<T> value) {
  return emulator::atomic(at, [&](T before) {
    if constexpr (std::is_integral_v<T>) {  // wraps around
      using Unsigned = std::make_unsigned_t<T>;
      return static_cast<T>(static_cast<Unsigned>(before) + static_cast<Unsigned>(value));
    } else {
      return before + value;
    }
  });
}
template <typename T>
  requires(std::is_same_v<T, int> || std::is_same_v<T, unsigned>)
T atomicSub(T* at, emulator::Value<T> value) {
  return emulator::atomic(at, [&](T before) {
    return static_cast<T>(static_cast<unsigned>(before) - static_cast<unsigned>(value));
  });
}
template <typename T>
  requires emulator::kAtomic<T>
T atomicMax(T* at, emulator::Value<T> value) {
  return emulator::atomic(at, [&](T before) { return std::max(before, value); });
}
template <typename T>
  requires emulator::kAtomic<T>
T atomicMin(T* at, emulator::Value<T> value) {
  return emulator::atomic(at, [&](T before) { return std::min(before, value); });
}
template <typename T>
  requires(emulator::kAtomicInteger<T> || std::is_same_v<T, float>)
T atomicExch(T* at, emulator::Value<T> value) {
  return emulator::atomic(at, [&](T) { return value; });
}
template <typename T>
  requires(emulator::kAtomicInteger<T> || std::is_same_v<T, unsigned short>)
T atomicCAS(T* at, emulator::Value<T> expected, emulator::Value<T> value) {
  return emulator::atomic(at, [&](T before) { return before == expected ? value : before; });
}
template <typename T>
  requires emulator::kAtomic<T>
T atomicOr(T* at, emulator::Value<T> value) {
  return emulator::atomic(at, [&](T before) { return before | value; });
}
template <typename T>
  requires emulator::kAtomic<T>
T atomicAnd(T* at, emulator::Value<T> value) {
  return emulator::atomic(at, [&](T before) { return before & value; });
}
template <typename T>
  requires emulator::kAtomic<T>
T atomicXor(T* at, emulator::Value<T> value) {
  return emulator::atomic(at, [&](T before) { return before ^ value; });
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  return emulator::atomic(at, [&](unsigned before) { return before >= last ? 0 : before + 1; });
}

// ---- integers and bits ----

inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __popcll(uint64_t x) { return std::popcount(x); }
inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __ffsll(uint64_t x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __clz(uint32_t x) { return std::countl_zero(x); }
inline int __clzll(uint64_t x) { return std::countl_zero(x); }
inline uint32_t __brev(uint32_t x) {
  uint32_t reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int32_t __mulhi(int32_t a, int32_t b) { return static_cast<int32_t>(int64_t{a} * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i) & 0xf;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (choice & 7))) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign, repeated
    result |= byte << (8 * i);
  }
  return result;
}

// ---- floats ----

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
