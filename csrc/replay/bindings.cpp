// Python's view of replay.h. Storage and outputs come as addresses of torch tensors, the rows of add() as
// numpy arrays, which are checked here because a Python check would cost as much as storing them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>

#include "replay/priorities.h"
#include "replay/replay.h"
#ifdef COVR_WITH_CUDA
#include "replay/gather_cuda.h"
#endif

namespace py = pybind11;

namespace covr {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::string shape_text(const py::array& array) {
  std::string text;
  for (py::ssize_t d = 0; d < array.ndim(); ++d) text += (d ? ", " : "") + std::to_string(array.shape(d));
  return "[" + text + "]";
}

// Rows that are each contiguous, however far apart.
const uint8_t* rows_of(const py::array& array, int64_t rows, int64_t row_bytes, const std::string& what,
                       int64_t& stride) {
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
  stride = array.strides(0);
  return static_cast<const uint8_t*>(array.data());
}

using Flags = py::array_t<bool, py::array::c_style>;
using Ids = py::array_t<int64_t, py::array::c_style>;

class PyReplay : public Replay {
 public:
  using Replay::Replay;

  void add_observation_key(const std::string& name, uintptr_t data, uintptr_t recent, int64_t slots,
                           int64_t recent_slots, int64_t stack, int64_t channels, int64_t height,
                           int64_t width, int64_t item_bytes, bool floating, bool channels_last,
                           uintptr_t written, uintptr_t newest, uintptr_t depth) {
    ObservationKey key;
    key.name = name;
    key.frames = {at<uint8_t>(data), slots, stack, channels, height, width, item_bytes};
    key.recent = key.frames;
    key.recent.data = at<uint8_t>(recent);
    key.recent.slots = recent_slots;
    key.floating = floating;
    key.input_channels_last = channels_last;
    key.written = at<int64_t>(written);
    key.newest = at<int64_t>(newest);
    key.depth = at<uint8_t>(depth);
    observation_bytes_.push_back(stack * key.frames.frame_bytes());
    names_.push_back(name);
    add_key(std::move(key));
  }

  void add_named_column(const std::string& name, uintptr_t data, const std::vector<py::ssize_t>& shape,
                        int64_t item_bytes) {
    int64_t bytes = item_bytes;
    for (py::ssize_t size : shape) bytes *= size;
    column_names_.push_back(name);
    column_shapes_.push_back(shape);
    column_bytes_.push_back(bytes);
    add_column({at<uint8_t>(data), bytes});
  }

  Ids add_rows(const std::vector<py::array>& obs, const std::vector<py::array>& next_obs,
               const py::array_t<float, py::array::c_style>& reward, const Flags& terminated,
               const Flags& truncated, const std::vector<py::array>& columns,
               const std::optional<Ids>& env_ids, int64_t num_envs) {
    RowsIn in{};
    in.rows = reward.ndim() == 1 ? reward.shape(0) : -1;
    if (in.rows < 0) throw std::invalid_argument("reward must have one dimension, [rows]");
    if (env_ids) {
      check_streams(*env_ids, in.rows, num_envs);
      in.env_ids = env_ids->data();
    } else if (in.rows != num_envs) {
      throw std::invalid_argument("reward has " + std::to_string(in.rows) + " rows for " +
                                  std::to_string(num_envs) +
                                  " environments: pass env_ids to add rows of some of them");
    }
    for (size_t k = 0; k < names_.size(); ++k) {
      int64_t stride = 0;
      in.obs.push_back(rows_of(obs[k], in.rows, observation_bytes_[k], "obs '" + names_[k] + "'", stride));
      in.obs_stride.push_back(stride);
      in.next_obs.push_back(
          rows_of(next_obs[k], in.rows, observation_bytes_[k], "next_obs '" + names_[k] + "'", stride));
      in.next_obs_stride.push_back(stride);
    }
    for (size_t c = 0; c < column_names_.size(); ++c) {
      int64_t stride = 0;
      check_row_shape(columns[c], column_shapes_[c], column_names_[c]);
      in.columns.push_back(rows_of(columns[c], in.rows, column_bytes_[c], column_names_[c], stride));
      if (in.rows > 1 && stride != column_bytes_[c])
        throw std::invalid_argument(column_names_[c] + " is not contiguous: pass a contiguous array");
    }
    in.reward = reward.data();
    in.terminated = one_per_row(terminated, in.rows, "terminated");
    in.truncated = one_per_row(truncated, in.rows, "truncated");
    Ids ids(in.rows);
    int64_t* to = ids.mutable_data();
    py::gil_scoped_release release;
    std::lock_guard guard(lock);
    add(in, to);
    if (priorities_) priorities_->follow(*this);
    return ids;
  }

