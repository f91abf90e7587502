// Integer shift and crop of image batches on the GPU, with conversion to the asked pixel format.
#include <algorithm>

#include "launch.h"
#include "ops/frames.h"

namespace covr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 4;  // of one row, per thread: one 16-byte store of floats

template <typename T>
struct alignas(sizeof(T) * kPixels) Pack {
  T pixel[kPixels];
};

template <typename T, bool kWhole>  // kWhole: rows are a multiple of kPixels, so every store is a full pack
__global__ void __launch_bounds__(kThreads)
    window_kernel(T* __restrict__ out, const uint8_t* __restrict__ frames,
                  const int64_t* __restrict__ offsets, WindowShape s, int pad, int64_t packs) {
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
void launch(T* out, const uint8_t* frames, const int64_t* offsets, const WindowShape& s, int pad,
            cudaStream_t stream) {
  const int64_t packs = s.batch * s.channels * s.out_height * ceil_div(s.out_width, kPixels);
  if (packs == 0) return;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(ceil_div(packs, kThreads), 32 * multiprocessors()));
  auto* kernel = s.out_width % kPixels == 0 ? window_kernel<T, true> : window_kernel<T, false>;
  kernel<<<blocks, kThreads, 0, stream>>>(out, frames, offsets, s, pad, packs);
  check(cudaGetLastError(), "window");
}

}  // namespace

void window(Windows<Device::kCuda> out, CudaView<const uint8_t, 4> frames, CudaView<const int64_t, 2> offsets,
            int pad, uintptr_t stream) {
  std::visit(
      [&](auto out) {
        const WindowShape shape = window_shape(out.shape, frames.shape, offsets.shape);
        launch(out.data, frames.data, offsets.data, shape, pad, as_stream(stream));
      },
      out);
}

}  // namespace covr::cuda
