// Python's side of device_add.h: arguments are checked here, before anything is launched.
#include "replay/device_add.h"

#ifdef COVR_WITH_CUDA

#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <string>

#include "common/border.h"
#include "replay/mirror.h"

namespace py = pybind11;

namespace covr {
namespace {

class CudaAdd {
 public:
  // descriptors: device memory of descriptor_bytes, for the tables of keys and columns.
  CudaAdd(const Replay& host, const Mirror& mirror, CudaView<uint8_t, 1> descriptors,
          CudaView<int32_t, 1> claims)
      : host_(host), mirror_(mirror), claims_(claims.data) {
    require_shape("descriptors", descriptors.shape, {descriptor_bytes(host)});
    require_shape("claims", claims.shape, {host.num_envs()});
    to_.tables = mirror.tables();
    to_.keys = reinterpret_cast<const KeyTable*>(descriptors.data);
    to_.columns = reinterpret_cast<const ColumnTable*>(descriptors.data + key_bytes(host));
    to_.num_keys = static_cast<int32_t>(host.keys().size());
    to_.num_columns = static_cast<int32_t>(host.columns().size());
    descriptors_ = descriptors.data;
    int64_t frame_bytes = 1;
    for (const ObservationKey& key : host.keys())
      frame_bytes = std::max(frame_bytes, key.frames.frame_bytes());
    constexpr int64_t kBytesPerBlock = 8192;  // some vectors for each thread
    slices_ = static_cast<int>(std::clamp<int64_t>(frame_bytes / kBytesPerBlock, 1, 16));
  }

  static int64_t key_bytes(const Replay& host) {
    return static_cast<int64_t>(host.keys().size() * sizeof(KeyTable));
  }
  static int64_t descriptor_bytes(const Replay& host) {
    return key_bytes(host) + static_cast<int64_t>(host.columns().size() * sizeof(ColumnTable));
  }

  // Writes the descriptors: once, before anything else.
  void describe(uintptr_t stream) {
    copy_async(descriptors_, mirror_.keys().data(), key_bytes(host_), stream);
    copy_async(descriptors_ + key_bytes(host_), mirror_.columns().data(),
               descriptor_bytes(host_) - key_bytes(host_), stream);
  }

  // Bytes of a block without frames.
  int64_t block_bytes(int64_t rows) const {
    return layout(rows).column(host_.columns(), static_cast<int64_t>(host_.columns().size()));
  }

  // Sends the first `bytes` of a block that Replay::add has filled, and applies it.
  void apply(View<uint8_t, 1> block, CudaView<uint8_t, 1> on_device, int64_t rows, int64_t bytes,
             uintptr_t stream) {
    if (bytes < block_bytes(rows) || bytes > block.size() || bytes > on_device.size())
      throw py::type_error("block and on_device must have the bytes of the block");
    if (rows == 0) return;
    copy_async(on_device.data, block.data, bytes, stream);
    apply_cuda(to_, {on_device.data, layout(rows)}, slices_, stream);
    mirror_.follow(stream);
  }

