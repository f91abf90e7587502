// Python's side of replay.h: storage and batches are views of torch tensors. The rows of add() are numpy
// arrays, which are checked here because a check in Python would cost as much as storing them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <shared_mutex>
#include <stdexcept>

#include "common/border.h"
#include "ops/sum_tree.h"
#include "replay/priorities.h"
#include "replay/replay.h"
#include "replay/requests.h"

namespace py = pybind11;

namespace covr {
namespace {

// Rows that are each contiguous, however far apart.
Rows rows_of(const py::array& array, int64_t rows, int64_t row_bytes, const std::string& what) {
  if (array.ndim() < 1 || array.shape(0) != rows)
    throw std::invalid_argument(what + " has " + (array.ndim() < 1 ? "no" : std::to_string(array.shape(0))) +
                                " rows, but reward has " + std::to_string(rows));
  int64_t bytes = array.itemsize();
  for (py::ssize_t d = array.ndim() - 1; d > 0; --d) {
    if (array.strides(d) != bytes && array.shape(d) != 1)
      throw std::invalid_argument(what + " is not contiguous within a row: pass a contiguous array");
    bytes *= array.shape(d);
  }
  if (bytes != row_bytes)
    throw std::invalid_argument(what + " has " + std::to_string(bytes) + " bytes per row instead of " +
                                std::to_string(row_bytes) + ": check its shape and dtype");
  return {static_cast<const uint8_t*>(array.data()), array.strides(0)};
}

using Flags = py::array_t<bool, py::array::c_style>;
using Ids = py::array_t<int64_t, py::array::c_style>;

class PyReplay : public Replay {
 public:
  using Replay::Replay;

  // frames: [num_envs, slots, ...], channels-first. recent: the same, or fewer slots, on the CPU.
  void add_key(std::string name, AnyView frames, AnyView recent, int64_t stack, int64_t channels,
               int64_t height, int64_t width, bool channels_last, View<int64_t, 1> written,
               View<int64_t, 1> newest, View<uint8_t, 1> depth) {
    const auto layout = [&](const char* what, const AnyView& ring) {
      const int64_t slots = ring.shape.at(1);
      const FrameLayout layout{ring.data, slots, stack, channels, height, width, item_bytes(ring.dtype)};
      if (ring.shape[0] != num_envs() || ring.bytes() != num_envs() * slots * layout.frame_bytes() ||
          ring.dtype != frames.dtype)
        throw py::type_error(std::string(what) + " must be frames [num_envs, slots, ...] of one dtype");
      return layout;
    };
    if (recent.device != Device::kCpu) throw py::type_error("recent must be on the CPU");
    require_shape("written", written.shape, {num_envs()});
    require_shape("newest", newest.shape, {rows()});
    require_shape("depth", depth.shape, {rows()});
    ObservationKey key;
    key.frames = layout("frames", frames);
    key.written = written.data;
    key.newest = newest.data;
    key.depth = depth.data;
    key.name = std::move(name);
    key.dtype = frames.dtype;
    key.input_channels_last = channels_last;
    key.device = frames.device;
    key.recent = layout("recent", recent);
    Replay::add_key(std::move(key));
  }

  // values: [rows, ...].
  void add_column(std::string name, AnyView values) {
    if (values.device != Device::kCpu || values.shape.empty() || values.shape[0] != rows())
      throw py::type_error("the values of column " + name + " must be [rows, ...] on the CPU");
    const int64_t bytes = values.bytes() / rows();
    Replay::add_column({std::move(name), std::move(values), bytes});
  }

  Ids add_rows(const std::vector<py::array>& obs, const std::vector<py::array>& next_obs,
               const py::array_t<float, py::array::c_style>& reward, const Flags& terminated,
               const Flags& truncated, const std::vector<py::array>& columns,
               const std::optional<Ids>& env_ids, const std::optional<py::function>& take_block) {
    RowsIn in{};
    in.rows = reward.ndim() == 1 ? reward.shape(0) : -1;
    if (in.rows < 0) throw std::invalid_argument("reward must have one dimension, [rows]");
    if (!env_ids && in.rows != num_envs())
      throw std::invalid_argument("reward has " + std::to_string(in.rows) + " rows for " +
                                  std::to_string(num_envs()) +
                                  " environments: pass env_ids to add rows of some of them");
    in.env_ids = streams(env_ids, in.rows);
    if (obs.size() != keys().size() || next_obs.size() != keys().size() ||
        columns.size() != Replay::columns().size())
      throw std::invalid_argument("add() needs one array per observation key and per column");
    for (size_t k = 0; k < keys().size(); ++k) {
      const ObservationKey& key = keys()[k];
      in.obs.push_back(rows_of(obs[k], in.rows, key.input_bytes(), "obs '" + key.name + "'"));
      in.next_obs.push_back(rows_of(next_obs[k], in.rows, key.input_bytes(), "next_obs '" + key.name + "'"));
    }
    for (size_t c = 0; c < columns.size(); ++c) {
      const Column& column = Replay::columns()[c];
      check_row_shape(columns[c], column);
      in.columns.push_back(rows_of(columns[c], in.rows, column.bytes, column.name));
    }
    in.reward = reward.data();
    in.terminated = one_per_row(terminated, in.rows, "terminated");
    in.truncated = one_per_row(truncated, in.rows, "truncated");
    Ids ids(in.rows);
    int64_t* to = ids.mutable_data();
    py::gil_scoped_release release;
    std::lock_guard guard(lock);
    if (take_block)
      add(in, to, [&](int64_t bytes) { return block_from(*take_block, bytes); });
    else
      add(in, to);
    if (priorities_) priorities_->follow(*this);
    return ids;
  }