  void cut_streams(const std::optional<Ids>& env_ids, int64_t num_envs) {
    if (env_ids) check_streams(*env_ids, env_ids->size(), num_envs);
    const int64_t* ids = env_ids ? env_ids->data() : nullptr;
    const int64_t n = env_ids ? env_ids->size() : 0;
    py::gil_scoped_release release;
    std::lock_guard guard(lock);
    cut(ids, n);
    if (priorities_) priorities_->follow(*this);
  }

  void prioritize(uintptr_t leaves, uintptr_t sums, uintptr_t largest, uintptr_t bounds, int64_t rows,
                  double alpha) {
    priorities_ = std::make_unique<Priorities>(at<float>(leaves), at<double>(sums), at<double>(largest),
                                               at<int64_t>(bounds), rows, alpha);
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

  void sample(const BatchOut& out, uint64_t seed, uint64_t batch, double recency, int64_t recency_floor,
              int threads) {
    std::shared_lock guard(lock);
    draw(seed, batch, recency, recency_floor, out.ids, out.rows);
    std::fill_n(out.weight, out.rows, 1.0f);
    fill(out, seed, batch, threads);
  }

  void sample_prioritized(const BatchOut& out, uint64_t seed, uint64_t batch, double beta, int threads) {
    std::shared_lock guard(lock);
    priorities_->draw(*this, seed, batch, beta, out.ids, out.weight, out.rows);
    fill(out, seed, batch, threads);
  }

  void get(const BatchOut& out, uint64_t seed, uint64_t batch, int threads) {
    std::shared_lock guard(lock);
    check_held(out);
    std::fill_n(out.weight, out.rows, 1.0f);
    fill(out, seed, batch, threads);
  }

  void observe(const BatchOut& out, int threads) {
    std::shared_lock guard(lock);
    check_held(out);
    gather_keys(out, threads);
  }

 private:
  void check_held(const BatchOut& out) const {
    for (int64_t i = 0; i < out.rows; ++i)
      if (find(out.ids[i]) < 0)
        throw std::out_of_range("transition " + std::to_string(out.ids[i]) +
                                " is not in the buffer: it was overwritten or never added");
  }

  void fill(const BatchOut& out, uint64_t seed, uint64_t batch, int threads) const {
    gather_rows(out, seed, batch);
    gather_keys(out, threads);
  }

  void gather_keys(const BatchOut& out, int threads) const {
    for (size_t k = 0; k < out.keys.size(); ++k) gather_key(static_cast<int64_t>(k), out, threads);
  }

  static void check_row_shape(const py::array& array, const std::vector<py::ssize_t>& shape,
                              const std::string& what) {
    const auto dimensions = static_cast<py::ssize_t>(shape.size()) + 1;
    if (array.ndim() == dimensions && std::equal(shape.begin(), shape.end(), array.shape() + 1)) return;
    std::string expected = "[rows";
    for (py::ssize_t size : shape) expected += ", " + std::to_string(size);
    throw std::invalid_argument(what + " has shape " + shape_text(array) + ": it must be " + expected + "]");
  }

  static const uint8_t* one_per_row(const Flags& flags, int64_t rows, const char* what) {
    if (flags.ndim() != 1 || flags.shape(0) != rows)
      throw std::invalid_argument(std::string(what) + " must have one bool per row of reward");
    return reinterpret_cast<const uint8_t*>(flags.data());
  }

  void check_streams(const Ids& env_ids, int64_t rows, int64_t num_envs) {
    if (env_ids.ndim() != 1 || env_ids.shape(0) != rows)
      throw std::invalid_argument("env_ids must have one environment id per row");
    seen_.assign(static_cast<size_t>(num_envs), false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t env = env_ids.data()[r];
      if (env < 0 || env >= num_envs)
        throw std::invalid_argument("env_ids[" + std::to_string(r) + "] = " + std::to_string(env) +
                                    " is not in [0, num_envs = " + std::to_string(num_envs) + ")");
      if (seen_[static_cast<size_t>(env)])
        throw std::invalid_argument("env_ids contains " + std::to_string(env) +
                                    " twice: add the steps of one environment in separate calls, in order");
      seen_[static_cast<size_t>(env)] = true;
    }
  }

  std::vector<std::string> names_, column_names_;
  std::vector<std::vector<py::ssize_t>> column_shapes_;
  std::vector<int64_t> observation_bytes_, column_bytes_;
  std::vector<bool> seen_;
  std::unique_ptr<Priorities> priorities_;
};

// A lock held across several accesses from Python.
struct Hold {
  PyReplay& replay;
  bool exclusive;

