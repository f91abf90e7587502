// Memory for sampled batches that is used again once nobody looks at it: touching fresh pages for a 65 MB
// batch costs more than filling it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace covr {

class OutputPool : public std::enable_shared_from_this<OutputPool> {
 public:
  OutputPool() = default;
  OutputPool(const OutputPool&) = delete;
  OutputPool& operator=(const OutputPool&) = delete;
  ~OutputPool();

  uint8_t* take(int64_t bytes);                  // 64-byte aligned
  void give_back(uint8_t* data, int64_t bytes);  // keeps the most recently used few, frees the rest

 private:
  struct Block {
    uint8_t* data;
    int64_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> free_;
};

}  // namespace covr
