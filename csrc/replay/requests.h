// Checks of what Python asks a buffer to fill: a request of another form than the buffer's is a TypeError.
#pragma once

#include "common/border.h"
#include "replay/replay.h"

namespace covr {

// Throws unless frames of key number k can be written into `out` on `device` in the form of `target`.
void check_target(const Replay& replay, size_t k, const GatherTarget& target, const AnyView& out,
                  int64_t rows, Device device);

// Throws unless there is one column for each of the buffer, of its dtype and shape.
void check_columns(const Replay& replay, const std::vector<AnyView>& columns, int64_t rows, Device device);

// Throws unless all observations of a request can be written.
template <Device kOn>
void check_observations(const Replay& replay, const ObservationsOutOn<kOn>& out);

template <Device kOn>
BatchOutOn<kOn> make_batch_out(View<int64_t, 1, kOn> ids, int64_t n_step, View<float, 1, kOn> reward,
                               View<float, 1, kOn> discount, View<bool, 1, kOn> terminated,
                               View<bool, 1, kOn> truncated, View<float, 1, kOn> weight,
                               std::vector<AnyView> columns, std::optional<View<int64_t, 2, kOn>> obs_offset,
                               std::optional<View<int64_t, 2, kOn>> next_obs_offset, int64_t offset_range,
                               int64_t shift_origin, bool translate) {
  require_shape("reward", reward.shape, ids.shape);
  require_shape("discount", discount.shape, ids.shape);
  require_shape("terminated", terminated.shape, ids.shape);
  require_shape("truncated", truncated.shape, ids.shape);
  require_shape("weight", weight.shape, ids.shape);
  if (obs_offset.has_value() != next_obs_offset.has_value())
    throw pybind11::type_error("obs_offset and next_obs_offset must both be tensors, or both None");
  if (obs_offset) require_shape("obs_offset", obs_offset->shape, {ids.size(), 2});
  if (next_obs_offset) require_shape("next_obs_offset", next_obs_offset->shape, {ids.size(), 2});
  return {{ids, n_step, {}, obs_offset, next_obs_offset, {offset_range, shift_origin, translate}},
          reward,
          discount,
          terminated,
          truncated,
          weight,
          std::move(columns)};
}

// The two kinds of requests as Python classes of these names.
template <Device kOn>
void bind_requests(pybind11::module_& m, const char* observations, const char* batch) {
  using Observations = ObservationsOutOn<kOn>;
  pybind11::class_<Observations> observations_out(m, observations);
  define_constructor(observations_out, +[](View<int64_t, 1, kOn> ids) { return Observations{ids}; }, "ids");
  define_method(observations_out, "add_key", &Observations::add_key, "target", "obs", "next_obs");
  pybind11::class_<BatchOutOn<kOn>, Observations> batch_out(m, batch);
  define_constructor(batch_out, &make_batch_out<kOn>, "ids", "n_step", "reward", "discount", "terminated",
                     "truncated", "weight", "columns", "obs_offset", "next_obs_offset", "offset_range",
                     "shift_origin", "translate");
}

}  // namespace covr
