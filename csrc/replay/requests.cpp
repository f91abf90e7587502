#include "replay/requests.h"

#include <string>

#include "common/border.h"

namespace covr {

void check_target(const Replay& replay, size_t k, const GatherTarget& target, const AnyView& out,
                  int64_t rows, Device device) {
  const ObservationKey& key = replay.keys().at(k);
  const bool cast = key.dtype == DType::kUInt8 && is_floating(out.dtype) && out.dtype != DType::kFloat64;
  const bool whole = target.out_height == key.frames.height && target.out_width == key.frames.width;
  if ((out.dtype != key.dtype && !cast) || (!whole && !target.shifted) || out.device != device ||
      (device == Device::kCpu && key.device != device) || out.shape.empty() || out.shape[0] != rows ||
      out.bytes() != rows * target.row_bytes(key.frames))
    throw pybind11::type_error("the tensor for observations '" + key.name +
                               "' has another dtype, device or shape than its target says");
}

void check_columns(const Replay& replay, const std::vector<AnyView>& columns, int64_t rows, Device device) {
  if (columns.size() != replay.columns().size())
    throw pybind11::type_error("a batch must have " + std::to_string(replay.columns().size()) +
                               " columns, not " + std::to_string(columns.size()));
  for (size_t c = 0; c < columns.size(); ++c) {
    const Column& own = replay.columns()[c];
    std::vector<int64_t> shape = own.values.shape;
    shape[0] = rows;
    require(own.name.c_str(), columns[c], own.values.dtype, device, shape);
  }
}

template <Device kOn>
void check_observations(const Replay& replay, const ObservationsOutOn<kOn>& out) {
  for (size_t k = 0; k < out.keys.size(); ++k) {
    const auto& [target, obs, next_obs] = out.keys[k];
    check_target(replay, k, target, obs, out.rows(), kOn);
    if (next_obs) require("next_obs", *next_obs, obs.dtype, kOn, obs.shape);
  }
}

template void check_observations(const Replay&, const ObservationsOutOn<Device::kCpu>&);
template void check_observations(const Replay&, const ObservationsOutOn<Device::kCuda>&);

}  // namespace covr
