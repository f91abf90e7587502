// The GPU side of gather.h: one block per (row, stacked frame), the same index arithmetic as the CPU's.
//
// Frames may lie in device memory or in pinned host memory: with unified addressing the kernel reads either
// through the same pointer, the latter over the bus.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"
#include "replay/gather.h"

namespace covr {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 4;  // pixels per thread and step: one vector store

__device__ __forceinline__ void cast(uint8_t in, uint8_t& out) { out = in; }
__device__ __forceinline__ void cast(uint8_t in, float& out) { out = pixel_to<float>(in); }
__device__ __forceinline__ void cast(uint8_t in, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(pixel_to<float>(in));
}
__device__ __forceinline__ void cast(uint8_t in, __half& out) { out = __float2half_rn(pixel_to<float>(in)); }

template <typename Out>
struct alignas(sizeof(Out) * kGroup) Group {
  Out item[kGroup];
};

template <typename Out>
__global__ void gather_kernel(FrameLayout frames, const StackPlan* plans, GatherTarget target, Out* out) {
  const int64_t row = blockIdx.x / frames.stack, j = blockIdx.x % frames.stack;
  const StackPlan plan = plans[row];
  const int64_t slot = stack_slot(plan, frames.slots, frames.stack - 1 - j);
  const uint8_t* frame = slot == kBlankFrame ? nullptr : frames.data + slot * frames.frame_bytes();
  const int64_t plane = target.out_height * target.out_width;
  const int64_t items = frames.channels * plane;
  Out* row_out = out + row * frames.stack * items;
  Out* frame_out = row_out + j * items;
  // Then every frame starts at a multiple of the group.
  const bool vector_stores = !target.channels_last && items % kGroup == 0;

  for (int64_t first = int64_t{threadIdx.x} * kGroup; first < items; first += int64_t{kThreads} * kGroup) {
    int64_t c = first / plane, y = first % plane / target.out_width, x = first % target.out_width;
    Group<Out> group;
    const int count = static_cast<int>(items - first < kGroup ? items - first : kGroup);
    for (int i = 0; i < count; ++i) {
      uint8_t pixel = 0;
      if (frame) {
        const int64_t from_y = target.shifted ? clamp_to_image(y + plan.shift_y, frames.height) : y;
        const int64_t from_x = target.shifted ? clamp_to_image(x + plan.shift_x, frames.width) : x;
        pixel = frame[(c * frames.height + from_y) * frames.width + from_x];
      }
      cast(pixel, group.item[i]);
      if (target.channels_last)
        row_out[target.position(frames, j, c, y * target.out_width + x)] = group.item[i];
      else if (!vector_stores)
        frame_out[first + i] = group.item[i];
      if (++x == target.out_width) {
        x = 0;
        if (++y == target.out_height) {
          y = 0;
          ++c;
        }
      }
    }
    if (vector_stores) *reinterpret_cast<Group<Out>*>(frame_out + first) = group;
  }
}

// Frames of other types: bytes, copied as they are.
__global__ void copy_kernel(FrameLayout frames, const StackPlan* plans, GatherTarget target, uint8_t* out) {
  const int64_t row = blockIdx.x / frames.stack, j = blockIdx.x % frames.stack;
  const int64_t slot = stack_slot(plans[row], frames.slots, frames.stack - 1 - j);
  const int64_t bytes = frames.frame_bytes(), plane = frames.plane_items(), item = frames.item_bytes;
  uint8_t* row_out = out + row * frames.stack * bytes;
  const uint8_t* frame = frames.data + (slot == kBlankFrame ? 0 : slot * bytes);
  for (int64_t n = threadIdx.x; n < bytes; n += kThreads) {
    const int64_t c = n / item / plane, i = n / item % plane;
    const int64_t to =
        target.channels_last ? target.position(frames, j, c, i) * item + n % item : j * bytes + n;
    row_out[to] = slot == kBlankFrame ? uint8_t{0} : frame[n];
  }
}

}  // namespace

void gather_cuda(const FrameLayout& frames, const StackPlan* plans, int64_t rows, const GatherTarget& target,
                 void* out, uintptr_t stream) {
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>(rows * frames.stack);
  const auto s = cuda::as_stream(stream);
  const auto launch = [&](auto* to) { gather_kernel<<<blocks, kThreads, 0, s>>>(frames, plans, target, to); };
  if (frames.item_bytes != 1) {
    copy_kernel<<<blocks, kThreads, 0, s>>>(frames, plans, target, static_cast<uint8_t*>(out));
  } else {
    switch (target.dtype) {
      case DType::kFloat32:
        launch(static_cast<float*>(out));
        break;
      case DType::kBFloat16:
        launch(static_cast<__nv_bfloat16*>(out));
        break;
      case DType::kFloat16:
        launch(static_cast<__half*>(out));
        break;
      default:
        launch(static_cast<uint8_t*>(out));
    }
  }
  cuda::check(cudaGetLastError(), "gather kernel");
}

}  // namespace covr
