// The last linear layer with softmax cross-entropy and its gradients, a chunk of tokens at a time.
//
// A chunk's logits stand transposed, [vocabulary][tokens]: the weight's rows are then read where they lie in all three products
// (logits = W x^T, dW += g x, dx += g^T W), and a token's softmax is a lane of vectors.
#include <math.h>
#include <omp.h>

#include "tile_product.h"

namespace arm {
namespace {

constexpr int kRows = 120;  // of the weight that a thread takes at a time: they and their logits stay in the L2 cache

struct Lanes {  // of a thread: a token's largest logit, and the sum of e^(logit - largest)
  float *peak, *sum;
};

// Takes `rows` rows of logits [rows][width] into the running softmax.
void observe(const float* logits, int rows, int width, const Lanes& to) {
  for (int t = 0; t < width; t += 16) {
    const f32x16 before = load(to.peak + t);
    f32x16 peak = before, sum{};
    for (int r = 0; r < rows; r++) peak = vmax(peak, load(logits + (ptrdiff_t)r * width + t));
    for (int r = 0; r < rows; r++) sum += exp16(load(logits + (ptrdiff_t)r * width + t) - peak);
    store(to.sum + t, load(to.sum + t) * exp16(before - peak) + sum);
    store(to.peak + t, peak);
  }
}

}  // namespace
}  // namespace arm

// x: [tokens][d], weight: [vocabulary][d], d a multiple of 16, target: [tokens], all within the vocabulary. logits: scratch of
// vocabulary * (chunk rounded up to 16). *loss is the sum over tokens; dx [tokens][d] and dweight [vocabulary][d], either null, its
// gradients, written over. The result depends on the number of threads alone. Returns 0, or 1 when there is no memory.
extern "C" __attribute__((visibility("default"))) int arm_train_cross_entropy(int tokens, int d, int vocabulary, int chunk, const float* x,
                                                                              const float* weight, const int64_t* target, float* logits, float* dx,
                                                                              float* dweight, double* loss, int threads) {
  using namespace arm;
  static thread_local Scratch scratch;
  const int most = (std::min(chunk, tokens) + 15) / 16 * 16, panels = (most + kTileN - 1) / kTileN, panels_d = (d + kTileN - 1) / kTileN;
  const size_t packed_size = (size_t)panels * kTileN * d, own = (size_t)most * d + 2 * most;
  float* memory;
  try {
    memory = scratch.floats(packed_size + (size_t)panels_d * kTileN * most + most + own * threads);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  float *columns = memory, *rows_of_x = columns + packed_size, *normaliser = rows_of_x + (size_t)panels_d * kTileN * most, *private_ones = normaliser + most;
  double total = 0;
#pragma omp parallel num_threads(threads)
  for (int first = 0; first < tokens; first += chunk) {
    const int count = std::min(chunk, tokens - first), width = (count + 15) / 16 * 16, team = omp_get_num_threads(), me = omp_get_thread_num();
    const float* rows = x + (ptrdiff_t)first * d;
    float* mine = private_ones + own * me;  // dx of this thread's share of the vocabulary [count][d], then its softmax
    const Lanes lanes{mine + (size_t)most * d, mine + (size_t)most * d + most};
#pragma omp for schedule(static)
    for (int p = 0; p < (width + kTileN - 1) / kTileN; p++)
      pack_transposed(rows + (ptrdiff_t)p * kTileN * d, d, d, std::min(kTileN, count - p * kTileN), columns + (size_t)p * kTileN * d);
    if (dweight) {
#pragma omp for schedule(static) nowait
      for (int p = 0; p < panels_d; p++)
        pack_rows(rows + p * kTileN, d, count, std::min(kTileN, d - p * kTileN), rows_of_x + (size_t)p * kTileN * count);
    }
    for (int t = 0; t < width; t++) lanes.peak[t] = -1e30f, lanes.sum[t] = 0;
#pragma omp for schedule(static)
    for (int v = 0; v < vocabulary; v += kRows) {
      const int here = std::min(kRows, vocabulary - v);
      float* block = logits + (ptrdiff_t)v * width;
      for (int p = 0; p < width; p += kTileN) {
        const int wide = std::min(kTileN, width - p);
        panel_product<true>(here, wide, weight + (ptrdiff_t)v * d, d, columns + (size_t)p * d, wide, d, block + p, width, false);
      }
      observe(block, here, width, lanes);
    }
#pragma omp for schedule(static)
    for (int t = 0; t < width; t++) {
      float peak = -1e30f, sum = 0;
      for (int i = 0; i < team; i++) peak = std::max(peak, private_ones[own * i + (size_t)most * d + t]);
      for (int i = 0; i < team; i++) {
        const float* lane = private_ones + own * i + (size_t)most * d + t;
        sum += lane[most] * exp16(splat(lane[0] - peak))[0];
      }
      normaliser[t] = peak + logf(sum);
    }
#pragma omp single
    for (int t = 0; t < count; t++) total += (double)normaliser[t] - logits[target[first + t] * width + t];
    if (!dx && !dweight) continue;
    if (dx) memset(mine, 0, (size_t)count * d * 4);
#pragma omp for schedule(static)
    for (int v = 0; v < vocabulary; v += kRows) {
      const int here = std::min(kRows, vocabulary - v);
      float* block = logits + (ptrdiff_t)v * width;
      for (int r = 0; r < here; r++)
        for (int t = 0; t < width; t += 16) store(block + (ptrdiff_t)r * width + t, exp16(load(block + (ptrdiff_t)r * width + t) - load(normaliser + t)));
      for (int t = 0; t < count; t++) {
        const int64_t row = target[first + t] - v;
        if (row >= 0 && row < here) block[row * width + t] -= 1.0f;
      }
      for (int p = 0; p < panels_d; p++) {
        const int wide = std::min(kTileN, d - p * kTileN);
        if (dweight)
          panel_product<true>(here, wide, block, width, rows_of_x + (size_t)p * kTileN * count, wide, count, dweight + (ptrdiff_t)v * d + p * kTileN, d, first > 0);
        if (dx) panel_product<false>(count, wide, block, width, weight + (ptrdiff_t)v * d + p * kTileN, d, here, mine + p * kTileN, d, true);
      }
    }
    if (dx) {
#pragma omp for schedule(static)
      for (int t = 0; t < count; t++)
        for (int j = 0; j < d; j += 16) {
          f32x16 sum{};
          for (int i = 0; i < team; i++) sum += load(private_ones + own * i + (size_t)t * d + j);
          store(dx + (ptrdiff_t)(first + t) * d + j, sum);
        }
    }
  }
  *loss = total;
  return 0;
}
