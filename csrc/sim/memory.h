// What kernels may touch, and what of it was written, by whom and when.
//
// Global memory: the tensors of the current call, by name; anything else is out of bounds. Scratch
// tensors start unwritten, and reading them before writing is a fault.
// Shared memory: every 2 bytes remember their last write and read as a Stamp. Two accesses by different
// threads, one a write, race unless a barrier lies between.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "device/at.cuh"
#include "hulukern/hulukern.h"

namespace hk::sim {

// --- global memory ----------------------------------------------------------------------------------

void forget_tensors();  // a new call begins
void register_tensor(const char* name, const hk_tensor& tensor);
void register_memory(const char* name, const void* data, int64_t bytes, bool written);

void check_global_read(const void* from, int bytes, At at);
void check_global_write(const void* to, int bytes, At at);

// --- shared memory ----------------------------------------------------------------------------------

// When and by whom: 26 bits of block barriers, 26 of the warp's barriers, 12 of who; 0 is never.
using Stamp = uint64_t;

Stamp stamp(uint64_t block_epoch, uint64_t warp_epoch, int thread);
// Whether everything at `before` has happened for the thread at `now`.
bool ordered(Stamp before, Stamp now);
// A stamp that is ordered before another only if both are.
Stamp join(Stamp a, Stamp b);
int thread_of(Stamp stamp);  // of several, one

struct Granule {
  Stamp write = 0, read = 0;
  int32_t write_line = 0;
  int32_t read_line = 0;
  bool in_flight = false;  // a cp.async writes it at its wait
};

constexpr int kGranule = 2;  // bytes; the narrowest element kept in shared memory

// A stretch of shared memory. Poisoned and unwritten at the start of each block.
class SharedMemory {
 public:
  // For the current block: at the first call in a block everything becomes unwritten.
  void begin(char* data, size_t bytes);

  const char* read(int64_t offset, int bytes, At at);
  char* write(int64_t offset, int bytes, At at);
  void start_copy(int64_t offset, int bytes, At at);  // cp.async
  void finish_copy(int64_t offset, const char* value, int bytes);

 private:
  void check_bounds(const char* what, int64_t offset, int bytes, At at) const;
  char* data_ = nullptr;
  size_t bytes_ = 0;
  uint64_t block_ = 0;
  std::vector<Granule> granules_;
};

}  // namespace hk::sim
