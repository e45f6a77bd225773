#include "sim/fibre.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <vector>

namespace hk::sim {

char* stack(size_t index) {
  static std::vector<char*> stacks;
  while (stacks.size() <= index) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE) != 0) abort();
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[index];
}

#ifdef __x86_64__

// rdi: where to leave the stack pointer, rsi: the one to take.
asm(R"(
.text
.type hk_sim_switch, @function
hk_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hk_sim_switch, . - hk_sim_switch
)");
extern "C" void hk_sim_switch(void** from, void* to);

void prepare(Fibre* fibre, char* stack, void (*entry)()) {
  uintptr_t* top = reinterpret_cast<uintptr_t*>(stack + kStackBytes) - 2;
  *top = reinterpret_cast<uintptr_t>(entry);  // what `ret` jumps to, with the alignment of a called function
  fibre->stack_pointer = top - 6;
}

void switch_to(Fibre* from, const Fibre* to) {
  hk_sim_switch(&from->stack_pointer, to->stack_pointer);
}

#else

void prepare(Fibre* fibre, char* stack, void (*entry)()) {
  getcontext(&fibre->context);
  fibre->context.uc_stack.ss_sp = stack;
  fibre->context.uc_stack.ss_size = kStackBytes;
  fibre->context.uc_link = nullptr;
  makecontext(&fibre->context, entry, 0);
}

void switch_to(Fibre* from, const Fibre* to) {
  swapcontext(&from->context, &to->context);
}

#endif

}  // namespace hk::sim
