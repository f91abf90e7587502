// The border between Python and C++: functions on views become Python functions on torch tensors.
//
// A tensor of another dtype, device or number of dimensions, or one that is not contiguous, is a TypeError
// that names the argument; so is one on another GPU than the tensors before it in the same call. Tensors are
// read through their Python attributes, so no torch header is needed and any version of torch will do.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "common/view.h"

namespace covr {

struct Expected {
  const char* argument;
  std::span<const DType> dtypes;  // one of these; all if empty
  std::optional<int> dimensions;  // any number if not given
  std::optional<Device> device;   // any if not given
};

// The GPU that all tensors of one call must be on: that of the first one that is on a GPU.
struct OneGpu {
  int index = kNoGpu;
  const char* argument = nullptr;  // which of them that was

  // Throws TypeError if the tensor given as `name` is on another GPU.
  void require(int gpu, const char* name);
};

// Throws TypeError unless `tensor` is a contiguous tensor as expected, on the GPU of the call if it is on
// any.
AnyView read_tensor(pybind11::handle tensor, const Expected& expected, OneGpu& gpu);

// Throws TypeError unless the tensor is as it must be.
void require(const char* argument, const AnyView& tensor, DType dtype, Device device,
             std::span<const int64_t> shape);

// "[2, 3]"
std::string text_of(std::span<const int64_t> shape);

// How an argument of type A comes from Python: Raw is what pybind11 converts it to.
template <typename A>
struct Argument {
  using Raw = A;
  static A from(A& value, const char*, OneGpu&) { return std::forward<A>(value); }
};

// Views of several element types, where a function takes any of them.
template <typename First, typename... Others>
struct Argument<std::variant<First, Others...>> {
  using Raw = pybind11::handle;
  using Variant = std::variant<First, Others...>;
  static_assert(((First::dimensions == Others::dimensions && First::device == Others::device) && ...));

  static Variant from(Raw tensor, const char* name, OneGpu& gpu) {
    static constexpr std::array kDTypes{First::dtype, Others::dtype...};
    const AnyView any = read_tensor(tensor, {name, kDTypes, First::dimensions, First::device}, gpu);
    Variant variant;
    const auto choose = [&]<typename V>(V view) {
      if (any.dtype != V::dtype) return;
      view.data = reinterpret_cast<typename V::Element*>(any.data);
      std::copy(any.shape.begin(), any.shape.end(), view.shape.begin());
      variant = view;
    };
    choose(First());
    (choose(Others()), ...);
    return variant;
  }
};

template <typename T, int kDimensions, Device kOn>
struct Argument<View<T, kDimensions, kOn>> {
  using Raw = pybind11::handle;
  static View<T, kDimensions, kOn> from(Raw tensor, const char* name, OneGpu& gpu) {
    return std::get<0>(Argument<std::variant<View<T, kDimensions, kOn>>>::from(tensor, name, gpu));
  }
};

template <>
struct Argument<AnyView> {
  using Raw = pybind11::handle;
  static AnyView from(Raw tensor, const char* name, OneGpu& gpu) {
    return read_tensor(tensor, {name, {}, {}, {}}, gpu);
  }
};

template <typename V>
struct Argument<std::vector<V>> {
  using Raw = pybind11::list;
  static std::vector<V> from(const Raw& tensors, const char* name, OneGpu& gpu) {
    std::vector<V> views;
    views.reserve(tensors.size());
    for (pybind11::handle tensor : tensors) views.push_back(Argument<V>::from(tensor, name, gpu));
    return views;
  }
};

template <typename V>
struct Argument<std::optional<V>> {
  using Raw = pybind11::handle;
  static std::optional<V> from(Raw tensor, const char* name, OneGpu& gpu) {
    if (tensor.is_none()) return std::nullopt;
    return Argument<V>::from(tensor, name, gpu);
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
void define(pybind11::module_& module, const char* name, R (*function)(A...), Names... names) {
  static_assert(sizeof...(A) == sizeof...(Names), "one name for each argument");
  const auto call = [=](typename Argument<A>::Raw... raw) -> R {
    OneGpu gpu;
    std::tuple<A...> arguments{Argument<A>::from(raw, names, gpu)...};
    pybind11::gil_scoped_release release;
    return std::apply(function, std::move(arguments));
  };
  module.def(name, call, pybind11::arg(names)...);
}

// class.NAME = method, with one name for each argument. It keeps the GIL.
template <typename Class, typename Owner, typename... A, typename... Names>
void define_method(Class& type, const char* name, void (Owner::*method)(A...), Names... names) {
  static_assert(sizeof...(A) == sizeof...(Names), "one name for each argument");
  const auto call = [=](Owner& self, typename Argument<A>::Raw... raw) {
    OneGpu gpu;
    std::tuple<A...> arguments{Argument<A>::from(raw, names, gpu)...};
    std::apply([&](A&... values) { (self.*method)(std::forward<A>(values)...); }, arguments);
  };
  type.def(name, call, pybind11::arg(names)...);
}

// class(...) = function, which returns the object. It keeps the GIL.
template <typename Class, typename R, typename... A, typename... Names>
void define_constructor(Class& type, R (*function)(A...), Names... names) {
  static_assert(sizeof...(A) == sizeof...(Names), "one name for each argument");
  const auto call = [=](typename Argument<A>::Raw... raw) {
    OneGpu gpu;
    std::tuple<A...> arguments{Argument<A>::from(raw, names, gpu)...};
    return std::apply(function, std::move(arguments));
  };
  type.def(pybind11::init(call), pybind11::arg(names)...);
}

}  // namespace covr
