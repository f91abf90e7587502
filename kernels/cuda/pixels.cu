// A thread reads four neighbouring output pixels of every plane of the stack: where they come from, and which
// of them are black because they lie beyond the image, is the same in all planes and is computed once. In
// planes they are written at once, as one vector. Where channels come last they are first interleaved in
// shared memory, as bytes, so that global memory is written in vectors of 16 bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "common/division.h"
#include "pixels.h"

namespace covr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 3;  // planes whose loads are under way together
constexpr int kPlanesPerThread =
    8;  // with fewer a thread takes more packs: the start of a block has its cost
constexpr int64_t kInterleavedBytes = 24 << 10;
constexpr int64_t kMostPlanes = kInterleavedBytes / 16;

// `Count` numbers of the output as one store.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T item[kCount];
};

__device__ __forceinline__ uint8_t byte_of(uint32_t four, int i) {
  return static_cast<uint8_t>(four >> 8 * i);
}

// 2^23 + pixel i.
__device__ __forceinline__ float biased(uint32_t four, int i) {
  return __uint_as_float(__byte_perm(four, 0x4b000000u, 0x7540u + i));
}

__device__ __forceinline__ void convert(uint32_t four, Vector<uint8_t, 4>& out) {
  memcpy(&out, &four, sizeof four);
}

__device__ __forceinline__ void convert(uint32_t four, Vector<float, 4>& out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out.item[i] = biased_pixel_to_float(biased(four, i));
}

// The hardware rounds two floats in one instruction.
__device__ __forceinline__ void convert(uint32_t four, Vector<BFloat16, 4>& out) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(biased_pixel_before_rounding(biased(four, i)),
                                                     biased_pixel_before_rounding(biased(four, i + 1)));
    memcpy(out.item + i, &two, sizeof two);
  }
}

__device__ __forceinline__ void convert(uint32_t four, Vector<Float16, 4>& out) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const __half2 two = __floats2half2_rn(biased_pixel_before_rounding(biased(four, i)),
                                          biased_pixel_before_rounding(biased(four, i + 1)));
    memcpy(out.item + i, &two, sizeof two);
  }
}

// One plane of the stack in the ring. What is read from a blank one counts as zero.
struct alignas(16) Plane {
  const uint8_t* pixels;
  uint32_t keep;  // a mask
};

struct Job {
  PixelSource source;
  ImageSize size;  // of the output
  bool shifted;
  uint32_t packs_per_line, packs;  // of a plane
  uint32_t tile, tiles;            // packs of one block, and blocks of one row
  Division by_line{packs_per_line}, by_tiles{tiles}, by_channels{static_cast<uint32_t>(source.channels)};

  __device__ uint32_t plane() const { return size.height * size.width; }

  // Where the first pixel of a pack lies in its plane, in lines of the output.
  __device__ uint32_t pixel_of(uint32_t pack) const {
    const uint32_t y = by_line(pack);
    return y * size.width + 4 * (pack - y * packs_per_line);
  }

  __device__ Plane source_plane(uint32_t row, uint32_t number) const {
    const uint32_t j = by_channels(number), c = number - j * source.channels;
    const int64_t slot =
        source.plans ? stack_slot(source.plans[row], source.slots, source.stack - 1 - j) : row;
    const int64_t plane = int64_t{source.size.height} * source.size.width;
    if (slot == kBlankFrame) return {source.frames, 0};
    return {source.frames + (slot * source.channels + c) * plane, 0xffffffffu};
  }

  __device__ ImageShift shift(uint32_t row) const {
    if (!shifted) return {0, 0};
    if (source.plans) return {source.plans[row].shift_y, source.plans[row].shift_x};
    const int64_t* offset = source.offsets + 2 * int64_t{row};
    return {shift_of(offset[0], source.pad, source.size.height, size.height),
            shift_of(offset[1], source.pad, source.size.width, size.width)};
  }
};

// Four neighbouring output pixels, of which the last ones may lie outside, from any plane.
template <bool kAligned>
struct Pack;

// Rows of both sides are whole packs, and planes begin at a multiple of four bytes.
template <>
struct Pack<true> {
  WordPack at;

  __device__ Pack(int source_y, int source_x, const Job& job)
      : at(source_y, source_x, job.source.size.width) {}

