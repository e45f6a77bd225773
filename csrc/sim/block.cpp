#include "sim/block.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "sim/fibre.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace hk::sim {

namespace {

struct Copy {
  SharedMemory* to;
  int64_t offset;
  int bytes, group;
  char value[16];
};

struct Thread {
  Fibre fibre;
  uint3 index;
  int id = 0;
  bool done = false;
  const char* waits_for = nullptr;  // a collective's name; NULL when it can run
  At at = {};
  const uint64_t* generation = nullptr;  // moves on when the collective is complete
  uint64_t generation_seen = 0;
  std::vector<Copy> copies;
  int groups = 0;  // committed
};

// A collective in progress among `size` threads.
struct Meeting {
  uint64_t generation = 0;
  int arrived = 0;
  const char* what = nullptr;
  At at = {};
  int first = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t epoch = 1;
  int size = 0;
  Slot slots[2][kLanes];  // in turn: a lane may post again while another still reads
};

struct Machine {
  Fibre scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting block;
  uint64_t block_epoch = 1;
  uint64_t block_id = 0;
  Thread* running = nullptr;
  const char* kernel = "";
  Body body = nullptr;
  const void* closure = nullptr;
  std::unique_ptr<char[]> shared;
  size_t shared_bytes = 0;
  SharedMemory dynamic;
  bool faulted = false;
  char report[1024] = "";
};

Machine m;
std::mutex machine_in_use;

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// "hk::score_cells<0, 16, true>" of the __PRETTY_FUNCTION__ of launch<kKernel>.
std::string kernel_name(const char* function) {
  const std::string text(function), key = "kKernel = ";
  size_t begin = text.find(key);
  if (begin == std::string::npos) return text;
  begin += key.size();
  const std::string name = text.substr(begin, text.find(';', begin) - begin);
  return name.rfind("hk::", 0) == 0 ? name.substr(4) : name;
}

void write_report(At at, int thread, const char* text) {
  if (m.faulted) return;
  m.faulted = true;
  snprintf(m.report, sizeof m.report, "%s: %s at %s:%d, block (%u, %u, %u), thread %d", kernel_name(m.kernel).c_str(),
           text, base_name(at.file), at.line, blockIdx.x, blockIdx.y, blockIdx.z, thread);
}

void run_thread() {
  m.body(m.closure);
  Thread& self = *m.running;
  if (!self.copies.empty()) fault(self.at, "cp.async was never waited for");
  self.done = true;
  switch_to(&self.fibre, &m.scheduler);
}

// Blocks until everyone has come. The last to come runs on_complete and goes on at once.
template <class OnComplete>
void meet(Meeting& meeting, int size, const char* what, At at, OnComplete on_complete) {
  Thread& self = *m.running;
  self.at = at;
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.at = at;
    meeting.first = self.id;
  } else if (strcmp(meeting.what, what) != 0 || meeting.at.line != at.line || strcmp(meeting.at.file, at.file) != 0) {
    fault(at, "divergent collective: %s here, while thread %d is at %s in line %d", what, meeting.first, meeting.what,
          meeting.at.line);
  }
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.generation;
    on_complete();
    return;
  }
  self.waits_for = what;
  self.generation = &meeting.generation;
  self.generation_seen = meeting.generation;
  switch_to(&self.fibre, &m.scheduler);
}

bool can_run(const Thread& t) {
  return !t.done && (t.waits_for == nullptr || *t.generation != t.generation_seen);
}

void resume(Thread& t) {
  t.waits_for = nullptr;
  m.running = &t;
  threadIdx = t.index;
  switch_to(&m.scheduler, &t.fibre);
}

void report_stuck_threads() {
  const Thread* waiting = nullptr;
  for (const Thread& t : m.threads)
    if (!t.done && waiting == nullptr) waiting = &t;
  const int warp_begin = waiting->id / kLanes * kLanes;
  const bool of_block = waiting->generation == &m.block.generation;
  const Thread* other = nullptr;
  for (const Thread& t : m.threads)
    if ((of_block || t.id / kLanes * kLanes == warp_begin) && t.generation != waiting->generation) other = &t;
  for (const Thread& t : m.threads)
    if ((of_block || t.id / kLanes * kLanes == warp_begin) && t.done) other = &t;
  char text[400];
  if (other != nullptr && !other->done)
    snprintf(text, sizeof text, "divergent collective: %s here, while thread %d is at %s in line %d",
             waiting->waits_for, other->id, other->waits_for, other->at.line);
  else
    snprintf(text, sizeof text, "divergent collective: %s here, which thread %d has left the kernel without",
             waiting->waits_for, other ? other->id : -1);
  write_report(waiting->at, waiting->id, text);
}