  // block: as CudaAdd.add sends it, with this many rows.
  void follow_block(View<uint8_t, 1> bytes, int64_t rows) {
    const Block block{bytes.data, {rows, static_cast<int64_t>(keys().size())}};
    if (bytes.size() < block.layout.column(columns(), static_cast<int64_t>(columns().size())))
      throw py::type_error("block must hold the records of its rows");
    py::gil_scoped_release release;
    std::lock_guard guard(lock);
    follow(block);
    if (priorities_) priorities_->follow(*this);
  }

  void cut_streams(const std::optional<Ids>& env_ids) {
    const std::vector<int64_t> envs = streams(env_ids, env_ids ? env_ids->size() : num_envs());
    py::gil_scoped_release release;
    std::lock_guard guard(lock);
    cut(envs);
    if (priorities_) priorities_->follow(*this);
  }

  void prioritize(View<float, 1> leaves, View<double, 1> sums, View<double, 1> largest,
                  View<int64_t, 2> bounds, double alpha) {
    require_shape("leaves", leaves.shape, {rows()});
    require_shape("sums", sums.shape, {SumTreeLayout(rows()).inner_nodes()});
    require_shape("largest", largest.shape, {1});
    require_shape("bounds", bounds.shape, {2, num_envs()});
    priorities_ = std::make_unique<Priorities>(
        PriorityTables{leaves.data, sums.data, largest.data, bounds.data, bounds.data + num_envs(), alpha});
  }

  void set_priorities(const Ids& ids, const py::array_t<double, py::array::c_style>& priority) {
    if (priority.size() != ids.size())
      throw std::invalid_argument("priority has " + std::to_string(priority.size()) + " values for " +
                                  std::to_string(ids.size()) + " transitions");
    const int64_t n = ids.size();
    const int64_t* at_ids = ids.data();
    const double* values = priority.data();
    py::gil_scoped_release release;
    std::lock_guard guard(lock);
    priorities_->set(*this, at_ids, values, n);
  }

  void sample(const BatchOut& out, uint64_t seed, uint64_t batch, const Recency& recency, int threads) {
    check_request(out);
    std::shared_lock guard(lock);
    draw(seed, batch, recency, out.ids.data, out.rows());
    std::fill_n(out.weight.data, out.rows(), 1.0f);
    fill(out, seed, batch, threads);
  }

  void sample_prioritized(const BatchOut& out, uint64_t seed, uint64_t batch, double beta, int threads) {
    check_request(out);
    if (!priorities_) throw std::invalid_argument("sample_prioritized needs prioritize first");
    std::shared_lock guard(lock);
    priorities_->draw(*this, seed, batch, beta, out.ids.data, out.weight.data, out.rows());
    fill(out, seed, batch, threads);
  }

  void get(const BatchOut& out, uint64_t seed, uint64_t batch, int threads) {
    check_request(out);
    std::shared_lock guard(lock);
    check_stored(out.ids);
    std::fill_n(out.weight.data, out.rows(), 1.0f);
    fill(out, seed, batch, threads);
  }

  void observe(const ObservationsOut& out, int threads) {
    check_observations(*this, out);
    std::shared_lock guard(lock);
    check_stored(out.ids);
    gather_keys(out, threads);
  }

 private:
  void check_stored(View<int64_t, 1> ids) const {
    for (int64_t i = 0; i < ids.size(); ++i)
      if (tables().find(ids[i]) < 0)
        throw std::out_of_range("transition " + std::to_string(ids[i]) +
                                " is not in the buffer: it was overwritten or never added");
  }