  __device__ uint32_t read(const uint8_t* plane) const {
    const auto* words = reinterpret_cast<const uint32_t*>(plane) + at.word;
    const uint32_t low = __ldg(words), high = at.two ? __ldg(words + 1) : 0;
    return __byte_perm(low, high, at.select);
  }
};

template <>
struct Pack<false> {
  int at[4];

  __device__ Pack(int source_y, int source_x, const Job& job) {
    for (int i = 0; i < 4; ++i)
      at[i] = source_y * job.source.size.width + clamp_to_image(source_x + i, job.source.size.width);
  }

  __device__ uint32_t read(const uint8_t* plane) const {
    return __ldg(plane + at[0]) | __ldg(plane + at[1]) << 8 | __ldg(plane + at[2]) << 16 |
           static_cast<uint32_t>(__ldg(plane + at[3])) << 24;
  }
};

// Writes what lies interleaved in shared memory.
template <typename T, bool kAligned>
__device__ void write_tile(const uint8_t* bytes, uint32_t n, T* out) {
  if constexpr (!kAligned) {
    for (uint32_t i = threadIdx.x; i < n; i += kThreads) out[i] = pixel_to<T>(bytes[i]);
  } else if constexpr (sizeof(T) == 1) {
    for (uint32_t i = threadIdx.x * 16; i < n; i += kThreads * 16)
      *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<const uint4*>(bytes + i);
  } else {
    constexpr int kVector = 16 / sizeof(T), kWords = kVector / 4;
    for (uint32_t i = threadIdx.x * kVector; i < n; i += kThreads * kVector) {
      const auto words = *reinterpret_cast<const Vector<uint32_t, kWords>*>(bytes + i);
      Vector<Vector<T, 4>, kWords> to;
#pragma unroll
      for (int w = 0; w < kWords; ++w) convert(words.item[w], to.item[w]);
      *reinterpret_cast<Vector<Vector<T, 4>, kWords>*>(out + i) = to;
    }
  }
}

template <typename T, bool kBlack, bool kChannelsLast, bool kAligned>
__global__ void __launch_bounds__(kThreads) pixel_kernel(const Job job, T* __restrict__ out) {
  extern __shared__ Plane source_planes[];
  const uint32_t row = job.by_tiles(blockIdx.x), planes = job.source.stack * job.source.channels;
  // In whole batches: what the last one has too many reads the first plane again, and is not written.
  const uint32_t padded = (planes + kBatch - 1) / kBatch * kBatch;
  for (uint32_t q = threadIdx.x; q < padded; q += kThreads)
    source_planes[q] = job.source_plane(row, q < planes ? q : 0);
  __syncthreads();
  auto* interleaved = reinterpret_cast<uint8_t*>(source_planes + padded);

  const ImageShift shift = job.shift(row);
  const uint32_t first = (blockIdx.x - row * job.tiles) * job.tile, last = min(first + job.tile, job.packs);
  const uint32_t first_pixel = job.pixel_of(first);
  T* const image = out + int64_t{row} * planes * job.plane();
  for (uint32_t k = first + threadIdx.x; k < last; k += kThreads) {
    const int y = job.by_line(k), x = 4 * (k - y * job.packs_per_line);
    const Pack<kAligned> pack(clamp_to_image(y + shift.y, job.source.size.height), x + shift.x, job);
    uint32_t inside = 0xffffffffu;  // a mask, as `keep`
    if constexpr (kBlack) inside = bytes_inside(y + shift.y, x + shift.x, job.source.size);
    const int count = kAligned ? 4 : min(4, job.size.width - x);
    const uint32_t pixel = y * job.size.width + x;
    T* to = image + pixel;
    uint8_t* bytes = interleaved + (pixel - first_pixel) * planes;
#pragma unroll 1
    for (uint32_t q = 0; q < planes; q += kBatch) {
      uint32_t four[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        four[b] = pack.read(source_planes[q + b].pixels) & source_planes[q + b].keep & inside;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (q + b >= planes) break;
        if constexpr (kChannelsLast) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (i < count) bytes[i * planes + b] = byte_of(four[b], i);
        } else {
          Vector<T, 4> pixels;
          convert(four[b], pixels);
          if constexpr (kAligned) {
            *reinterpret_cast<Vector<T, 4>*>(to) = pixels;
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (i < count) to[i] = pixels.item[i];
          }
          to += job.plane();
        }
      }
      bytes += kBatch;
    }
  }
  if constexpr (kChannelsLast) {
    __syncthreads();
    const uint32_t pixels = job.pixel_of(last) - first_pixel;
    write_tile<T, kAligned>(interleaved, pixels * planes, image + int64_t{first_pixel} * planes);
  }
}

