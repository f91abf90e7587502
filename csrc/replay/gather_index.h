// Index arithmetic of the replay buffer that the CPU and the GPU share: which frame goes where, and which
// random numbers decide it. Nothing here touches memory.
#pragma once

#include "common/macros.h"

namespace covr {

// How random offsets (y, x) move the images of a batch. Where a window is drawn (shift, crop), an offset is
// its place, and the one of obs is independent of that of next_obs. Where the image is (translate), an offset
// is the image's place on black, and obs and next_obs share it.
struct Augmentation {
  int64_t range = 0;       // offsets are drawn from [0, range)
  int64_t origin = 0;      // the offset of a window that leaves the image where it is
  bool translate = false;  // the image is moved, from (0, 0)
};

// How one observation is rebuilt from its stream's ring of single frames. Frames of a stream are numbered
// 0, 1, 2, ... as they arrive; frame f lives in slot f % slots until frame f + slots replaces it.
struct StackPlan {
  int64_t stream_slot;       // first slot of the stream's ring within the whole allocation
  int64_t newest;            // number of the newest frame of the stack
  int16_t depth;             // how many older frames of the stack were stored; those before are padding
  int16_t zero_padding;      // padding is black instead of the oldest stored frame
  int16_t shift_y, shift_x;  // output pixel (y, x) reads input (y + shift_y, x + shift_x)

  COVR_HD void shift(int64_t y, int64_t x, const Augmentation& augmentation) {
    shift_y = static_cast<int16_t>(augmentation.translate ? -y : y - augmentation.origin);
    shift_x = static_cast<int16_t>(augmentation.translate ? -x : x - augmentation.origin);
  }
};

constexpr int64_t kBlankFrame = -1;

// The slot of the frame that is `age` steps older than the newest one, or kBlankFrame.
COVR_HD int64_t stack_slot(const StackPlan& plan, int64_t slots, int64_t age) {
  if (age > plan.depth) {
    if (plan.zero_padding) return kBlankFrame;
    age = plan.depth;
  }
  return plan.stream_slot + (plan.newest - age) % slots;
}

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 random bits from a
// key and a counter, so that row i of batch b is the same whoever computes it, in whatever order.
struct Random128 {
  uint32_t word[4];
};

COVR_HD Random128 philox(uint64_t key, uint64_t batch, uint32_t row, uint32_t purpose) {
  uint32_t c0 = row, c1 = purpose;
  uint32_t c2 = static_cast<uint32_t>(batch), c3 = static_cast<uint32_t>(batch >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Purposes keep the draws of one row apart.
constexpr uint32_t kDrawIndex = 0, kDrawShift = 1;

// A number in [0, n) from 64 random bits. The bias is below n / 2^64.
COVR_HD uint64_t below(uint32_t high, uint32_t low, uint64_t n) {
  const uint64_t draw = (uint64_t{high} << 32) | low;
#ifdef __CUDA_ARCH__
  return __umul64hi(draw, n);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(draw) * n) >> 64);
#endif
}

COVR_HD uint32_t below(uint32_t draw, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{draw} * n) >> 32);
}

// A number in [0, 1) with 53 bits, exact in float64.
COVR_HD double unit(uint32_t high, uint32_t low) {
  return static_cast<double>((uint64_t{high} << 32 | low) >> 11) * 0x1p-53;
}

// A number in [0, 1) with 24 bits, exact in float32.
COVR_HD float unit(uint32_t draw) { return static_cast<float>(draw >> 8) * 0x1p-24f; }

}  // namespace covr
