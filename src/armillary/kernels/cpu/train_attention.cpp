// Causal attention of whole sequences laid end to end, forward and backward, a query head of a sequence at a time.
//
// Rows of queries are taken in blocks; a block's scores [rows][keys] stay in the cache, so the softmax is the plain one. The backward
// pass computes them again from the row's log-sum-exp (Dao et al. 2022). Only keys up to a register tile's last row are computed.
#include <math.h>

#include "tile_product.h"

namespace arm {
namespace {

struct Shape {
  int tokens, heads, kv_heads, d;
  float scale;
  ptrdiff_t q_row() const { return (ptrdiff_t)heads * d; }
  ptrdiff_t kv_row() const { return (ptrdiff_t)kv_heads * d; }
};

// Query rows that share a pass over the keys: their scores, twice in the backward pass, take half of the L2 cache.
int block_rows(int length) { return std::min(96, std::max(24, 65536 / length / kTileM * kTileM)); }

// A head's keys or values transposed, [d][width], in panels of kTileN columns.
void pack_head(const float* x, ptrdiff_t row, int length, int d, float* out) {
  for (int p = 0; p < length; p += kTileN) pack_transposed(x + p * row, row, d, std::min(kTileN, length - p), out + (size_t)p * d);
}

// out [rows][ldc] = x [rows][d] packed^T, row r against its first `offset + r + 1` columns (what lies beyond in a tile is computed too).
void causal_scores(const float* x, ptrdiff_t row, int rows, int offset, int length, int d, const float* packed, float* out, int ldc) {
  for (int r = 0; r < rows; r += kTileM) {
    const int here = std::min(kTileM, rows - r), needed = std::min(length, offset + r + here);
    for (int p = 0; p < needed; p += kTileN) {
      const int wide = std::min(kTileN, length - p);
      any_tile<true>(here, std::min(wide, 16 * vectors_of(needed - p)), x + r * row, row, packed + (size_t)p * d, 16 * vectors_of(wide), d,
                     out + (ptrdiff_t)r * ldc + p, ldc, false);
    }
  }
}

// out [rows][d] = weights [rows][ld] y, row r over its first offset + r + 1 keys; beyond them, within a tile, weights are 0.
void causal_mix(const float* weights, int ld, int rows, int offset, int length, int d, const float* y, ptrdiff_t y_row, float* out, ptrdiff_t out_row) {
  for (int r = 0; r < rows; r += kTileM) {
    const int here = std::min(kTileM, rows - r), keys = std::min(length, offset + r + here);
    for (int j = 0; j < d; j += kTileN)
      any_tile<true>(here, std::min(kTileN, d - j), weights + (ptrdiff_t)r * ld, ld, y + j, y_row, keys, out + (ptrdiff_t)r * out_row + j, out_row, false);
  }
}

// out [length][d] += weights^T y: key i from the rows that see it; those from `offset` on are written for the first time.
// weights: [rows][ld], y: [rows][d], row r at position offset + r, a multiple of kTileM for r = 0.
void transposed_mix(const float* weights, int ld, int rows, int offset, int length, int d, const float* y, ptrdiff_t y_row, float* out, ptrdiff_t out_row) {
  for (int i = 0; i < std::min(length, offset + rows); i += kTileM) {
    const int here = std::min(kTileM, std::min(length, offset + rows) - i), first = std::max(0, i - offset);
    for (int j = 0; j < d; j += kTileN)
      any_tile<false>(here, std::min(kTileN, d - j), weights + (ptrdiff_t)first * ld + i, ld, y + first * y_row + j, y_row, rows - first,
                      out + (ptrdiff_t)i * out_row + j, out_row, i < offset);
  }
}

// Lanes 0..count-1 of v, the others 0.
f32x16 first_lanes(f32x16 v, int count) {
  if (count >= 16) return v;
  for (int i = std::max(0, count); i < 16; i++) v[i] = 0;
  return v;
}

// Scores [0, seen) of a row to weights summing to 1; zeros up to `end`. Returns the log-sum-exp of the scaled scores.
float softmax(float* row, int seen, int end, float scale) {
  f32x16 top = splat(-3e38f), total{};
  int i = 0;
  for (; i + 16 <= seen; i += 16) top = vmax(top, load(row + i) * scale);
  float peak = horizontal_max(top);
  for (; i < seen; i++) peak = std::max(peak, row[i] * scale);
  for (i = 0; i < seen; i += 16) {
    const f32x16 e = first_lanes(exp16(load(row + i) * scale - peak), seen - i);
    store(row + i, e);
    total += e;
  }
  for (; i < end; i += 16) store(row + i, f32x16{});
  const float sum = horizontal_sum(total), inverse = 1.0f / sum;
  for (i = 0; i < seen; i += 16) store(row + i, load(row + i) * inverse);
  return peak + logf(sum);
}

// One head of one sequence. q, out: this head's first row; lse: [length].
void forward(const Shape& s, int length, const float* q, const float* k, const float* v, float* out, float* lse, float* scratch) {
  const int width = (length + 15) / 16 * 16, block = block_rows(length);
  float *keys = scratch, *scores = keys + (size_t)((length + kTileN - 1) / kTileN) * kTileN * s.d;
  pack_head(k, s.kv_row(), length, s.d, keys);
  for (int r0 = 0; r0 < length; r0 += block) {
    const int rows = std::min(block, length - r0);
    causal_scores(q + r0 * s.q_row(), s.q_row(), rows, r0, length, s.d, keys, scores, width);
    for (int r = 0; r < rows; r++) lse[r0 + r] = softmax(scores + (ptrdiff_t)r * width, r0 + r + 1, std::min(width, r0 + r / kTileM * kTileM + kTileM), s.scale);
    causal_mix(scores, width, rows, r0, length, s.d, v, s.kv_row(), out + r0 * s.q_row(), s.q_row());
  }
}

// dk and dv: [length] rows of q_row(), of this query head alone.
void backward(const Shape& s, int length, const float* q, const float* k, const float* v, const float* out, const float* lse, const float* dout, float* dq,
              float* dk, float* dv, float* scratch) {
  const int width = (length + 15) / 16 * 16, block = block_rows(length);
  const size_t head = (size_t)((length + kTileN - 1) / kTileN) * kTileN * s.d;
  float *keys = scratch, *values = keys + head, *weights = values + head, *slopes = weights + (size_t)block * width;
  pack_head(k, s.kv_row(), length, s.d, keys);
  pack_head(v, s.kv_row(), length, s.d, values);
  for (int r0 = 0; r0 < length; r0 += block) {
    const int rows = std::min(block, length - r0);
    const float *queries = q + r0 * s.q_row(), *upstream = dout + r0 * s.q_row(), *made = out + r0 * s.q_row();
    causal_scores(queries, s.q_row(), rows, r0, length, s.d, keys, weights, width);
    causal_scores(upstream, s.q_row(), rows, r0, length, s.d, values, slopes, width);
    for (int r = 0; r < rows; r++) {
      float *p = weights + (ptrdiff_t)r * width, *g = slopes + (ptrdiff_t)r * width;
      f32x16 products{};
      for (int j = 0; j < s.d; j += 16) products += load(upstream + r * s.q_row() + j) * load(made + r * s.q_row() + j);
      const float delta = horizontal_sum(products);
      const int seen = r0 + r + 1, end = std::min(width, r0 + rows);
      int i = 0;
      for (; i < seen; i += 16) {
        const f32x16 e = first_lanes(exp16(load(p + i) * s.scale - lse[r0 + r]), seen - i);
        store(g + i, first_lanes(e * (load(g + i) - delta) * s.scale, seen - i));
        store(p + i, e);
      }
      for (; i < end; i += 16) store(p + i, f32x16{}), store(g + i, f32x16{});
    }
    causal_mix(slopes, width, rows, r0, length, s.d, k, s.kv_row(), dq + r0 * s.q_row(), s.q_row());
    transposed_mix(weights, width, rows, r0, length, s.d, upstream, s.q_row(), dv, s.q_row());
    transposed_mix(slopes, width, rows, r0, length, s.d, queries, s.q_row(), dk, s.q_row());
  }
}

template <class Task>
int each_head(const Shape& s, int sequences, const int64_t* lengths, int heads_packed, const Task& task, int threads) {
  int longest = 1;
  for (int i = 0; i < sequences; i++) longest = std::max(longest, (int)lengths[i]);
  const size_t size = (size_t)heads_packed * (longest + kTileN) * s.d + (size_t)2 * 96 * (longest + 16);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
    float* memory = nullptr;
    try {
      memory = scratch.floats(size);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp barrier
    if (!failed)
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < (int64_t)sequences * s.heads; i++) {
        const int sequence = (int)(i / s.heads), head = (int)(i % s.heads);
        ptrdiff_t first = 0;
        for (int j = 0; j < sequence; j++) first += lengths[j];
        if (lengths[sequence]) task((int)lengths[sequence], first, head, memory);
      }
  }
  return failed;
}

}  // namespace
}  // namespace arm

