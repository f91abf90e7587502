// The border between Python and C++: functions on views become Python functions on torch tensors.
//
// A tensor of another dtype, device or number of dimensions, or one that is not contiguous, is a TypeError
// that names the argument. Tensors are read through their Python attributes, so no torch header is needed and
// any version of torch will do.
#pragma once

#include <pybind11/pybind11.h>

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

struct Found {
  void* data;
  DType dtype;
  Device device;
  pybind11::tuple shape;

  int64_t length(size_t dimension) const {
    return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), static_cast<Py_ssize_t>(dimension)));
  }
};

// Throws TypeError.
Found read_tensor(pybind11::handle tensor, const Expected& expected);

// How an argument of type A comes from Python: Raw is what pybind11 converts it to.
template <typename A>
struct Argument {
  using Raw = A;
  static A from(A& value, const char*) { return std::forward<A>(value); }
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
    const Found found = read_tensor(tensor, {name, kDTypes, First::dimensions, First::device});
    Variant variant;
    const auto choose = [&]<typename V>(V view) {
      if (found.dtype != dtype_of<typename V::Element>()) return;
      view.data = static_cast<typename V::Element*>(found.data);
      for (size_t d = 0; d < view.shape.size(); ++d) view.shape[d] = found.length(d);
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
  static View<T, kDimensions, kOn> from(Raw tensor, const char* name) {
    return std::get<0>(Argument<std::variant<View<T, kDimensions, kOn>>>::from(tensor, name));
  }
};

template <>
struct Argument<AnyView> {
  using Raw = pybind11::handle;
  static AnyView from(Raw tensor, const char* name) {
    const Found found = read_tensor(tensor, {name, {}, {}, {}});
    AnyView view{static_cast<uint8_t*>(found.data), found.dtype, found.device, {}};
    view.shape.resize(found.shape.size());
    for (size_t d = 0; d < view.shape.size(); ++d) view.shape[d] = found.length(d);
    return view;
  }
};

template <typename V>
struct Argument<std::vector<V>> {
  using Raw = pybind11::list;
  static std::vector<V> from(const Raw& tensors, const char* name) {
    std::vector<V> views;
    views.reserve(tensors.size());
    for (pybind11::handle tensor : tensors) views.push_back(Argument<V>::from(tensor, name));
    return views;
  }
};

template <typename V>
struct Argument<std::optional<V>> {
  using Raw = pybind11::handle;
  static std::optional<V> from(Raw tensor, const char* name) {
    if (tensor.is_none()) return std::nullopt;
    return Argument<V>::from(tensor, name);
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
        std::tuple<A...> arguments{Argument<A>::from(raw, names)...};
        pybind11::gil_scoped_release release;
        return std::apply(function, std::move(arguments));
      },
      pybind11::arg(names)...);
}

// class.NAME = method, with one name for each argument. It keeps the GIL.
template <typename Class, typename Owner, typename... A, typename... Names>
void define_method(Class& type, const char* name, void (Owner::*method)(A...), const Names&... names) {
  static_assert(sizeof...(A) == sizeof...(Names), "one name for each argument");
  type.def(
      name,
      [method, ... names = static_cast<const char*>(names)](Owner& self, typename Argument<A>::Raw... raw) {
        (self.*method)(Argument<A>::from(raw, names)...);
      },
      pybind11::arg(names)...);
}

// class(...) = function, which returns the object. It keeps the GIL.
template <typename Class, typename R, typename... A, typename... Names>
void define_constructor(Class& type, R (*function)(A...), const Names&... names) {
  static_assert(sizeof...(A) == sizeof...(Names), "one name for each argument");
  type.def(pybind11::init([function, ... names = static_cast<const char*>(names)](
                              typename Argument<A>::Raw... raw) -> R {
             return function(Argument<A>::from(raw, names)...);
           }),
           pybind11::arg(names)...);
}

}  // namespace covr
