// What a machine's units and memory do at most: loops of one instruction (or two in turn) on registers, and a long read.
// Every function takes the best of many rounds within `seconds`.
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds of job(thread) on all threads at once, from the moment that all of them stand ready: the shortest round.
template <class Job>
double best_round(int threads, double seconds, const Job& job) {
  double best = 1e30;
  const double until = now() + seconds;
  do {
    std::atomic<int> ready{0};
    std::vector<double> begin(threads), end(threads);
    auto run = [&](int thread) {
      ready.fetch_add(1);
      while (ready.load() < threads) std::this_thread::yield();
      begin[thread] = now();
      job(thread);
      end[thread] = now();
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(run, t);
    run(0);
    for (auto& other : others) other.join();
    best = std::min(best, *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end()));
  } while (now() < until);
  return best;
}

// 14 independent chains: more than latency x units of any core, and with two operands they fit sixteen registers.
// Written as assembly, so that no compiler moves, merges or spills what is being counted.
constexpr int kChains = 14;
constexpr int64_t kSteps = 200000;
#define EACH(a, b) a "0" b a "1" b a "2" b a "3" b a "4" b a "5" b a "6" b a "7" b a "8" b a "9" b a "10" b a "11" b a "12" b a "13" b
#define MIXED(a, c, b) a "0" b c "1" b a "2" b c "3" b a "4" b c "5" b a "6" b c "7" b a "8" b c "9" b a "10" b c "11" b a "12" b c "13" b
#define SAME(a) a a a a a a a a a a a a a a
#define LOOP(body)                                                                                                                   \
  [](const void* line) {                                                                                                             \
    int64_t steps = kSteps, scratch = 0;                                                                                             \
    asm volatile("1:\n" body "dec %0\njnz 1b\n"                                                                                      \
                 : "+r"(steps), "+r"(scratch)                                                                                        \
                 : "r"(line)                                                                                                         \
                 : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
                   "xmm12", "xmm13", "xmm14", "xmm15");                                                                              \
  }

struct Loop {
  const char* name;
  const char* instruction;
  double ops;  // floating or integer operations of an instruction
  void (*run)(const void* line);
};

#if defined(__AVX512F__)
#define V "zmm"
#define LANES 16
#define AND "vpandd"
#define MOVE "vmovdqa64"
#else
#define V "ymm"
#define LANES 8
#define AND "vpand"
#define MOVE "vmovdqa"
#endif
#define THREE(op) EACH(op " %%" V "15, %%" V "14, %%" V, "\n")

const Loop kLoops[] = {
#if defined(__x86_64__)
    {"cycle", "add, each on the one before", 1, LOOP(SAME("add $1, %1\n"))},
    {"any", "nop", 0, LOOP(SAME("nop\n"))},
#endif
#if defined(__AVX2__) && defined(__FMA__)
    {"fma", "vfmadd231ps " V, 2 * LANES, LOOP(THREE("vfmadd231ps"))},
    {"mul", "vmulps " V, LANES, LOOP(THREE("vmulps"))},
    {"add", "vaddps " V, LANES, LOOP(THREE("vaddps"))},
    {"convert", "vcvtdq2ps " V, LANES, LOOP(EACH("vcvtdq2ps %%" V "15, %%" V, "\n"))},
    {"logic", AND " " V, LANES, LOOP(THREE(AND))},
    {"load", MOVE " " V ", memory", 0, LOOP(EACH(MOVE " (%2), %%" V, "\n"))},
    {"broadcast", "vbroadcastss " V ", memory", 0, LOOP(EACH("vbroadcastss (%2), %%" V, "\n"))},
#endif
#if defined(__AVX512VNNI__)
    {"dot", "vpdpbusd zmm", 8 * LANES, LOOP(THREE("vpdpbusd"))},
    {"dot, memory", "vpdpbusd zmm, memory{1to16}", 8 * LANES, LOOP(EACH("vpdpbusd (%2)%{1to16%}, %%zmm14, %%zmm", "\n"))},
    {"fma, dot", "vfmadd231ps zmm, vpdpbusd zmm in turn", 0,
     LOOP(MIXED("vfmadd231ps %%zmm15, %%zmm14, %%zmm", "vpdpbusd %%zmm15, %%zmm14, %%zmm", "\n"))},
    {"convert, dot", "vcvtdq2ps zmm, vpdpbusd zmm in turn", 0, LOOP(MIXED("vcvtdq2ps %%zmm15, %%zmm", "vpdpbusd %%zmm15, %%zmm14, %%zmm", "\n"))},
#elif defined(__AVX512BW__) || defined(__AVX2__)
    // Without vpdpbusd a product of bytes is two instructions, vpmaddubsw and vpaddw.
    {"dot", "vpmaddubsw, vpaddw " V " in turn", 4 * LANES,
     LOOP(MIXED("vpmaddubsw %%" V "15, %%" V "14, %%" V, "vpaddw %%" V "15, %%" V "14, %%" V, "\n"))},
#endif
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" {

// The i-th loop's name, null after the last.
const char* arm_loop_name(int i) { return kLoops[i].name; }
const char* arm_loop_instruction(int i) { return kLoops[i].instruction; }
double arm_loop_ops(int i) { return kLoops[i].ops; }

// Instructions a second of the i-th loop, all threads together.
double arm_loop_rate(int i, int threads, double seconds) {
  alignas(64) static const float line[16] = {};
  return (double)threads * kSteps * kChains / best_round(threads, seconds, [&](int) { kLoops[i].run(line); });
}

// Bytes/s read from `bytes` of memory on huge pages, over and over, each thread its own share; -1 without that memory.
double arm_limit_read(int threads, int64_t bytes, double seconds) {
  typedef uint64_t u64x8 __attribute__((vector_size(64)));
  constexpr size_t kPage = 2 << 20;
  const size_t size = ((size_t)bytes / threads + 511) / 512 * 512, total = size * threads + kPage;
  char* memory = (char*)mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return -1;
#if defined(MADV_HUGEPAGE)
  madvise(memory, total, MADV_HUGEPAGE);
#endif
  char* first = (char*)(((uintptr_t)memory + kPage - 1) / kPage * kPage);
  memset(first, 1, size * threads);
  const int passes = (int)std::max<int64_t>(1, 500000000 / (int64_t)(size * threads));
  double best = 0;
  for (int ahead : {0, 2048, 8192}) {  // left to the hardware, and asked for in advance
    const double taken = best_round(threads, seconds / 3, [&](int thread) {
      const char* from = first + size * thread;
      u64x8 sum[8] = {};
      for (int pass = 0; pass < passes; pass++)
        for (size_t i = 0; i < size; i += 512)
#pragma GCC unroll 8
          for (int line = 0; line < 8; line++) {
            if (ahead) __builtin_prefetch(from + i + 64 * line + ahead);
            sum[line] ^= *(const u64x8*)(from + i + 64 * line);
          }
      for (auto& s : sum) asm volatile("" : "+m"(s));
    });
    best = std::max(best, (double)size * threads * passes / taken);
  }
  munmap(memory, total);
  return best;
}

}  // extern "C"