  void fill(const BatchOut& out, uint64_t seed, uint64_t batch, int threads) const {
    gather_rows(out, seed, batch);
    gather_keys(out, threads);
  }

  void gather_keys(const ObservationsOut& out, int threads) const {
    for (size_t k = 0; k < out.keys.size(); ++k) gather_key(k, out, threads);
  }

  void check_request(const BatchOut& out) const {
    check_columns(*this, out.columns, out.rows(), Device::kCpu);
    check_observations(*this, out);
  }

  // The memory of the tensor that `take_block` gives.
  static uint8_t* block_from(const py::function& take_block, int64_t bytes) {
    py::gil_scoped_acquire acquire;
    const py::object tensor = take_block(bytes);  // which keeps it
    OneGpu gpu;
    const auto block = Argument<View<uint8_t, 1>>::from(tensor, "block", gpu);
    if (block.size() < bytes) throw py::type_error("block has fewer bytes than were asked for");
    return block.data;
  }

  static void check_row_shape(const py::array& array, const Column& column) {
    const std::vector<int64_t>& expected = column.values.shape;
    const std::span<const int64_t> shape(array.shape(), static_cast<size_t>(array.ndim()));
    if (shape.size() == expected.size() && std::equal(shape.begin() + 1, shape.end(), expected.begin() + 1))
      return;
    std::string text = "[rows";
    for (size_t d = 1; d < expected.size(); ++d) text += ", " + std::to_string(expected[d]);
    throw std::invalid_argument(column.name + " has shape " + text_of(shape) + ": it must be " + text + "]");
  }

  static const bool* one_per_row(const Flags& flags, int64_t rows, const char* what) {
    if (flags.ndim() != 1 || flags.shape(0) != rows)
      throw std::invalid_argument(std::string(what) + " must have one bool per row of reward");
    return flags.data();
  }

  // The environments that env_ids names, one for each row; all of them if it names none.
  std::vector<int64_t> streams(const std::optional<Ids>& env_ids, int64_t rows) const {
    std::vector<int64_t> envs(static_cast<size_t>(rows));
    std::iota(envs.begin(), envs.end(), 0);
    if (!env_ids) return envs;
    if (env_ids->ndim() != 1 || env_ids->shape(0) != rows)
      throw std::invalid_argument("env_ids must have one environment id per row");
    std::vector<bool> seen(static_cast<size_t>(num_envs()), false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t env = envs[r] = env_ids->data()[r];
      if (env < 0 || env >= num_envs())
        throw std::invalid_argument("env_ids[" + std::to_string(r) + "] = " + std::to_string(env) +
                                    " is not in [0, num_envs = " + std::to_string(num_envs()) + ")");
      if (seen[env])
        throw std::invalid_argument("env_ids contains " + std::to_string(env) +
                                    " twice: add the steps of one environment in separate calls, in order");
      seen[env] = true;
    }
    return envs;
  }

  std::unique_ptr<Priorities> priorities_;
};

// The buffer's lock, for several accesses from Python.
struct Lock {
  PyReplay& replay;
  bool exclusive;

  void acquire() { exclusive ? replay.lock.lock() : replay.lock.lock_shared(); }
  void release() { exclusive ? replay.lock.unlock() : replay.lock.unlock_shared(); }

  Ids rows(const Ids& ids) const {
    return mapped(ids, [&](int64_t id) { return replay.tables().find(id); });
  }
  Ids ids_in_rows(const Ids& rows) const {
    return mapped(rows, [&](int64_t row) { return replay.tables().id_in_row(row); });
  }

