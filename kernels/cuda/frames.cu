// Integer shift and crop of image batches on the GPU, with conversion to the asked pixel format.
#include <algorithm>

#include "ops/frames.h"
#include "launch.h"

namespace covr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 4;  // of one row, per thread: one 16-byte store of floats

template <typename T>
struct alignas(sizeof(T) * kPixels) Pack {
  T pixel[kPixels];
};

struct Shape {
  int64_t batch, channels;
  int height, width;          // of the source
  int out_height, out_width;  // of the window
};

template <typename T, bool kWhole>  // kWhole: rows are a multiple of kPixels, so every store is a full pack
__global__ void __launch_bounds__(kThreads)
    window_kernel(T* __restrict__ out, const uint8_t* __restrict__ frames,
                  const int64_t* __restrict__ offsets, Shape s, int pad, int64_t packs) {
  const int per_row = (s.out_width + kPixels - 1) / kPixels;
  for (int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; pack < packs;
       pack += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = pack / per_row, plane = row / s.out_height, image = plane / s.channels;
    const int x = static_cast<int>(pack - row * per_row) * kPixels;
    const int y = static_cast<int>(row - plane * s.out_height);
    const int source_y = clamp_to_image(y + offsets[2 * image] - pad, s.height);
    const int64_t dx = offsets[2 * image + 1] - pad;
    const uint8_t* source = frames + (plane * s.height + source_y) * s.width;
    T* target = out + row * s.out_width + x;
    Pack<T> pixels;
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
      pixels.pixel[i] = pixel_to<T>(source[clamp_to_image(x + i + dx, s.width)]);
    if constexpr (kWhole) {
      *reinterpret_cast<Pack<T>*>(target) = pixels;
    } else {
      for (int i = 0; i < kPixels && x + i < s.out_width; ++i) target[i] = pixels.pixel[i];
    }
  }
}

template <typename T>
void launch(uintptr_t out, uintptr_t frames, uintptr_t offsets, const Shape& s, int pad,
            cudaStream_t stream) {
  const int64_t packs = s.batch * s.channels * s.out_height * ceil_div(s.out_width, kPixels);
  if (packs == 0) return;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(ceil_div(packs, kThreads), 32 * multiprocessors()));
  auto* kernel = s.out_width % kPixels == 0 ? window_kernel<T, true> : window_kernel<T, false>;
  kernel<<<blocks, kThreads, 0, stream>>>(as<T>(out), as<const uint8_t>(frames), as<const int64_t>(offsets),
                                          s, pad, packs);
  check(cudaGetLastError(), "window");
}

}  // namespace

void window(uintptr_t out, uintptr_t frames, uintptr_t offsets, int64_t batch, int64_t channels, int height,
            int width, int out_height, int out_width, int pad, int format, uintptr_t stream_) {
  const Shape shape{batch, channels, height, width, out_height, out_width};
  const cudaStream_t stream = as_stream(stream_);
  switch (static_cast<PixelFormat>(format)) {
    case PixelFormat::kFloat32:
      return launch<float>(out, frames, offsets, shape, pad, stream);
    case PixelFormat::kBFloat16:
      return launch<BFloat16>(out, frames, offsets, shape, pad, stream);
    case PixelFormat::kFloat16:
      return launch<Float16>(out, frames, offsets, shape, pad, stream);
    case PixelFormat::kUInt8:
      return launch<uint8_t>(out, frames, offsets, shape, pad, stream);
  }
  throw std::invalid_argument("window: unknown pixel format");
}

}  // namespace covr::cuda
