#include "sim/memory.h"

#include <string.h>

#include "cpu/status.h"
#include "sim/block.h"

namespace hk::sim {

namespace {

struct Region {
  std::string name;
  const char* begin;
  const char* end;
  bool written;               // from the start
  std::vector<bool> touched;  // per byte, when it is not
};

thread_local std::vector<Region> regions;
thread_local size_t last_region = 0;

// The region that holds the access; faults when none does.
Region& region_of(const char* what, const void* address, int bytes, At at) {
  const char* p = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0)
    fault(at, "misaligned %s of %d bytes in global memory", what, bytes);
  if (last_region < regions.size() && p >= regions[last_region].begin && p + bytes <= regions[last_region].end)
    return regions[last_region];
  for (size_t i = 0; i < regions.size(); ++i)
    if (p >= regions[i].begin && p + bytes <= regions[i].end) return regions[last_region = i];
  const Region* nearest = nullptr;
  const auto distance = [p](const Region& r) { return p < r.begin ? r.begin - p : p - r.end; };
  for (const Region& r : regions)
    if (distance(r) < 4096 && (nearest == nullptr || distance(r) < distance(*nearest))) nearest = &r;
  if (nearest != nullptr)
    fault(at, "out-of-bounds %s of %d bytes at byte %lld of %s, which has %lld", what, bytes,
          static_cast<long long>(p - nearest->begin), nearest->name.c_str(),
          static_cast<long long>(nearest->end - nearest->begin));
  fault(at, "out-of-bounds %s of %d bytes, near no tensor of the call", what, bytes);
}

}  // namespace

// What hulukern.h calls scratch.
static bool is_scratch(const char* name) {
  for (const char* scratch : {"workspace", "partial", "delta", "q_rotated", "k_rotated"})
    if (strcmp(name, scratch) == 0) return true;
  return false;
}

void forget_tensors() {
  regions.clear();
  last_region = 0;
}

void register_memory(const char* name, const void* data, int64_t bytes, bool written) {
  const char* begin = static_cast<const char*>(data);
  for (const Region& r : regions)
    if (r.name == name && r.begin == begin && r.end == begin + bytes) return;  // checked twice
  regions.push_back({name, begin, begin + bytes, written, {}});
  if (!written) regions.back().touched.resize(static_cast<size_t>(bytes));
}

void register_tensor(const char* name, const hk_tensor& t) {
  int64_t first = 0, last = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] <= 0) return;
    const int64_t reach = (t.shape[d] - 1) * t.stride[d];
    (reach < 0 ? first : last) += reach;
  }
  const int64_t size = dtype_size(t.dtype);
  register_memory(name, static_cast<const char*>(t.data) + first * size, (last - first + 1) * size, !is_scratch(name));
}

void check_global_read(const void* from, int bytes, At at) {
  const Region& region = region_of("read", from, bytes, at);
  if (region.written) return;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(from) - region.begin);
  for (int i = 0; i < bytes; ++i)
    if (!region.touched[offset + static_cast<size_t>(i)])
      fault(at, "read of unwritten memory at byte %zu of %s", offset, region.name.c_str());
}

void check_global_write(const void* to, int bytes, At at) {
  Region& region = region_of("write", to, bytes, at);
  if (region.written) return;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(to) - region.begin);
  for (int i = 0; i < bytes; ++i) region.touched[offset + static_cast<size_t>(i)] = true;
}

// Who: warp * 64 + lane + 1, with kManyLanes for several lanes of a warp, or kManyWarps.
constexpr uint64_t kManyLanes = 33, kManyWarps = 0xfff;

static uint64_t who(Stamp s) {
  return s & 0xfff;
}

Stamp stamp(uint64_t block_epoch, uint64_t warp_epoch, int thread) {
  return block_epoch << 38 | (warp_epoch & 0x3ffffff) << 12 | static_cast<uint64_t>(thread / 32 * 64 + thread % 32 + 1);
}

int thread_of(Stamp s) {
  return static_cast<int>(who(s) == kManyWarps ? 0 : who(s) / 64 * 32 + (who(s) - 1) % 64 % 32);
}

