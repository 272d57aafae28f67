// What stands between a decoder's products in a training step, each a single pass over memory: RMS norm, rotary embedding, SwiGLU, a transposition.
#include <math.h>
#include <omp.h>

#include "tile_product.h"

#define ARM_EXPORT extern "C" __attribute__((visibility("default")))

using namespace arm;

namespace {

// 0 from where exp16 ends: what is left there, 4e-39, would count against the largest numbers.
f32x16 sigmoid(f32x16 x) { return x < -88.3f ? f32x16{} : 1.0f / (1.0f + exp16(-x)); }

// Calls task(first, count) for every 16 numbers; count is 16 but at the end.
template <class Task>
void each_vector(int64_t size, int threads, const Task& task) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < size; i += 16) task(i, (int)std::min<int64_t>(16, size - i));
}

f32x16 take(const float* p, int count) { return count == 16 ? load(p) : load_part(p, count); }
void put(float* p, f32x16 v, int count) { count == 16 ? store(p, v) : store_part(p, v, count); }

}  // namespace

// y = x * inverse * weight, inverse = 1 / sqrt(mean(x^2) + eps).
// x, y: [rows][d], weight: [d], inverse: [rows]. d is a multiple of 16.
ARM_EXPORT void arm_train_norm(int64_t rows, int d, float eps, const float* x, const float* weight, float* y, float* inverse, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const float* from = x + r * d;
    f32x16 squares[2] = {};
    for (int j = 0; j < d; j += 16) squares[j / 16 % 2] += load(from + j) * load(from + j);
    const float scale = 1.0f / sqrtf(horizontal_sum(squares[0] + squares[1]) / d + eps);
    inverse[r] = scale;
    for (int j = 0; j < d; j += 16) store(y + r * d + j, load(from + j) * scale * load(weight + j));
  }
}

// dx, and dweight [d] summed in an order that depends on the number of threads alone; partial: scratch [threads][d].
ARM_EXPORT void arm_train_norm_backward(int64_t rows, int d, const float* x, const float* weight, const float* inverse, const float* dy, float* dx,
                                        float* dweight, float* partial, int threads) {
#pragma omp parallel num_threads(threads)
  {
    float* mine = partial + (ptrdiff_t)omp_get_thread_num() * d;
    memset(mine, 0, (size_t)d * 4);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      const float *from = x + r * d, *slope = dy + r * d;
      f32x16 total{};
      for (int j = 0; j < d; j += 16) {
        const f32x16 normed = load(from + j) * inverse[r], g = load(slope + j);
        total += g * load(weight + j) * normed;
        store(mine + j, load(mine + j) + g * normed);
      }
      const float mean = horizontal_sum(total) / d;
      for (int j = 0; j < d; j += 16)
        store(dx + r * d + j, (load(slope + j) * load(weight + j) - load(from + j) * (inverse[r] * mean)) * inverse[r]);
    }
#pragma omp for schedule(static)
    for (int j = 0; j < d; j += 16) {
      f32x16 sum{};
      for (int i = 0; i < omp_get_num_threads(); i++) sum += load(partial + (ptrdiff_t)i * d + j);
      store(dweight + j, sum);
    }
  }
}

// out = x * cos + swap_halves(x * sin): with `transposed` false the sines are those of the result's place (the rotation of rope.py), with
// true those of the source's (its transpose, the backward pass). x, out: [tokens][heads][d], cos, sin: [tokens][d]; d a multiple of 32.
ARM_EXPORT void arm_train_rope(int64_t tokens, int heads, int d, const float* x, const float* cosines, const float* sines, float* out, int transposed,
                               int threads) {
  const int half = d / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < tokens; t++) {
    const float *c = cosines + t * d, *s = sines + t * d;
    for (int h = 0; h < heads; h++) {
      const float* from = x + (t * heads + h) * d;
      float* to = out + (t * heads + h) * d;
      for (int j = 0; j < half; j += 16) {
        const f32x16 a = load(from + j), b = load(from + half + j), low = load(s + j), high = load(s + half + j);
        store(to + j, a * load(c + j) + b * (transposed ? high : low));
        store(to + half + j, b * load(c + half + j) + a * (transposed ? low : high));
      }
    }
  }
}

// out = silu(gate) * up.
ARM_EXPORT void arm_train_swiglu(int64_t size, const float* gate, const float* up, float* out, int threads) {
  each_vector(size, threads, [=](int64_t i, int count) {
    const f32x16 g = take(gate + i, count);
    put(out + i, g * sigmoid(g) * take(up + i, count), count);
  });
}

ARM_EXPORT void arm_train_swiglu_backward(int64_t size, const float* gate, const float* up, const float* dout, float* dgate, float* dup, int threads) {
  each_vector(size, threads, [=](int64_t i, int count) {
    const f32x16 g = take(gate + i, count), u = take(up + i, count), slope = take(dout + i, count), s = sigmoid(g);
    put(dgate + i, slope * u * (s * (1.0f + g * (1.0f - s))), count);
    put(dup + i, slope * (g * s), count);
  });
}

// Whether these loops are worth calling: without wide vectors torch's own are.
ARM_EXPORT int arm_train_vectors() {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
  return 1;
#else
  return 0;
#endif
}

// y[j][i] = x[i][j]. x: [rows][columns]. Sixteen rows of y are written from end to end at a time: every cache line is touched once.
ARM_EXPORT void arm_train_transpose(int64_t rows, int64_t columns, const float* x, float* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < columns; j += 16) {
    const int wide = (int)std::min<int64_t>(16, columns - j);
    for (int64_t i = 0; i < rows; i += 16) {
      const int deep = (int)std::min<int64_t>(16, rows - i);
      f32x16 block[16];
      for (int k = 0; k < 16; k++) block[k] = k < deep ? take(x + (i + k) * columns + j, wide) : f32x16{};
      transpose16(block);
      for (int k = 0; k < wide; k++) put(y + (j + k) * rows + i, block[k], deep);
    }
  }
}
