// The GPU side of gather.h.
//
// Frames may lie in device memory or in pinned host memory: with unified addressing the kernels read either
// through the same pointer, the latter over the bus.
#include <stdexcept>

#include "common/division.h"
#include "pixels.h"
#include "replay/gather.h"

namespace covr {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMost = 0x7fffffff;

// Frames that are not pixels, copied as items of 1 to 16 bytes. One block per frame of a stack; its items are
// taken in the order in which they are written, channels last.
template <typename Item>
__global__ void __launch_bounds__(kThreads)
    item_kernel(FrameLayout frames, const StackPlan* plans, uint32_t items, Division by_channels,
                Division by_stack, Item* out) {
  const uint32_t stack = frames.stack, channels = frames.channels;
  const uint32_t row = by_stack(blockIdx.x), j = blockIdx.x - row * stack;
  const int64_t slot = stack_slot(plans[row], frames.slots, stack - 1 - j);
  const Item* frame = reinterpret_cast<const Item*>(frames.data) + (slot == kBlankFrame ? 0 : slot * items);
  const uint32_t plane = items / channels;
  Item* row_out = out + int64_t{row} * stack * items;
  for (uint32_t n = threadIdx.x; n < items; n += kThreads) {
    const uint32_t i = by_channels(n), c = n - i * channels;
    row_out[(int64_t{i} * stack + j) * channels + c] = slot == kBlankFrame ? Item{} : frame[c * plane + i];
  }
}

// `items` of sizeof(Item) bytes in a frame of `channels` channels.
template <typename Item>
void copy_items(FrameLayout frames, const StackPlan* plans, int64_t rows, int64_t channels, void* out,
                uintptr_t stream) {
  const int64_t items = frames.frame_bytes() / static_cast<int64_t>(sizeof(Item));
  if (items > kMost || rows * frames.stack > kMost)
    throw std::invalid_argument(
        "frames of more than 2^31 items, or as many frames in a batch, are more than "
        "the GPU's kernel takes");
  frames.channels = channels;
  item_kernel<<<static_cast<unsigned>(rows * frames.stack), kThreads, 0, cuda::as_stream(stream)>>>(
      frames, plans, static_cast<uint32_t>(items), Division(static_cast<uint32_t>(channels)),
      Division(static_cast<uint32_t>(frames.stack)), static_cast<Item*>(out));
  cuda::check(cudaGetLastError(), "gather of items");
}

template <typename Item>
bool whole(const FrameLayout& frames, const void* out) {
  const auto address = reinterpret_cast<uintptr_t>(frames.data) | reinterpret_cast<uintptr_t>(out);
  return (address | static_cast<uintptr_t>(frames.frame_bytes())) % sizeof(Item) == 0;
}

void gather_items(const FrameLayout& frames, const StackPlan* plans, int64_t rows, bool channels_last,
                  void* out, uintptr_t stream) {
  const auto copy = [&]<typename Item>(Item, int64_t channels) {
    copy_items<Item>(frames, plans, rows, channels, out, stream);
  };
  if (channels_last && frames.plane_items() > 1) {
    switch (frames.item_bytes) {
      case 2:
        return copy(uint16_t{}, frames.channels);
      case 4:
        return copy(uint32_t{}, frames.channels);
      default:
        return copy(uint64_t{}, frames.channels);
    }
  }
  // In their own order, as one channel of the widest items that fit.
  if (whole<uint4>(frames, out)) return copy(uint4{}, frames.frame_bytes() / 16);
  if (whole<uint32_t>(frames, out)) return copy(uint32_t{}, frames.frame_bytes() / 4);
  copy(uint16_t{}, frames.frame_bytes() / 2);
}

}  // namespace

void gather_cuda(const FrameLayout& frames, const StackPlan* plans, int64_t rows, const GatherTarget& target,
                 void* out, uintptr_t stream) {
  if (rows == 0 || frames.frame_bytes() == 0) return;
  if (frames.item_bytes != 1) return gather_items(frames, plans, rows, target.channels_last, out, stream);
  const cuda::PixelSource source{.frames = frames.data,
                                 .stack = static_cast<int>(frames.stack),
                                 .channels = static_cast<int>(frames.channels),
                                 .size = frames.size(),
                                 .plans = plans,
                                 .slots = frames.slots};
  const cuda::PixelTarget pixels{.data = out,
                                 .dtype = target.dtype,
                                 .channels_last = target.channels_last,
                                 .shifted = target.shifted,
                                 .beyond = target.beyond,
                                 .size = target.out_size()};
  cuda::write_pixels(source, rows, pixels, cuda::as_stream(stream));
}

}  // namespace covr