  // Adds rows of device memory; what Replay::follow needs arrives in `block`, in host memory.
  void add(std::vector<AnyView> obs, std::vector<AnyView> next_obs, CudaView<const float, 1> reward,
           CudaView<const bool, 1> terminated, CudaView<const bool, 1> truncated,
           std::vector<AnyView> columns, std::optional<CudaView<const int64_t, 1>> env_ids,
           CudaView<uint32_t, 1> findings, CudaView<uint8_t, 1> on_device, View<uint8_t, 1> block,
           CudaView<int64_t, 1> ids, uintptr_t stream) {
    const int64_t rows = reward.size(), bytes = block_bytes(rows), each = inspections(host_.keys());
    const auto& keys = host_.keys();
    if (obs.size() != keys.size() || next_obs.size() != keys.size() ||
        columns.size() != host_.columns().size() || keys.size() > DeviceRows::kMaxKeys ||
        columns.size() > DeviceRows::kMaxColumns)
      throw py::type_error("add() needs one tensor per observation key and per column, of a limited number");
    require_shape("terminated", terminated.shape, {rows});
    require_shape("truncated", truncated.shape, {rows});
    require_shape("ids", ids.shape, {rows});
    if (env_ids) require_shape("env_ids", env_ids->shape, {rows});
    if (!env_ids && rows != host_.num_envs()) throw py::type_error("rows of some environments need env_ids");
    if (findings.size() < rows * each || on_device.size() < bytes || block.size() < bytes)
      throw py::type_error("findings, on_device and block must hold the rows of the call");
    DeviceRows in;
    in.rows = rows;
    in.cut_at_jumps = in.may_jump = host_.cut_at_jumps;
    in.env_ids = env_ids ? env_ids->data : nullptr;
    in.reward = reward.data;
    in.terminated = terminated.data;
    in.truncated = truncated.data;
    for (size_t k = 0; k < keys.size(); ++k) {
      const ObservationKey& key = keys[k];
      for (const auto& [what, given] : {std::pair{"obs", &obs[k]}, {"next_obs", &next_obs[k]}})
        if (given->device != Device::kCuda || given->dtype != key.dtype ||
            given->bytes() != rows * key.input_bytes())
          throw py::type_error(std::string(what) + " '" + key.name + "' has another device, dtype or shape");
      in.keys[k] = {obs[k].data, next_obs[k].data, is_floating(key.dtype), key.input_channels_last};
      in.may_jump = in.may_jump || key.frames.stack == 1;
    }
    for (size_t c = 0; c < columns.size(); ++c) {
      std::vector<int64_t> shape = host_.columns()[c].values.shape;
      shape[0] = rows;
      const DType dtype = host_.columns()[c].values.dtype;
      require(host_.columns()[c].name.c_str(), columns[c], dtype, Device::kCuda, shape);
      const auto float_bytes = static_cast<int32_t>(is_floating(dtype) ? item_bytes(dtype) : 0);
      in.columns[c] = {columns[c].data, float_bytes, c > 0};  // the first is the action, all others extras
    }
    if (rows == 0) return;
    const Block records{on_device.data, layout(rows)};
    add_cuda(to_, in, records, {findings.data, claims_}, each, slices_, ids.data, stream);
    mirror_.follow(stream);
    copy_async(block.data, on_device.data, bytes, stream);
  }

 private:
  BlockLayout layout(int64_t rows) const { return {rows, static_cast<int64_t>(host_.keys().size())}; }

  const Replay& host_;
  const Mirror& mirror_;
  DeviceTables to_;
  uint8_t* descriptors_;
  int32_t* claims_;
  int slices_;
};

std::unique_ptr<CudaAdd> make_add(const Replay& host, const Mirror& mirror, CudaView<uint8_t, 1> descriptors,
                                  CudaView<int32_t, 1> claims) {
  return std::make_unique<CudaAdd>(host, mirror, descriptors, claims);
}

}  // namespace

void bind_device_add(py::module_& m) {
  py::class_<CudaAdd> add(m, "CudaAdd");
  define_constructor(add, &make_add, "host", "mirror", "descriptors", "claims");
  add.attr("max_keys") = DeviceRows::kMaxKeys;
  add.attr("max_columns") = DeviceRows::kMaxColumns;
  add.def_static("descriptor_bytes", &CudaAdd::descriptor_bytes, py::arg("host"))
      .def_static(
          "inspections", [](const Replay& host) { return inspections(host.keys()); }, py::arg("host"))
      .def("block_bytes", &CudaAdd::block_bytes, py::arg("rows"))
      .def("describe", &CudaAdd::describe, py::arg("stream"));
  define_method(add, "apply", &CudaAdd::apply, "block", "on_device", "rows", "bytes", "stream");
  define_method(add, "add", &CudaAdd::add, "obs", "next_obs", "reward", "terminated", "truncated", "columns",
                "env_ids", "findings", "on_device", "block", "ids", "stream");
}

}  // namespace covr

#endif
