// Python's side of mirror.h: requests are checked here, before anything is launched.
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "common/border.h"
#include "replay/mirror.h"
#include "replay/requests.h"

#ifdef COVR_WITH_CUDA

namespace py = pybind11;

namespace covr {
namespace {

StackPlan* plans_of(const CudaView<uint8_t, 4>& plans, const Mirror& mirror, int64_t of_each, int64_t rows) {
  const auto keys = static_cast<int64_t>(mirror.host().keys().size());
  require_shape("plans", plans.shape, {keys, of_each, rows, sizeof(StackPlan)});
  return reinterpret_cast<StackPlan*>(plans.data);
}

class PyMirror : public Mirror {
 public:
  using Mirror::Mirror;

  void sample(CudaBatchOut& out, Recency& recency, CudaView<uint8_t, 4> plans, uintptr_t stream) {
    check(out);
    Mirror::sample(out, recency, plans_of(plans, *this, 2, out.rows()), stream);
  }

  void get(CudaBatchOut& out, CudaView<uint8_t, 4> plans, uintptr_t stream) {
    check(out);
    Mirror::get(out, plans_of(plans, *this, 2, out.rows()), stream);
  }

  void observe(CudaObservationsOut& out, CudaView<uint8_t, 4> plans, uintptr_t stream) {
    check_observations(host(), out);
    Mirror::observe(out, plans_of(plans, *this, 1, out.rows()), stream);
  }

  void prioritize(CudaView<float, 1> leaves, CudaView<double, 1> sums, CudaView<int32_t, 1> claims,
                  CudaView<double, 1> largest, CudaView<int64_t, 2> bounds, double alpha) {
    const int64_t rows = host().rows(), num_envs = host().num_envs();
    require_shape("leaves", leaves.shape, {rows});
    require_shape("sums", sums.shape, {SumTreeLayout(rows).inner_nodes()});
    require_shape("claims", claims.shape, {rows});
    require_shape("largest", largest.shape, {1});
    require_shape("bounds", bounds.shape, {2, num_envs});
    Mirror::prioritize({leaves.data, sums.data, largest.data, bounds.data, bounds.data + num_envs, alpha},
                       claims.data);
  }

  void set_priorities(CudaView<const int64_t, 1> ids, CudaView<const float, 1> priority,
                      CudaView<int64_t, 1> rows, CudaView<float, 1> leaves, uintptr_t stream) {
    if (!prioritized()) throw std::invalid_argument("set_priorities needs prioritize first");
    require_shape("rows", rows.shape, ids.shape);
    require_shape("leaves", leaves.shape, ids.shape);
    require_shape("priority", priority.shape, ids.shape);
    Mirror::set_priorities(ids, priority, rows.data, leaves.data, stream);
  }

 private:
  void check(const CudaBatchOut& out) const {
    check_columns(host(), out.columns, out.rows(), Device::kCuda);
    check_observations(host(), out);
    if (out.keys.size() != host().keys().size())
      throw py::type_error("a batch must have all observation keys of the buffer");
  }
};

// streams [3 + keys, num_envs]: count, first, ended and, of each key, written.
std::unique_ptr<PyMirror> make_mirror(const Replay& host, CudaView<int64_t, 2> streams,
                                      CudaView<float, 1> reward, CudaView<uint8_t, 1> flags,
                                      CudaView<int32_t, 1> time, std::vector<CudaView<int64_t, 1>> newest,
                                      std::vector<CudaView<uint8_t, 1>> depth, std::vector<AnyView> columns,
                                      CudaView<int64_t, 1> sequence) {
  const int64_t rows = host.rows(), num_envs = host.num_envs();
  const size_t keys = host.keys().size();
  require_shape("streams", streams.shape, {3 + static_cast<int64_t>(keys), num_envs});
  require_shape("reward", reward.shape, {rows});
  require_shape("flags", flags.shape, {rows});
  require_shape("time", time.shape, {rows});
  require_shape("sequence", sequence.shape, {sizeof(Sequence) / sizeof(int64_t)});
  if (newest.size() != keys || depth.size() != keys)
    throw py::type_error("newest and depth must have one tensor per observation key");
  check_columns(host, columns, rows, Device::kCuda);
  Tables tables = host.tables();
  tables.count = streams.data;
  tables.first = streams.data + num_envs;
  tables.ended = streams.data + 2 * num_envs;
  tables.reward = reward.data;
  tables.flags = flags.data;
  tables.time = time.data;
  auto mirror = std::make_unique<PyMirror>(host, tables, reinterpret_cast<Sequence*>(sequence.data));
  for (size_t k = 0; k < keys; ++k) {
    require_shape("newest", newest[k].shape, {rows});
    require_shape("depth", depth[k].shape, {rows});
    int64_t* written = streams.data + (3 + static_cast<int64_t>(k)) * num_envs;
    mirror->add_key({host.keys()[k].frames, written, newest[k].data, depth[k].data});
  }
  for (size_t c = 0; c < columns.size(); ++c) mirror->add_column({columns[c].data, host.columns()[c].bytes});
  return mirror;
}

}  // namespace

void bind_mirror(py::module_& m) {
  bind_requests<Device::kCuda>(m, "CudaObservationsOut", "CudaBatchOut");
  py::class_<Mirror>(m, "_CudaMirror");  // as which CudaAdd takes it
  py::class_<PyMirror, Mirror> mirror(m, "CudaMirror");
  define_constructor(mirror, &make_mirror, "host", "streams", "reward", "flags", "time", "newest", "depth",
                     "columns", "sequence");
  define_method(mirror, "prioritize", &PyMirror::prioritize, "leaves", "sums", "claims", "largest", "bounds",
                "alpha");
  define_method(mirror, "sample", &PyMirror::sample, "out", "recency", "plans", "stream");
  define_method(mirror, "get", &PyMirror::get, "out", "plans", "stream");
  define_method(mirror, "observe", &PyMirror::observe, "out", "plans", "stream");
  define_method(mirror, "set_priorities", &PyMirror::set_priorities, "ids", "priority", "rows", "leaves",
                "stream");
  mirror.def("follow", &PyMirror::follow, py::arg("stream"));
}

}  // namespace covr

#endif
