// Counts every instruction that one call executes, exactly and on any instruction set: the processor's trap flag raises a signal
// after each instruction, and the handler notes where it stood. Linux on x86-64 only. (Emulators do not know AVX-512, and virtual
// machines often hide the hardware's counters.)
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

namespace {
uint64_t* g_counts;
uintptr_t g_base, g_size, g_last;

void stepped(int, siginfo_t*, void* context) {
  const uintptr_t at = (uintptr_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] - g_base;
  if (at < g_size && at != g_last) g_counts[at]++;  // a `rep` instruction traps at every repetition and is one all the same
  g_last = at;
}
}  // namespace

extern "C" {

// Calls multiply(weight, x, rows, y) and adds to counts[address - base] each time that the instruction at `address` is about to be executed;
// only addresses in [base, base + size) are noted. Returns 0; -1 when the handler cannot be set; -2 when a system
// call dropped the flag midway, so that the counts are short. One thread, one call at a time.
int arm_count(void (*multiply)(const void*, const float*, int32_t, float*), const void* weight, const float* x, int32_t rows, float* y, uint64_t* counts,
              uintptr_t base, uintptr_t size) {
  struct sigaction action, before;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = stepped;
  action.sa_flags = SA_SIGINFO;
  g_counts = counts, g_base = base, g_size = size, g_last = size;
  if (sigaction(SIGTRAP, &action, &before)) return -1;
  asm volatile("pushfq\norq $0x100, (%%rsp)\npopfq\n" ::: "cc", "memory");
  multiply(weight, x, rows, y);
  uint64_t flags;
  asm volatile("pushfq\nmovq (%%rsp), %0\nandq $~0x100, (%%rsp)\npopfq\n" : "=r"(flags) : : "cc", "memory");
  sigaction(SIGTRAP, &before, nullptr);
  return flags & 0x100 ? 0 : -2;
}

}  // extern "C"
