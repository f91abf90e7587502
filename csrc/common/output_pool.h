// Memory for large results that is used again once nobody looks at it: touching fresh pages for a 65 MB batch
// costs more than filling it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace covr {

class OutputPool : public std::enable_shared_from_this<OutputPool> {
 public:
  // Unused memory beyond `idle_bytes` goes back to the system.
  explicit OutputPool(int64_t idle_bytes) : idle_bytes_(idle_bytes) {}
  OutputPool(const OutputPool&) = delete;
  OutputPool& operator=(const OutputPool&) = delete;
  ~OutputPool();

  struct Block {
    uint8_t* data;  // 64-byte aligned
    int64_t bytes;
  };

  Block take(int64_t bytes);    // a block of at least `bytes`
  void give_back(Block block);  // keeps the most recently used few, frees the rest
  void release();               // frees what nobody uses
  int64_t idle() const;         // bytes that nobody uses

 private:
  const int64_t idle_bytes_;
  mutable std::mutex mutex_;
  std::vector<Block> free_;  // the one given back last is last
};

}  // namespace covr