void run_block() {
  const int n = static_cast<int>(m.threads.size());
  ++m.block_id;
  m.block = Meeting{};
  m.block_epoch = 1;
  m.dynamic.begin(m.shared.get(), m.shared_bytes);
  for (int i = 0; i < n; ++i) {
    Thread& t = m.threads[static_cast<size_t>(i)];
    t.id = i;
    t.done = false;
    t.waits_for = nullptr;
    t.generation = nullptr;
    t.copies.clear();
    t.groups = 0;
    const unsigned u = static_cast<unsigned>(i);
    t.index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
    prepare(&t.fibre, stack(static_cast<size_t>(i)), run_thread);
  }
  for (size_t w = 0; w < m.warps.size(); ++w) {
    m.warps[w].meeting = Meeting{};
    m.warps[w].epoch = 1;
    m.warps[w].size = n - static_cast<int>(w) * kLanes < kLanes ? n - static_cast<int>(w) * kLanes : kLanes;
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (int begin = 0; begin < n; begin += kLanes) {
      const int end = begin + m.warps[static_cast<size_t>(begin / kLanes)].size;
      for (bool warp_progress = true; warp_progress;) {
        warp_progress = false;
        for (int i = begin; i < end; ++i) {
          Thread& t = m.threads[static_cast<size_t>(i)];
          if (!can_run(t)) continue;
          warp_progress = progress = true;
          resume(t);
          if (m.faulted) return;
        }
      }
    }
  }
  for (const Thread& t : m.threads)
    if (!t.done) return report_stuck_threads();
}

}  // namespace

void run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body, const void* closure) {
  const std::lock_guard<std::mutex> lock(machine_in_use);
  if (m.faulted) return;  // a call that launches twice reports its first fault
  const unsigned threads = block.x * block.y * block.z;
  m.kernel = kernel;
  m.body = body;
  m.closure = closure;
  gridDim = grid;
  blockDim = block;
  m.threads.resize(threads);
  m.warps.resize((threads + kLanes - 1) / kLanes);
  m.shared.reset(new char[shared_bytes + 1]);
  m.shared_bytes = shared_bytes;
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > kMaxSharedBytes) {
    snprintf(m.report, sizeof m.report, "%s: launched with grid (%u, %u, %u), %u threads, %zu bytes of shared memory",
             kernel_name(kernel).c_str(), grid.x, grid.y, grid.z, threads, shared_bytes);
    m.faulted = true;
    return;
  }
  for (unsigned z = 0; z < grid.z && !m.faulted; ++z)
    for (unsigned y = 0; y < grid.y && !m.faulted; ++y)
      for (unsigned x = 0; x < grid.x && !m.faulted; ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
}

const char* take_fault() {
  if (!m.faulted) return "";
  m.faulted = false;
  return m.report;
}

void fault(At at, const char* format, ...) {
  char text[600];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  write_report(at, m.running->id, text);
  switch_to(&m.running->fibre, &m.scheduler);  // never comes back
  __builtin_unreachable();
}

int current_thread() {
  return m.running->id;
}

uint64_t current_block() {
  return m.block_id;
}

Stamp current_stamp() {
  const int id = m.running->id;
  return stamp(m.block_epoch, m.warps[static_cast<size_t>(id / kLanes)].epoch, id);
}

SharedMemory& dynamic_shared() {
  return m.dynamic;
}

void block_barrier(At at) {
  meet(m.block, static_cast<int>(m.threads.size()), "block_barrier", at, [] { ++m.block_epoch; });
}

void warp_barrier(At at) {
  Warp& warp = m.warps[static_cast<size_t>(m.running->id / kLanes)];
  meet(warp.meeting, warp.size, "warp_barrier", at, [&] { ++warp.epoch; });
}

const Slot* exchange(const char* what, const void* operand, size_t bytes, Combine combine, At at) {
  Warp& warp = m.warps[static_cast<size_t>(m.running->id / kLanes)];
  if (warp.size != kLanes) fault(at, "%s in a warp of %d lanes, expected 32", what, warp.size);
  Slot* slots = warp.slots[warp.meeting.generation % 2];
  memcpy(slots[m.running->id % kLanes].bytes, operand, bytes);
  meet(warp.meeting, kLanes, what, at, [&] {
    if (combine != nullptr) combine(slots);
  });
  return slots;
}

void async_copy(SharedMemory* to, int64_t offset, const void* from, int bytes, int valid_bytes, At at) {
  Copy copy = {to, offset, bytes, m.running->groups, {}};
  if (valid_bytes > 0) {
    check_global_read(from, valid_bytes, at);
    memcpy(copy.value, from, static_cast<size_t>(valid_bytes));
  }
  to->start_copy(offset, bytes, at);
  m.running->at = at;
  m.running->copies.push_back(copy);
}

void async_commit() {
  ++m.running->groups;
}

void async_wait(int groups_left) {
  Thread& self = *m.running;
  size_t kept = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group < self.groups - groups_left)
      copy.to->finish_copy(copy.offset, copy.value, copy.bytes);
    else
      self.copies[kept++] = copy;
  }
  self.copies.resize(kept);
}

}  // namespace hk::sim
