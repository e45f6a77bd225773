// Stackful coroutines on one OS thread. A switch saves the callee-saved registers and nothing else: about
// 3 ns on x86-64; elsewhere ucontext, about 300 ns.
#pragma once

#include <stddef.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace hk::sim {

// A suspended place to run on. `entry` must never return.
struct Fibre {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

constexpr size_t kStackBytes = 128 << 10;

// The index-th stack, mapped once and kept; its lowest page faults when touched.
char* stack(size_t index);

void prepare(Fibre* fibre, char* stack, void (*entry)());
void switch_to(Fibre* from, const Fibre* to);

}  // namespace hk::sim
