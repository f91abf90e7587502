// A tensor as C++ and CUDA functions take it: the element type, the number of dimensions and the device are
// part of the type. Views are contiguous; border.h makes them from torch tensors and checks all of that. They
// are valid while the tensor lives. The data of a tensor without elements may be null.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include "common/half.h"

namespace covr {

enum class Device { kCpu, kCuda };

enum class DType {
  kBool,
  kUInt8,
  kInt8,
  kInt16,
  kUInt16,
  kInt32,
  kUInt32,
  kInt64,
  kUInt64,
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64
};

constexpr bool is_floating(DType dtype) { return dtype >= DType::kFloat16; }

constexpr int64_t item_bytes(DType dtype) {
  constexpr int64_t kBytes[]{1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8};
  return kBytes[static_cast<int>(dtype)];
}

// The dtype of a tensor from a pointer to its elements.
constexpr DType dtype_of(const bool*) { return DType::kBool; }
constexpr DType dtype_of(const uint8_t*) { return DType::kUInt8; }
constexpr DType dtype_of(const int32_t*) { return DType::kInt32; }
constexpr DType dtype_of(const uint32_t*) { return DType::kUInt32; }
constexpr DType dtype_of(const int64_t*) { return DType::kInt64; }
constexpr DType dtype_of(const Float16*) { return DType::kFloat16; }
constexpr DType dtype_of(const BFloat16*) { return DType::kBFloat16; }
constexpr DType dtype_of(const float*) { return DType::kFloat32; }
constexpr DType dtype_of(const double*) { return DType::kFloat64; }

template <typename T, int kDimensions, Device kOn = Device::kCpu>
struct View {
  using Element = T;
  static constexpr DType dtype = dtype_of(static_cast<T*>(nullptr));
  static constexpr int dimensions = kDimensions;
  static constexpr Device device = kOn;

  T* data = nullptr;
  std::array<int64_t, kDimensions> shape{};

  int64_t size() const {
    int64_t elements = 1;
    for (int64_t length : shape) elements *= length;
    return elements;
  }
  T& operator[](int64_t i) const
    requires(kDimensions == 1)
  {
    return data[i];
  }
};

template <typename T, int kDimensions>
using CudaView = View<T, kDimensions, Device::kCuda>;

constexpr int kNoGpu = -1;

// A tensor whose dtype, device and number of dimensions are known only at run time.
struct AnyView {
  uint8_t* data = nullptr;
  DType dtype{};
  Device device{};
  std::vector<int64_t> shape{};
  int gpu = kNoGpu;  // the index of its CUDA device

  int64_t bytes() const {
    int64_t bytes = item_bytes(dtype);
    for (int64_t length : shape) bytes *= length;
    return bytes;
  }
};

// Throws Python's TypeError, which names the argument, unless its shape is the expected one.
void require_shape(const char* argument, std::span<const int64_t> shape, std::span<const int64_t> expected);

inline void require_shape(const char* argument, std::span<const int64_t> shape,
                          std::initializer_list<int64_t> expected) {
  require_shape(argument, shape, std::span<const int64_t>(expected.begin(), expected.size()));
}

}  // namespace covr
