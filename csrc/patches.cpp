// Frames to embedded patches, without the patches of all frames as numbers in between.
#include <pybind11/pybind11.h>

#include <vector>

#include "common.h"
#include "parallel.h"
#include "product.h"

namespace py = pybind11;

namespace covr {
namespace {

constexpr int64_t kChannels = 3;

struct Frames {
  const uint8_t* frames;  // [batch, kChannels, height, width]
  const float* scale;     // [kChannels]: a byte's number is byte * scale - offset
  const float* offset;
  const int64_t* order;  // [tokens of a frame]: which is wanted where; null: row by row
  int64_t height, width, patch, merge;

  int64_t patches() const { return height / patch * (width / patch); }
};

// Numbers [channel, patch, patch] of the patches [begin, end) of all frames. The merge * merge patches of a
// token lie together.
COVR_CLONES void gather(float* out, const Frames& f, int64_t begin, int64_t end) {
  const int64_t of_token = f.merge * f.merge, tokens = f.width / (f.patch * f.merge), all = f.patches();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t part = i % of_token, token = i % all / of_token, at = f.order ? f.order[token] : token;
    const int64_t row = (at / tokens * f.merge + part / f.merge) * f.patch;
    const int64_t column = (at % tokens * f.merge + part % f.merge) * f.patch;
    for (int64_t c = 0; c < kChannels; ++c) {
      const uint8_t* in = f.frames + ((i / all * kChannels + c) * f.height + row) * f.width + column;
      const float scale = f.scale[c], offset = f.offset[c];
      for (int64_t y = 0; y < f.patch; ++y, in += f.width, out += f.patch)
        for (int64_t x = 0; x < f.patch; ++x) out[x] = static_cast<float>(in[x]) * scale - offset;
    }
  }
}

void embed(float* out, const Frames& f, int64_t batch, const Packed& w, int threads) {
  const int64_t all = batch * f.patches(), pieces = pieces_of(all, threads);
  parallel_for(pieces, 1, threads, [&](int64_t begin, int64_t end) {
    // Kept from call to call: fresh memory would cost a page fault every 4 KiB.
    thread_local std::vector<float> numbers;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = all * piece / pieces, last = all * (piece + 1) / pieces;
      const size_t needed = (last - first) * w.in;
      if (numbers.size() < needed) numbers.resize(needed);
      gather(numbers.data(), f, first, last);
      product(out + first * w.out, numbers.data(), last - first, w, false, 1);
    }
  });
}

}  // namespace

void bind_patches(py::module_& m) {
  m.def(
      "embed_patches",
      [](uintptr_t out, uintptr_t frames, uintptr_t scale, uintptr_t offset, uintptr_t order, int64_t batch,
         int64_t height, int64_t width, int64_t patch, int64_t merge, const Packed& w, int threads) {
        const Frames f = {reinterpret_cast<const uint8_t*>(frames),
                          reinterpret_cast<const float*>(scale),
                          reinterpret_cast<const float*>(offset),
                          reinterpret_cast<const int64_t*>(order),
                          height,
                          width,
                          patch,
                          merge};
        embed(reinterpret_cast<float*>(out), f, batch, w, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace covr