bool ordered(Stamp before, Stamp now) {
  if (before >> 38 != now >> 38) return true;
  if (who(before) == kManyWarps || who(before) / 64 != who(now) / 64) return false;
  return (who(before) == who(now) && who(before) % 64 != kManyLanes) || (before >> 12) < (now >> 12);
}

Stamp join(Stamp a, Stamp b) {
  if (ordered(a, b)) return b;
  return who(a) / 64 == who(b) / 64 ? (b & ~Stamp{0xfff}) | (who(b) / 64 * 64 + kManyLanes) : b | kManyWarps;
}

void SharedMemory::begin(char* data, size_t bytes) {
  if (block_ == current_block()) return;
  block_ = current_block();
  data_ = data;
  bytes_ = bytes;
  // A NaN as bf16 and as f32, and far out of range as an index.
  memset(data, 0xff, bytes);
  granules_.assign((bytes + kGranule - 1) / kGranule, Granule{});
}

void SharedMemory::check_bounds(const char* what, int64_t offset, int bytes, At at) const {
  if (offset < 0 || offset + bytes > static_cast<int64_t>(bytes_))
    fault(at, "out-of-bounds %s of %d bytes at byte %lld of %zu bytes of shared memory", what, bytes,
          static_cast<long long>(offset), bytes_);
  if (offset % bytes != 0)
    fault(at, "misaligned %s of %d bytes at byte %lld of shared memory", what, bytes, static_cast<long long>(offset));
}

const char* SharedMemory::read(int64_t offset, int bytes, At at) {
  check_bounds("read", offset, bytes, at);
  const Stamp now = current_stamp();
  for (int64_t g = offset / kGranule; g * kGranule < offset + bytes; ++g) {
    Granule& granule = granules_[static_cast<size_t>(g)];
    if (granule.in_flight)
      fault(at, "read of shared memory whose cp.async (line %d) was not waited for", granule.write_line);
    if (granule.write == 0) fault(at, "read of unwritten shared memory at byte %lld", static_cast<long long>(offset));
    if (!ordered(granule.write, now))
      fault(at, "race on shared memory at byte %lld: read without a barrier after the write by thread %d at line %d",
            static_cast<long long>(offset), thread_of(granule.write), granule.write_line);
    granule.read = join(granule.read, now);
    granule.read_line = at.line;
  }
  return data_ + offset;
}

char* SharedMemory::write(int64_t offset, int bytes, At at) {
  check_bounds("write", offset, bytes, at);
  const Stamp now = current_stamp();
  for (int64_t g = offset / kGranule; g * kGranule < offset + bytes; ++g) {
    Granule& granule = granules_[static_cast<size_t>(g)];
    if (granule.in_flight)
      fault(at, "write to shared memory whose cp.async (line %d) was not waited for", granule.write_line);
    if (granule.write != 0 && !ordered(granule.write, now))
      fault(at, "race on shared memory at byte %lld: write without a barrier after the write by thread %d at line %d",
            static_cast<long long>(offset), thread_of(granule.write), granule.write_line);
    if (granule.read != 0 && !ordered(granule.read, now))
      fault(at, "race on shared memory at byte %lld: write without a barrier after the read by thread %d at line %d",
            static_cast<long long>(offset), thread_of(granule.read), granule.read_line);
    granule.write = now;
    granule.write_line = at.line;
  }
  return data_ + offset;
}

void SharedMemory::start_copy(int64_t offset, int bytes, At at) {
  write(offset, bytes, at);
  for (int64_t g = offset / kGranule; g * kGranule < offset + bytes; ++g)
    granules_[static_cast<size_t>(g)].in_flight = true;
}

void SharedMemory::finish_copy(int64_t offset, const char* value, int bytes) {
  const Stamp now = current_stamp();
  for (int64_t g = offset / kGranule; g * kGranule < offset + bytes; ++g) {
    granules_[static_cast<size_t>(g)].in_flight = false;
    granules_[static_cast<size_t>(g)].write = now;
  }
  memcpy(data_ + offset, value, static_cast<size_t>(bytes));
}

}  // namespace hk::sim
