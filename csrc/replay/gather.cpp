// The CPU side of gather.h.
#include "replay/gather.h"

#include <cstring>

namespace covr {
namespace {

// Frame after frame, channels first.
template <typename Out>
void gather_planes(const FrameLayout& frames, const StackPlan& plan, const GatherTarget& target, Out* out,
                   bool streaming) {
  const int64_t plane = target.out_plane(), items = frames.channels * plane;
  uint8_t* cut = target.shifted ? pixel_scratch(items) : nullptr;
  for (int64_t j = 0; j < frames.stack; ++j, out += items) {
    const int64_t slot = stack_slot(plan, frames.slots, frames.stack - 1 - j);
    if (slot == kBlankFrame) {
      std::memset(out, 0, static_cast<size_t>(items) * sizeof(Out));
      continue;
    }
    const uint8_t* frame = frames.data + slot * frames.frame_bytes();
    if (target.shifted)
      for (int64_t c = 0; c < frames.channels; ++c)
        cut_plane(frame + c * frames.plane_items(), frames.size(), {plan.shift_y, plan.shift_x},
                  target.beyond, target.out_size(), cut + c * plane);
    convert_pixels(target.shifted ? cut : frame, out, items, streaming);
  }
}

// All planes of the stack are interleaved as bytes first: then one contiguous span is converted.
template <typename Out>
void gather_interleaved(const FrameLayout& frames, const StackPlan& plan, const GatherTarget& target,
                        Out* out, bool streaming) {
  const int64_t plane = target.out_plane(), planes = frames.stack * frames.channels;
  uint8_t* interleaved = pixel_scratch((planes + 1) * plane);
  uint8_t* cut = interleaved + planes * plane;
  for (int64_t j = 0; j < frames.stack; ++j) {
    const int64_t slot = stack_slot(plan, frames.slots, frames.stack - 1 - j);
    for (int64_t c = 0; c < frames.channels; ++c) {
      uint8_t* to = interleaved + j * frames.channels + c;
      if (slot == kBlankFrame) {
        for (int64_t i = 0; i < plane; ++i) to[i * planes] = 0;
        continue;
      }
      const uint8_t* from = frames.data + slot * frames.frame_bytes() + c * frames.plane_items();
      if (target.shifted) {
        cut_plane(from, frames.size(), {plan.shift_y, plan.shift_x}, target.beyond, target.out_size(), cut);
        from = cut;
      }
#pragma GCC unroll 4  // a loop this short takes half as long again where its jump crosses a cache line
      for (int64_t i = 0; i < plane; ++i) to[i * planes] = from[i];
    }
  }
  convert_pixels(interleaved, out, planes * plane, streaming);
}

template <typename Out>
void gather_pixels(const FrameLayout& frames, const StackPlan& plan, const GatherTarget& target, Out* out,
                   bool streaming) {
  target.channels_last ? gather_interleaved(frames, plan, target, out, streaming)
                       : gather_planes(frames, plan, target, out, streaming);
}

// Frames of other types (vectors, float images): copied, never shifted or cast.
void gather_items(const FrameLayout& frames, const StackPlan& plan, const GatherTarget& target,
                  uint8_t* out) {
  const int64_t bytes = frames.frame_bytes(), item = frames.item_bytes, plane = frames.plane_items();
  for (int64_t j = 0; j < frames.stack; ++j) {
    const int64_t slot = stack_slot(plan, frames.slots, frames.stack - 1 - j);
    const uint8_t* source = slot == kBlankFrame ? nullptr : frames.data + slot * bytes;
    if (!target.channels_last || plane == 1) {
      uint8_t* to = out + j * bytes;
      source ? std::memcpy(to, source, static_cast<size_t>(bytes))
             : std::memset(to, 0, static_cast<size_t>(bytes));
      continue;
    }
    for (int64_t i = 0; i < plane; ++i)
      for (int64_t c = 0; c < frames.channels; ++c) {
        uint8_t* to = out + ((i * frames.stack + j) * frames.channels + c) * item;
        source ? std::memcpy(to, source + (c * plane + i) * item, static_cast<size_t>(item))
               : std::memset(to, 0, static_cast<size_t>(item));
      }
  }
}

}  // namespace

void gather_observation(const FrameLayout& frames, const StackPlan& plan, const GatherTarget& target,
                        void* out, bool streaming) {
  if (frames.item_bytes != 1) return gather_items(frames, plan, target, static_cast<uint8_t*>(out));
  switch (target.dtype) {
    case DType::kFloat32:
      return gather_pixels(frames, plan, target, static_cast<float*>(out), streaming);
    case DType::kBFloat16:
      return gather_pixels(frames, plan, target, static_cast<BFloat16*>(out), streaming);
    case DType::kFloat16:
      return gather_pixels(frames, plan, target, static_cast<Float16*>(out), streaming);
    default:
      return gather_pixels(frames, plan, target, static_cast<uint8_t*>(out), streaming);
  }
}

}  // namespace covr
