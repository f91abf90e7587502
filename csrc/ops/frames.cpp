// Integer shift and crop of image batches, with conversion to the asked pixel format in the same pass.
#include "ops/frames.h"

#include <algorithm>

#include "common/border.h"
#include "common/parallel.h"

namespace covr {
namespace {

template <typename T>
COVR_HD void convert_to(T* out, const uint8_t* pixels, int n) {
  for (int i = 0; i < n; ++i) out[i] = pixel_to<T>(pixels[i]);
}

// Clones cannot be templates.
COVR_CLONES void convert(float* out, const uint8_t* pixels, int n) { convert_to(out, pixels, n); }
COVR_CLONES void convert(BFloat16* out, const uint8_t* pixels, int n) { convert_to(out, pixels, n); }
COVR_CLONES void convert(Float16* out, const uint8_t* pixels, int n) { convert_to(out, pixels, n); }
void convert(uint8_t* out, const uint8_t* pixels, int n) { std::copy(pixels, pixels + n, out); }

// One output row: repeated first pixel, converted run, repeated last pixel.
template <typename T>
void window_row(T* out, const uint8_t* source, int width, int out_width, int64_t shift) {
  const int left = static_cast<int>(std::clamp<int64_t>(-shift, 0, out_width));
  const int right = static_cast<int>(std::clamp<int64_t>(width - shift, left, out_width));
  std::fill(out, out + left, pixel_to<T>(source[0]));
  convert(out + left, source + left + shift, right - left);
  std::fill(out + right, out + out_width, pixel_to<T>(source[width - 1]));
}

template <typename T>
void window_images(T* out, const uint8_t* frames, const int64_t* offsets, const WindowShape& s, int pad,
                   int threads) {
  constexpr int64_t kGrainPixels = 1 << 15;
  const int64_t pixels = s.channels * s.out_height * s.out_width;
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / std::max<int64_t>(pixels, 1));
  parallel_for_each(s.batch, grain, threads, [&](int64_t image) {
    const int64_t dy = offsets[2 * image] - pad, dx = offsets[2 * image + 1] - pad;
    T* row = out + image * pixels;
    for (int64_t plane = image * s.channels; plane < (image + 1) * s.channels; ++plane)
      for (int y = 0; y < s.out_height; ++y, row += s.out_width) {
        const int64_t source_row = plane * s.height + clamp_to_image(y + dy, s.height);
        window_row(row, frames + source_row * s.width, s.width, s.out_width, dx);
      }
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
