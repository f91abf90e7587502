// Pinned pages of the exact size: taken from the system, then registered with the driver.
#include <sys/mman.h>

#include <new>

#include "common/pinned.h"
#include "launch.h"

namespace covr::cuda {
namespace {

// Every device may use them, through the same pointers as the host (unified addressing).
constexpr unsigned kForAllDevices = cudaHostRegisterPortable | cudaHostRegisterMapped;

}  // namespace

PinnedPages pin_pages(int64_t bytes) {
  PinnedPages pages{nullptr, bytes, 0};
  check(cudaGetDevice(&pages.device), "cudaGetDevice");
  const auto size = static_cast<size_t>(bytes);
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  madvise(data, size, MADV_HUGEPAGE);  // fewer pages to pin and to translate; the system may decline
  const cudaError_t status = cudaHostRegister(data, size, kForAllDevices);
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be blamed for it
    munmap(data, size);
    check(status, "cudaHostRegister");
  }
  pages.data = static_cast<uint8_t*>(data);
  return pages;
}

void free_pages(const PinnedPages& pages) {
  // Errors mean that the driver is gone, at the end of the process: then nothing uses the pages.
  int current = pages.device;
  cudaGetDevice(&current);
  cudaSetDevice(pages.device);
  cudaDeviceSynchronize();
  cudaHostUnregister(pages.data);
  cudaSetDevice(current);
  cudaGetLastError();
  munmap(pages.data, static_cast<size_t>(pages.bytes));
}

}  // namespace covr::cuda