  void enter() { exclusive ? replay.lock.lock() : replay.lock.lock_shared(); }
  void exit() { exclusive ? replay.lock.unlock() : replay.lock.unlock_shared(); }
};

using IdMap = int64_t (Replay::*)(int64_t) const;

// For callers that hold the lock.
Ids map_ids(const Replay& replay, const Ids& in, IdMap function) {
  Ids out(in.size());
  std::transform(in.data(), in.data() + in.size(), out.mutable_data(),
                 [&](int64_t id) { return (replay.*function)(id); });
  return out;
}

Ids lock_and_map_ids(PyReplay& replay, const Ids& in, IdMap function) {
  std::shared_lock guard(replay.lock, std::defer_lock);
  {
    py::gil_scoped_release release;
    guard.lock();
  }
  return map_ids(replay, in, function);
}

}  // namespace

void bind_replay(py::module_& m) {
  const auto kWithoutGil = py::call_guard<py::gil_scoped_release>();
  m.attr("stack_plan_bytes") = sizeof(StackPlan);
  py::register_exception<FrameStackError>(m, "FrameStackError", PyExc_ValueError);
  py::class_<GatherTarget>(m, "GatherTarget")
      .def(py::init([](int type, bool channels_last, bool shifted, int64_t height, int64_t width) {
             return GatherTarget{static_cast<OutType>(type), channels_last, shifted, height, width};
           }),
           py::arg("type"), py::arg("channels_last"), py::arg("shifted"), py::arg("height"),
           py::arg("width"));

  py::class_<BatchOut>(m, "BatchOut")
      .def(py::init([](int64_t rows, int64_t n_step, uintptr_t ids, uintptr_t reward, uintptr_t discount,
                       uintptr_t terminated, uintptr_t truncated, uintptr_t weight,
                       const std::vector<uintptr_t>& columns, uintptr_t offsets, int64_t offset_range,
                       int64_t shift_origin) {
             BatchOut out{rows,
                          n_step,
                          at<int64_t>(ids),
                          at<float>(reward),
                          at<float>(discount),
                          at<uint8_t>(terminated),
                          at<uint8_t>(truncated),
                          at<float>(weight),
                          {},
                          {},
                          at<int64_t>(offsets),
                          offset_range,
                          shift_origin};
             for (uintptr_t column : columns) out.columns.push_back(at<uint8_t>(column));
             return out;
           }),
           py::arg("rows"), py::arg("n_step"), py::arg("ids"), py::arg("reward"), py::arg("discount"),
           py::arg("terminated"), py::arg("truncated"), py::arg("weight"), py::arg("columns"),
           py::arg("offsets"), py::arg("offset_range"), py::arg("shift_origin"))
      .def("add_key", [](BatchOut& out, const GatherTarget& target, uintptr_t obs, uintptr_t next_obs) {
        out.keys.push_back({target, at<uint8_t>(obs), at<uint8_t>(next_obs)});
      });

  // `with replay.reading() as held: ...` holds writers off, `writing()` everyone. What takes the lock by
  // itself must not be called inside.
  py::class_<Hold>(m, "Hold")
      .def("__enter__",
           [](const py::object& self) {
             auto& hold = self.cast<Hold&>();
             {
               py::gil_scoped_release release;
               hold.enter();
             }
             return self;
           })
      .def("__exit__", [](Hold& self, const py::args&) { self.exit(); })
      .def("rows", [](Hold& self, const Ids& ids) { return map_ids(self.replay, ids, &Replay::find); });

  py::class_<PyReplay>(m, "Replay")
      .def(py::init([](int64_t capacity, int64_t num_envs, int64_t n_step, double gamma, uintptr_t count,
                       uintptr_t first, uintptr_t ended, uintptr_t reward, uintptr_t flags, uintptr_t time) {
             return new PyReplay(capacity, num_envs, n_step, gamma, at<int64_t>(count), at<int64_t>(first),
                                 at<int64_t>(ended), at<float>(reward), at<uint8_t>(flags),
                                 at<int32_t>(time));
           }),
           py::arg("capacity"), py::arg("num_envs"), py::arg("n_step"), py::arg("gamma"), py::arg("count"),
           py::arg("first"), py::arg("ended"), py::arg("reward"), py::arg("flags"), py::arg("time"))
      .def("add_key", &PyReplay::add_observation_key, py::arg("name"), py::arg("data"), py::arg("recent"),
           py::arg("slots"), py::arg("recent_slots"), py::arg("stack"), py::arg("channels"),
           py::arg("height"), py::arg("width"), py::arg("item_bytes"), py::arg("floating"),
           py::arg("channels_last"), py::arg("written"), py::arg("newest"), py::arg("depth"))
      .def("add_column", &PyReplay::add_named_column, py::arg("name"), py::arg("data"), py::arg("shape"),
           py::arg("item_bytes"))
      .def("add", &PyReplay::add_rows, py::arg("obs"), py::arg("next_obs"), py::arg("reward"),
           py::arg("terminated"), py::arg("truncated"), py::arg("columns"), py::arg("env_ids"),
           py::arg("num_envs"))
      .def("cut", &PyReplay::cut_streams, py::arg("env_ids"), py::arg("num_envs"))
#ifdef COVR_WITH_CUDA
      // The plans of a batch whose ids are drawn, into host memory [2, rows]: for gather_cuda.
      .def("plan",
           [](PyReplay& self, int64_t key, const BatchOut& out, uintptr_t plans, bool with_next) {
             auto* to = at<StackPlan>(plans);
             self.plan(key, out, to, with_next ? to + out.rows : nullptr);
           })
      .def("gather_cuda",
           [](PyReplay& self, int64_t key, uintptr_t plans, int64_t rows, const GatherTarget& target,
              uintptr_t out, uintptr_t stream) {
             gather_cuda(self.frames(key), at<StackPlan>(plans), rows, target, at<void>(out),
                         at<void>(stream));
           })
      // Sends the frames that add() wrote since the last call to the device.
      .def("upload",
           [](PyReplay& self, uintptr_t stream) {
             for (const FrameWrite& write : self.take_writes()) {
               const FrameLayout& frames = self.frames(write.key);
               auto* to = const_cast<uint8_t*>(frames.data) + write.slot * frames.frame_bytes();
               upload_frame(write.source, to, frames.frame_bytes(), at<void>(stream));
             }
           })
#endif
      .def_readwrite("cut_at_jumps", &PyReplay::cut_at_jumps)
      .def_property_readonly("rows_added", &PyReplay::rows_added)
      .def_property_readonly("jumps", &PyReplay::jumps)
      .def(
          "reading", [](PyReplay& self) { return Hold{self, false}; }, py::keep_alive<0, 1>())
      .def(
          "writing", [](PyReplay& self) { return Hold{self, true}; }, py::keep_alive<0, 1>())
      .def("size", &PyReplay::size)
      .def("samplable", &PyReplay::samplable)
      .def("prioritize", &PyReplay::prioritize, py::arg("leaves"), py::arg("sums"), py::arg("largest"),
           py::arg("bounds"), py::arg("rows"), py::arg("alpha"))
      .def("set_priorities", &PyReplay::set_priorities, py::arg("ids"), py::arg("priority"))
      // Each makes a whole batch under one lock. `get` takes the ids that `out` holds, the others draw them.
      .def("sample", &PyReplay::sample, py::arg("out"), py::arg("seed"), py::arg("batch"), py::arg("recency"),
           py::arg("recency_floor"), py::arg("threads"), kWithoutGil)
      .def("sample_prioritized", &PyReplay::sample_prioritized, py::arg("out"), py::arg("seed"),
           py::arg("batch"), py::arg("beta"), py::arg("threads"), kWithoutGil)
      .def("get", &PyReplay::get, py::arg("out"), py::arg("seed"), py::arg("batch"), py::arg("threads"),
           kWithoutGil)
      .def("observe", &PyReplay::observe, py::arg("out"), py::arg("threads"), kWithoutGil)
      .def("rows", [](PyReplay& self, const Ids& ids) { return lock_and_map_ids(self, ids, &Replay::find); })
      .def("ids_in_rows",
           [](PyReplay& self, const Ids& rows) { return lock_and_map_ids(self, rows, &Replay::id_in_row); });
}

}  // namespace covr
