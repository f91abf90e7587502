#include "common/border.h"

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace covr {
namespace {

// In the order of DType.
constexpr std::array kNames{"bool",  "uint8",  "int8",    "int16",    "uint16",  "int32",  "uint32",
                            "int64", "uint64", "float16", "bfloat16", "float32", "float64"};

// torch's objects and the names of attributes, looked up once. They live as long as the process.
struct Torch {
  py::handle tensor_type;
  std::array<py::handle, kNames.size()> dtypes;  // in the order of DType
  PyObject *dtype, *shape, *is_cpu, *is_cuda, *is_contiguous, *data_ptr, *get_device;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto get = [&](const char* name) { return py::object(torch.attr(name)).release(); };
    tensor_type = get("Tensor");
    for (size_t i = 0; i < kNames.size(); ++i) dtypes[i] = get(kNames[i]);
    const auto intern = [](const char* name) { return PyUnicode_InternFromString(name); };
    dtype = intern("dtype"), shape = intern("shape"), is_cpu = intern("is_cpu"), is_cuda = intern("is_cuda");
    is_contiguous = intern("is_contiguous"), data_ptr = intern("data_ptr"), get_device = intern("get_device");
  }

  static const Torch& get() {
    static py::gil_safe_call_once_and_store<Torch> torch;
    return torch.call_once_and_store_result([] { return Torch(); }).get_stored();
  }
};

py::object attribute(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

std::string text_of(std::optional<Device> device) {
  if (!device) return "the CPU or a CUDA device";
  return *device == Device::kCpu ? "the CPU" : "a CUDA device";
}

const char* text_of(DType dtype) { return kNames[static_cast<size_t>(dtype)]; }

[[noreturn]] void refuse(py::handle object, const Expected& expected) {
  std::string text = std::string(expected.argument) + " must be a contiguous ";
  for (size_t i = 0; i < expected.dtypes.size(); ++i)
    text += std::string(i ? "or " : "") + text_of(expected.dtypes[i]) + " ";
  text += "tensor ";
  if (expected.dimensions) text += "with " + std::to_string(*expected.dimensions) + " dimensions ";
  text += "on " + text_of(expected.device) + ", not ";
  if (!py::isinstance(object, Torch::get().tensor_type))
    throw py::type_error(text + std::string(py::str(py::type::of(object).attr("__name__"))));
  const std::string layout = object.attr("is_contiguous")().cast<bool>()
                                 ? "contiguous"
                                 : "strides " + std::string(py::str(object.attr("stride")()));
  throw py::type_error(text + std::string(py::str(object.attr("dtype"))) + " " +
                       std::string(py::str(py::list(object.attr("shape")))) + " on " +
                       std::string(py::str(object.attr("device"))) + ", " + layout);
}

}  // namespace

std::string text_of(std::span<const int64_t> shape) {
  std::string text;
  for (int64_t length : shape) text += (text.empty() ? "" : ", ") + std::to_string(length);
  return "[" + text + "]";
}

void OneGpu::require(int gpu, const char* name) {
  if (gpu == kNoGpu) return;
  if (index == kNoGpu) {
    index = gpu;
    argument = name;
  }
  if (gpu != index)
    throw py::type_error(std::string(name) + " is on cuda:" + std::to_string(gpu) + ", but " + argument +
                         " is on cuda:" + std::to_string(index) + ": move one of them");
}

AnyView read_tensor(py::handle tensor, const Expected& expected, OneGpu& gpu) {
  const Torch& torch = Torch::get();
  if (!py::isinstance(tensor, torch.tensor_type)) refuse(tensor, expected);
  const auto is_true = [&](PyObject* name) { return attribute(tensor, name).ptr() == Py_True; };
  const auto dtype = std::find_if(torch.dtypes.begin(), torch.dtypes.end(),
                                  [own = attribute(tensor, torch.dtype)](py::handle d) { return own.is(d); });
  const bool on_cpu = is_true(torch.is_cpu);
  AnyView view{nullptr, static_cast<DType>(dtype - torch.dtypes.begin()),
               on_cpu ? Device::kCpu : Device::kCuda};
  const py::tuple shape = attribute(tensor, torch.shape);
  const auto& dtypes = expected.dtypes;
  if (dtype == torch.dtypes.end() ||
      (!dtypes.empty() && std::find(dtypes.begin(), dtypes.end(), view.dtype) == dtypes.end()) ||
      (expected.dimensions && *expected.dimensions != static_cast<int>(shape.size())) ||
      (expected.device && *expected.device != view.device) || (!on_cpu && !is_true(torch.is_cuda)) ||
      attribute(tensor, torch.is_contiguous)().ptr() != Py_True)
    refuse(tensor, expected);
  if (!on_cpu) view.gpu = static_cast<int>(PyLong_AsLong(attribute(tensor, torch.get_device)().ptr()));
  view.data = static_cast<uint8_t*>(PyLong_AsVoidPtr(attribute(tensor, torch.data_ptr)().ptr()));
  for (py::handle length : shape) view.shape.push_back(PyLong_AsLongLong(length.ptr()));
  if (PyErr_Occurred()) throw py::error_already_set();
  gpu.require(view.gpu, expected.argument);
  return view;
}

void require_shape(const char* argument, std::span<const int64_t> shape, std::span<const int64_t> expected) {
  if (!std::equal(shape.begin(), shape.end(), expected.begin(), expected.end()))
    throw py::type_error(std::string(argument) + " must have shape " + text_of(expected) + ", not " +
                         text_of(shape));
}

void require(const char* argument, const AnyView& tensor, DType dtype, Device device,
             std::span<const int64_t> shape) {
  if (tensor.dtype != dtype || tensor.device != device)
    throw py::type_error(std::string(argument) + " must be " + text_of(dtype) + " on " + text_of(device) +
                         ", not " + text_of(tensor.dtype) + " on " + text_of(tensor.device));
  require_shape(argument, tensor.shape, shape);
}

}  // namespace covr
