// Integer shift and crop of image batches, with conversion to the asked pixel format in the same pass.
#include "ops/frames.h"

#include <algorithm>
#include <type_traits>

#include "common/border.h"
#include "common/parallel.h"
#include "common/streaming.h"

namespace covr {
namespace {

template <typename T>
void window_images(T* out, const uint8_t* frames, const int64_t* offsets, const WindowShape& s, int pad,
                   int threads) {
  constexpr int64_t kGrainPixels = 1 << 15;
  const int64_t image_plane = int64_t{s.image.height} * s.image.width;
  const int64_t plane = int64_t{s.window.height} * s.window.width, pixels = s.channels * plane;
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / std::max<int64_t>(pixels, 1));
  const bool streaming = is_worth_streaming(s.batch * pixels * static_cast<int64_t>(sizeof(T)));
  parallel_for_each(s.batch, grain, threads, [&](int64_t image) {
    const ImageShift shift{shift_of(offsets[2 * image], pad, s.image.height, s.window.height),
                           shift_of(offsets[2 * image + 1], pad, s.image.width, s.window.width)};
    const uint8_t* from = frames + image * s.channels * image_plane;
    T* to = out + image * pixels;
    for (int64_t c = 0; c < s.channels; ++c, from += image_plane, to += plane) {
      if constexpr (std::is_same_v<T, uint8_t>) {
        cut_plane(from, s.image, shift, Beyond::kEdge, s.window, to);
      } else {
        uint8_t* cut = pixel_scratch(plane);
        cut_plane(from, s.image, shift, Beyond::kEdge, s.window, cut);
        convert_pixels(cut, to, plane, streaming);
      }
    }
    if (streaming) finish_streaming();
  });
}

void window(Windows<Device::kCpu> out, View<const uint8_t, 4> frames, View<const int64_t, 2> offsets, int pad,
            int threads) {
  std::visit(
      [&](auto out) {
        const WindowShape shape = window_shape(out.shape, frames.shape, offsets.shape);
        window_images(out.data, frames.data, offsets.data, shape, pad, threads);
      },
      out);
}

}  // namespace

void bind_frames(pybind11::module_& m) {
  define(m, "window", &window, "out", "frames", "offsets", "pad", "threads");
#ifdef COVR_WITH_CUDA
  define(m, "window_cuda", &cuda::window, "out", "frames", "offsets", "pad", "stream");
#endif
}

}  // namespace covr
