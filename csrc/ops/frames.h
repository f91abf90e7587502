// Windows of image batches: the arguments of shift and crop.
#pragma once

#include <array>
#include <variant>

#include "common/view.h"
#include "ops/pixels.h"

namespace covr {

// A batch of images and the windows that are cut from them.
struct WindowShape {
  int64_t batch, channels;
  ImageSize image, window;
};

// Checks that the shapes of a window's arguments agree.
inline WindowShape window_shape(const std::array<int64_t, 4>& out, const std::array<int64_t, 4>& frames,
                                const std::array<int64_t, 2>& offsets) {
  require_shape("out", out, {frames[0], frames[1], out[2], out[3]});
  require_shape("offsets", offsets, {frames[0], 2});
  return {frames[0],
          frames[1],
          {static_cast<int>(frames[2]), static_cast<int>(frames[3])},
          {static_cast<int>(out[2]), static_cast<int>(out[3])}};
}

// Windows as float32, bfloat16, float16 or uint8 [B, C, height, width].
template <Device kOn>
using Windows =
    std::variant<View<float, 4, kOn>, View<BFloat16, 4, kOn>, View<Float16, 4, kOn>, View<uint8_t, 4, kOn>>;

#ifdef COVR_WITH_CUDA
namespace cuda {
void window(Windows<Device::kCuda> out, CudaView<const uint8_t, 4> frames, CudaView<const int64_t, 2> offsets,
            int pad, uintptr_t stream);
}  // namespace cuda
#endif

}  // namespace covr
