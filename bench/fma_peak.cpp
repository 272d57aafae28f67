// The most fused multiply-adds that one core does: sixteen independent accumulators that never leave registers.
#include "simd.h"

extern "C" double arm_fma_flops(long rounds) {  // returns the operations done; the caller divides by the time
  using namespace arm;
  f32x16 a[16], x = splat(0.999f), y = splat(1e-3f);
  for (int i = 0; i < 16; i++) a[i] = splat((float)i);
  for (long n = 0; n < rounds; n++)
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = a[i] * x + y;
  f32x16 total = {};
  for (int i = 0; i < 16; i++) total += a[i];
  volatile float kept = horizontal_sum(total);
  (void)kept;
  return (double)rounds * 16 * 16 * 2;
}