 private:
  template <typename Map>
  static Ids mapped(const Ids& in, const Map& map) {
    Ids out(in.size());
    std::transform(in.data(), in.data() + in.size(), out.mutable_data(), map);
    return out;
  }
};

// The part recency^u of every stream; see tables.h.
Recency recency_of(double recency, int64_t floor) {
  Recency made{.uniform = false, .floor = floor};
  for (auto& powers : made.powers) {  // one digit of u: its bits stand for square roots of square roots
    double roots[Recency::kDigitBits];
    for (double& root : roots) root = recency = std::sqrt(recency);
    for (uint32_t digit = 0; digit < std::size(powers); ++digit) {
      powers[digit] = 1;
      for (int bit = 0; bit < Recency::kDigitBits; ++bit)
        if (digit >> (Recency::kDigitBits - 1 - bit) & 1u) powers[digit] *= roots[bit];
    }
  }
  return made;
}

std::unique_ptr<PyReplay> make_replay(int64_t capacity, int64_t num_envs, int64_t n_step, double gamma,
                                      View<int64_t, 1> count, View<int64_t, 1> first, View<int64_t, 1> ended,
                                      View<float, 1> reward, View<uint8_t, 1> flags, View<int32_t, 1> time) {
  return std::make_unique<PyReplay>(capacity, num_envs, n_step, gamma, count, first, ended, reward, flags,
                                    time);
}

}  // namespace

void bind_mirror(py::module_& m);
void bind_device_add(py::module_& m);

void bind_replay(py::module_& m) {
  const auto kWithoutGil = py::call_guard<py::gil_scoped_release>();
  m.attr("stack_plan_bytes") = sizeof(StackPlan);
  m.attr("nothing_to_sample") = kNothingToSample;
  py::register_exception<FrameStackError>(m, "FrameStackError", PyExc_ValueError);
  py::class_<Recency>(m, "Recency")
      .def(py::init<>())
      .def(py::init(&recency_of), py::arg("recency"), py::arg("floor"));
  py::class_<GatherTarget>(m, "GatherTarget")
      .def(py::init([](bool channels_last, bool shifted, bool black, int64_t height, int64_t width) {
             return GatherTarget{{},     channels_last, shifted, black ? Beyond::kBlack : Beyond::kEdge,
                                 height, width};
           }),
           py::arg("channels_last"), py::arg("shifted"), py::arg("black"), py::arg("height"),
           py::arg("width"));

  bind_requests<Device::kCpu>(m, "ObservationsOut", "BatchOut");

  // `with replay.reading() as locked: ...` keeps writers out, `writing()` everyone. Methods that acquire the
  // lock themselves must not be called inside.
  py::class_<Lock>(m, "Lock")
      .def("__enter__",
           [](const py::object& self) {
             auto& lock = self.cast<Lock&>();
             {
               py::gil_scoped_release release;
               lock.acquire();
             }
             return self;
           })
      .def("__exit__", [](Lock& self, const py::args&) { self.release(); })
      .def("rows", &Lock::rows, py::arg("ids"))
      .def("ids_in_rows", &Lock::ids_in_rows, py::arg("rows"));

  py::class_<Replay>(m, "_Replay");  // as which a mirror takes it
  py::class_<PyReplay, Replay> replay(m, "Replay");
  define_constructor(replay, &make_replay, "capacity", "num_envs", "n_step", "gamma", "count", "first",
                     "ended", "reward", "flags", "time");
  define_method(replay, "add_key", &PyReplay::add_key, "name", "frames", "recent", "stack", "channels",
                "height", "width", "channels_last", "written", "newest", "depth");
  define_method(replay, "follow", &PyReplay::follow_block, "block", "rows");
  define_method(replay, "add_column", &PyReplay::add_column, "name", "values");
  define_method(replay, "prioritize", &PyReplay::prioritize, "leaves", "sums", "largest", "bounds", "alpha");
  replay
      .def("add", &PyReplay::add_rows, py::arg("obs"), py::arg("next_obs"), py::arg("reward"),
           py::arg("terminated"), py::arg("truncated"), py::arg("columns"), py::arg("env_ids"),
           py::arg("take_block") = py::none())
      .def("cut", &PyReplay::cut_streams, py::arg("env_ids"))
      .def_readwrite("cut_at_jumps", &PyReplay::cut_at_jumps)
      .def_property_readonly("rows_added", &PyReplay::rows_added)
      .def_property_readonly("jumps", &PyReplay::jumps)
      .def(
          "reading", [](PyReplay& self) { return Lock{self, false}; }, py::keep_alive<0, 1>())
      .def(
          "writing", [](PyReplay& self) { return Lock{self, true}; }, py::keep_alive<0, 1>())
      .def("size", &PyReplay::size)
      .def("samplable", &PyReplay::samplable)
      .def("set_priorities", &PyReplay::set_priorities, py::arg("ids"), py::arg("priority"))
      // Each makes a whole batch under one lock. `get` takes the ids that are in `out`, the others draw them.
      .def("sample", &PyReplay::sample, py::arg("out"), py::arg("seed"), py::arg("batch"), py::arg("recency"),
           py::arg("threads"), kWithoutGil)
      .def("sample_prioritized", &PyReplay::sample_prioritized, py::arg("out"), py::arg("seed"),
           py::arg("batch"), py::arg("beta"), py::arg("threads"), kWithoutGil)
      .def("get", &PyReplay::get, py::arg("out"), py::arg("seed"), py::arg("batch"), py::arg("threads"),
           kWithoutGil)
      .def("observe", &PyReplay::observe, py::arg("out"), py::arg("threads"), kWithoutGil);
#ifdef COVR_WITH_CUDA
  bind_mirror(m);
  bind_device_add(m);
#endif
}

}  // namespace covr
