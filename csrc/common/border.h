// The border between Python and C++: functions on views become Python functions on torch tensors.
//
// A tensor of another dtype, device or number of dimensions, or one that is not contiguous, is a TypeError
// that names the argument. Tensors are read through their Python attributes, so no torch header is needed and
// any version of torch will do.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <span>
#include <string>
#include <tuple>
#include <variant>

#include "common/view.h"

namespace covr {

struct Expected {
  const char* argument;
  std::span<const DType> dtypes;  // one of these
  int dimensions;
  Device device;
};

struct Found {
  size_t dtype;  // place in Expected::dtypes
  void* data;
};

// Reads a tensor and writes its shape, [dimensions]. Throws TypeError.
Found read_tensor(pybind11::handle tensor, const Expected& expected, int64_t* shape);

// How an argument of type A comes from Python: Raw is what pybind11 converts it to.
template <typename A>
struct Argument {
  using Raw = A;
  static A from(Raw value, const char*) { return static_cast<A>(value); }
};

// Views of several element types, where a function takes any of them.
template <typename First, typename... Others>
struct Argument<std::variant<First, Others...>> {
  using Raw = pybind11::handle;
  using Variant = std::variant<First, Others...>;
  static_assert(((First::dimensions == Others::dimensions && First::device == Others::device) && ...));

  static Variant from(Raw tensor, const char* name) {
    static constexpr std::array kDTypes{dtype_of<typename First::Element>(),
                                        dtype_of<typename Others::Element>()...};
    std::array<int64_t, First::dimensions> shape;
    const Found found = read_tensor(tensor, {name, kDTypes, First::dimensions, First::device}, shape.data());
    Variant view;
    size_t place = 0;
    const auto choose = [&]<typename V>(V) {
      if (place++ == found.dtype) view = V{static_cast<typename V::Element*>(found.data), shape};
    };
    choose(First());
    (choose(Others()), ...);
    return view;
  }
};

template <typename T, int kDimensions, Device kOn>
struct Argument<View<T, kDimensions, kOn>> {
  using Raw = pybind11::handle;
  static View<T, kDimensions, kOn> from(Raw tensor, const char* name) {
    return std::get<0>(Argument<std::variant<View<T, kDimensions, kOn>>>::from(tensor, name));
  }
};

// The view of type View among `views`: for an argument that must have the dtype of another one.
template <typename View, typename Variant>
View same_dtype(const Variant& views, const char* argument, const char* other) {
  if (const auto* view = std::get_if<View>(&views)) return *view;
  throw pybind11::type_error(std::string(argument) + " must have the dtype of " + other);
}

// module.NAME = function, with one name for each argument. It runs without the GIL.
template <typename R, typename... A, typename... Names>
void define(pybind11::module_& module, const char* name, R (*function)(A...), const Names&... names) {
  static_assert(sizeof...(A) == sizeof...(Names), "one name for each argument");
  module.def(
      name,
      [function, ... names = static_cast<const char*>(names)](typename Argument<A>::Raw... raw) -> R {
        const std::tuple<A...> arguments{Argument<A>::from(raw, names)...};
        pybind11::gil_scoped_release release;
        return std::apply(function, arguments);
      },
      pybind11::arg(names)...);
}

}  // namespace covr