// q, out: [tokens][heads][d], k, v: [tokens][kv_heads][d], d a multiple of 16; lse: [heads][tokens]. Returns 0, or 1 when there is no memory.
extern "C" __attribute__((visibility("default"))) int arm_train_attention(int tokens, int heads, int kv_heads, int d, float scale, int sequences,
                                                                          const int64_t* lengths, const float* q, const float* k, const float* v,
                                                                          float* out, float* lse, int threads) {
  using namespace arm;
  const Shape s{tokens, heads, kv_heads, d, scale};
  return each_head(
      s, sequences, lengths, 1,
      [&](int length, ptrdiff_t first, int head, float* memory) {
        const ptrdiff_t of_q = first * s.q_row() + head * d, of_k = first * s.kv_row() + head / (heads / kv_heads) * d;
        forward(s, length, q + of_q, k + of_k, v + of_k, out + of_q, lse + (ptrdiff_t)head * tokens + first, memory);
      },
      threads);
}

// dq, dk, dv: [tokens][heads][d]; dk and dv of each query head, to be added up over the heads that share a key.
extern "C" __attribute__((visibility("default"))) int arm_train_attention_backward(int tokens, int heads, int kv_heads, int d, float scale, int sequences,
                                                                                   const int64_t* lengths, const float* q, const float* k,
                                                                                   const float* v, const float* out, const float* lse,
                                                                                   const float* dout, float* dq, float* dk, float* dv, int threads) {
  using namespace arm;
  const Shape s{tokens, heads, kv_heads, d, scale};
  return each_head(
      s, sequences, lengths, 2,
      [&](int length, ptrdiff_t first, int head, float* memory) {
        const ptrdiff_t of_q = first * s.q_row() + head * d, of_k = first * s.kv_row() + head / (heads / kv_heads) * d;
        backward(s, length, q + of_q, k + of_k, v + of_k, out + of_q, lse + (ptrdiff_t)head * tokens + first, dout + of_q, dq + of_q, dk + of_q,
                 dv + of_q, memory);
      },
      threads);
}
