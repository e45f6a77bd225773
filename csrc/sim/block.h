// Runs a grid of blocks, one block after the other, threads as fibres: a thread runs until it waits for
// others (a collective), then the next one does.
//
// A collective is reached by all lanes of a warp (or all threads of the block) at the same place in the
// source; anything else is reported as divergent. The first fault ends the launch, and its report becomes
// the error that launch_status returns.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "device/at.cuh"
#include "sim/language.h"
#include "sim/memory.h"

namespace hk::sim {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 99 << 10;  // of sm_120, the least that is built for
constexpr int kMultiprocessors = 2;           // of the device that launchers are told about: small, so grids stay small

using Body = void (*)(const void* closure);
void run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body, const void* closure);

template <class Closure>
void run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const Closure& closure) {
  run_grid(kernel, grid, block, shared_bytes, [](const void* c) { (*static_cast<const Closure*>(c))(); }, &closure);
}

// The report of the last launch's first fault; "" when it had none. Clears it.
const char* take_fault();

// Ends the current launch with a report: "<kernel>: <what> at <file>:<line>, block (x, y, z), thread t<more>".
[[noreturn]] void fault(At at, const char* format, ...) __attribute__((format(printf, 2, 3)));

int current_thread();
Stamp current_stamp();
uint64_t current_block();  // differs between any two blocks of a process

SharedMemory& dynamic_shared();

// --- collectives ------------------------------------------------------------------------------------

void block_barrier(At at);
void warp_barrier(At at);

// What a lane gives and gets.
struct alignas(16) Slot {
  unsigned char bytes[32];
};
// Every lane's operand, once all 32 have come. `combine`, if any, has then run once, on all slots in place.
// The slots stay until the lane's next collective.
using Combine = void (*)(Slot* slots);
const Slot* exchange(const char* what, const void* operand, size_t bytes, Combine combine, At at);

// --- cp.async ---------------------------------------------------------------------------------------

// The copy is read at once (it must be in bounds) and written at the wait that covers its group.
void async_copy(SharedMemory* to, int64_t offset, const void* from, int bytes, int valid_bytes, At at);
void async_commit();
void async_wait(int groups_left);

}  // namespace hk::sim