template <typename T, bool kBlack>
auto* kernel_for(bool channels_last, bool aligned) {
  return channels_last ? aligned ? pixel_kernel<T, kBlack, true, true> : pixel_kernel<T, kBlack, true, false>
         : aligned     ? pixel_kernel<T, kBlack, false, true>
                       : pixel_kernel<T, kBlack, false, false>;
}

void require_below(int64_t value, int64_t limit, const char* what) {
  if (value >= limit)
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(value) +
                                ": the GPU's kernel takes less than " + std::to_string(limit));
}

bool multiple_of(size_t bytes, const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

void write_images(const PixelSource& source, int64_t rows, const PixelTarget& target, cudaStream_t stream) {
  const int64_t planes = int64_t{source.stack} * source.channels;
  const int64_t plane = int64_t{target.size.height} * target.size.width;
  if (rows * planes * plane == 0) return;
  require_below(planes, kMostPlanes, "the number of channels of an image");

  // Vectors of 16 bytes everywhere, or none.
  const bool aligned = multiple_of(4, source.frames) && multiple_of(16, target.data) &&
                       source.size.width % 4 == 0 && target.size.width % 4 == 0 &&
                       (!target.channels_last || planes * plane * item_bytes(target.dtype) % 16 == 0);
  const int64_t line = ceil_div(target.size.width, 4), packs = line * target.size.height;
  int64_t tile = kThreads * std::max<int64_t>(1, kPlanesPerThread / planes);
  size_t shared_bytes = ceil_div(planes, kBatch) * kBatch * sizeof(Plane);
  if (target.channels_last) {
    tile = std::min(tile, kInterleavedBytes / (4 * planes) / 4 * 4);
    shared_bytes += tile * 4 * planes;
  }
  const int64_t tiles = ceil_div(packs, tile);
  require_below(rows * tiles, std::numeric_limits<int32_t>::max(), "the number of blocks for the batch");

  const Job job{.source = source,
                .size = target.size,
                .shifted = target.shifted,
                .packs_per_line = static_cast<uint32_t>(line),
                .packs = static_cast<uint32_t>(packs),
                .tile = static_cast<uint32_t>(tile),
                .tiles = static_cast<uint32_t>(tiles)};
  const auto launch = [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    const auto find = target.beyond == Beyond::kBlack ? &kernel_for<T, true> : &kernel_for<T, false>;
    auto* kernel = find(target.channels_last, aligned);
    kernel<<<static_cast<unsigned>(rows * tiles), kThreads, shared_bytes, stream>>>(job, out);
  };
  switch (target.dtype) {
    case DType::kFloat32:
      launch(static_cast<float*>(target.data));
      break;
    case DType::kBFloat16:
      launch(static_cast<BFloat16*>(target.data));
      break;
    case DType::kFloat16:
      launch(static_cast<Float16*>(target.data));
      break;
    default:
      launch(static_cast<uint8_t*>(target.data));
  }
  check(cudaGetLastError(), "pixel kernel");
}

}  // namespace

void write_pixels(PixelSource source, int64_t rows, PixelTarget target, cudaStream_t stream) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t frame = int64_t{source.channels} * source.size.height * source.size.width;
  const int64_t plane = int64_t{target.size.height} * target.size.width;
  const bool one_order = int64_t{source.stack} * source.channels == 1 || plane == 1;
  target.channels_last = target.channels_last && !one_order;
  require_below(frame, kMost, "the size of a frame");
  require_below(plane, kMost, "the size of an image");
  if (!target.shifted && !target.channels_last) {  // one long line: whole packs whatever the width
    source.channels = 1;
    source.size = target.size = {1, static_cast<int>(frame)};
  }
  write_images(source, rows, target, stream);
}

}  // namespace covr::cuda
