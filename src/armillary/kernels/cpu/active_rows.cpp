// A gated feed-forward layer of a few neurons: each neuron is a row of gate, of up and of down transposed, so what is read are whole rows.
// Liu et al., "Deja Vu" (ICML 2023), section 4.2.
#include <omp.h>
#include <math.h>

#include <algorithm>

#include "simd.h"

#define ARM_EXPORT extern "C" __attribute__((visibility("default")))

using namespace arm;

namespace {

enum Activation : int32_t { SILU = 0, GELU_TANH = 1, RELU = 2 };

float activate(float x, int kind) {
  if (kind == RELU) return x < 0.0f ? 0.0f : x;
  if (kind == SILU) return x / (1.0f + expf(-x));
  return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// Asks for row `next` while row b is read: rows lie apart, and the processor's own prefetcher would begin anew with each.
// d is a multiple of 16. Four sums, or every addition would wait for the one before it.
float dot(const float* a, const float* b, int d, const float* next) {
  f32x16 sums[4] = {};
  int j = 0;
  for (; j + 64 <= d; j += 64)
    for (int part = 0; part < 4; part++) {
      __builtin_prefetch(next + j + 16 * part);
      sums[part] += load(a + j + 16 * part) * load(b + j + 16 * part);
    }
  for (; j < d; j += 16) sums[0] += load(a + j) * load(b + j);
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void add_scaled(float* y, float scale, const float* x, int d, const float* next) {
  for (int j = 0; j < d; j += 16) {
    __builtin_prefetch(next + j);
    store(y + j, load(y + j) + scale * load(x + j));
  }
}

}  // namespace

// out [tokens][d] = sum over the named rows of activation(x . gate) (x . up) down. x: [tokens][d]; gate, up, down: [neurons][d]; rows: [count].
// A row that a ReLU leaves at zero for every token is read no further than its gate. partial: scratch [threads][tokens][d]; the sums' order
// depends on the number of threads alone. d is a multiple of 16.
ARM_EXPORT void arm_active_rows(int tokens, int d, int64_t count, const int32_t* rows, const float* x, const float* gate, const float* up,
                                const float* down, float* out, float* partial, int kind, int threads) {
  const int64_t size = (int64_t)tokens * d;
  int used = 1;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    if (thread == 0) used = team;
    float* mine = partial + thread * size;
    memset(mine, 0, size * 4);
    const int64_t begin = count * thread / team, end = count * (thread + 1) / team;
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = (int64_t)rows[i] * d, next = i + 1 < end ? (int64_t)rows[i + 1] * d : row;
      for (int t = 0; t < tokens; t++) {
        const float g = activate(dot(x + (int64_t)t * d, gate + row, d, gate + next), kind);
        if (g == 0.0f) continue;  // NaN is not equal to anything, and goes on
        add_scaled(mine + (int64_t)t * d, g * dot(x + (int64_t)t * d, up + row, d, up + next), down + row, d, down + next);
      }
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < size; j += 16) {
    f32x16 sum = load(partial + j);
    for (int thread = 1; thread < used; thread++) sum += load(partial + thread * size + j);
    store(out + j, sum);
  }
}
