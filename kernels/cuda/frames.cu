// Integer shift and crop of image batches on the GPU, with conversion to the asked pixel format.
#include "ops/frames.h"
#include "pixels.h"

namespace covr::cuda {

void window(Windows<Device::kCuda> out, CudaView<const uint8_t, 4> frames, CudaView<const int64_t, 2> offsets,
            int pad, uintptr_t stream) {
  std::visit(
      [&](auto out) {
        const WindowShape shape = window_shape(out.shape, frames.shape, offsets.shape);
        const PixelSource source{.frames = frames.data,
                                 .stack = 1,
                                 .channels = static_cast<int>(shape.channels),
                                 .size = shape.image,
                                 .offsets = offsets.data,
                                 .pad = pad};
        const PixelTarget target{.data = out.data,
                                 .dtype = out.dtype,
                                 .channels_last = false,
                                 .shifted = true,
                                 .beyond = Beyond::kEdge,
                                 .size = shape.window};
        write_pixels(source, shape.batch, target, as_stream(stream));
      },
      out);
}

}  // namespace covr::cuda
