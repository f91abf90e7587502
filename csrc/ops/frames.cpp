// Integer shift and crop of image batches, with conversion to the asked pixel format in the same pass.
#include "ops/frames.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "common/parallel.h"

namespace py = pybind11;

namespace covr {
namespace {

struct Shape {
  int64_t batch, channels;
  int height, width;          // of the source
  int out_height, out_width;  // of the window
};

COVR_CLONES void convert(float* out, const uint8_t* pixels, int n) {
  for (int i = 0; i < n; ++i) out[i] = pixel_to<float>(pixels[i]);
}

void convert(uint8_t* out, const uint8_t* pixels, int n) { std::copy(pixels, pixels + n, out); }

// Rounding to half takes longer than looking all of its 256 results up.
template <typename Half>
void convert(Half* out, const uint8_t* pixels, int n) {
  static const auto table = [] {
    std::array<Half, 256> values;
    for (int pixel = 0; pixel < 256; ++pixel) values[pixel] = pixel_to<Half>(static_cast<uint8_t>(pixel));
    return values;
  }();
  for (int i = 0; i < n; ++i) out[i] = table[pixels[i]];
}

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
void window_images(T* out, const uint8_t* frames, const int64_t* offsets, const Shape& s, int pad,
                   int threads) {
  constexpr int64_t kGrainPixels = 1 << 15;
  const int64_t pixels = s.channels * s.out_height * s.out_width;
  parallel_for(s.batch, std::max<int64_t>(1, kGrainPixels / std::max<int64_t>(pixels, 1)), threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t image = begin; image < end; ++image) {
                   const int64_t dy = offsets[2 * image] - pad, dx = offsets[2 * image + 1] - pad;
                   T* row = out + image * pixels;
                   for (int64_t plane = image * s.channels; plane < (image + 1) * s.channels; ++plane)
                     for (int y = 0; y < s.out_height; ++y, row += s.out_width) {
                       const int64_t source_row = plane * s.height + clamp_to_image(y + dy, s.height);
                       window_row(row, frames + source_row * s.width, s.width, s.out_width, dx);
                     }
                 }
               });
}

void window(uintptr_t out, uintptr_t frames_, uintptr_t offsets_, int64_t batch, int64_t channels, int height,
            int width, int out_height, int out_width, int pad, int format, int threads) {
  const Shape shape{batch, channels, height, width, out_height, out_width};
  const auto* frames = reinterpret_cast<const uint8_t*>(frames_);
  const auto* offsets = reinterpret_cast<const int64_t*>(offsets_);
  switch (static_cast<PixelFormat>(format)) {
    case PixelFormat::kFloat32:
      return window_images(reinterpret_cast<float*>(out), frames, offsets, shape, pad, threads);
    case PixelFormat::kBFloat16:
      return window_images(reinterpret_cast<BFloat16*>(out), frames, offsets, shape, pad, threads);
    case PixelFormat::kFloat16:
      return window_images(reinterpret_cast<Float16*>(out), frames, offsets, shape, pad, threads);
    case PixelFormat::kUInt8:
      return window_images(reinterpret_cast<uint8_t*>(out), frames, offsets, shape, pad, threads);
  }
  throw std::invalid_argument("window: unknown pixel format");
}

}  // namespace

void bind_frames(py::module_& m) {
  m.def("window", &window, py::call_guard<py::gil_scoped_release>());
#ifdef COVR_WITH_CUDA
  m.def("window_cuda", &cuda::window, py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace covr
