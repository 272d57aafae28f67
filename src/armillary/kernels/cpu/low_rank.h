// What an adapter adds to a product W x: scale * B (A x) (LoRA, Hu et al. 2021), for batches whose rows have different
// adapters or none (Punica, Chen et al. 2023; S-LoRA, Sheng et al. 2023). Rows that share an adapter are multiplied by its A
// together; B follows where the product hands out 16 columns of a row. Everything is fp32, and a row's sums have one order
// whatever stands beside it.
#pragma once
#include "simd.h"

namespace arm {

// One projection's share of an adapter; rank 0: it has none.
struct LowRank {
  const float* a;  // [rank/16][k][16], the rank filled up with zeros
  const float* b;  // [n/16][rank][16], the columns filled up with zeros
  int32_t rank;
  float scale;
};

enum Part { PART_Q, PART_K, PART_V, PART_O, PART_GATE, PART_UP, PART_DOWN, PARTS };

static inline int padded_rank(int rank) { return (rank + 15) / 16 * 16; }

constexpr int kLowRankRows = 4;  // rows that read a panel of A together

// Rows of a batch that share an adapter.
struct LowRankRows {
  int adapter, count;
  int row[kLowRankRows];
};

// out[r] = 16 columns of A x[r]. Four sums take turns along k: one alone would wait for itself.
template <int M>
static inline void shrink(const float* a, int k, const float* const* x, f32x16* out) {
  f32x16 sum[M][4];
  for (int r = 0; r < M; r++)
    for (int j = 0; j < 4; j++) sum[r][j] = f32x16{};
  int i = 0;
  for (; i + 4 <= k; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const f32x16 w = load(a + (size_t)(i + j) * 16);
#pragma GCC unroll 4
      for (int r = 0; r < M; r++) sum[r][j] += w * splat(x[r][i + j]);
    }
  }
  for (; i < k; i++) {
    const f32x16 w = load(a + (size_t)i * 16);
#pragma GCC unroll 4
    for (int r = 0; r < M; r++) sum[r][0] += w * splat(x[r][i]);
  }
  for (int r = 0; r < M; r++) out[r] = (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
}

static inline void shrink_rows(const float* a, int k, const float* const* x, int rows, f32x16* out) {
  switch (rows) {
    case 1: return shrink<1>(a, k, x, out);
    case 2: return shrink<2>(a, k, x, out);
    case 3: return shrink<3>(a, k, x, out);
    default: return shrink<4>(a, k, x, out);
  }
}

// 16 columns of B t, where t [rank] is scale * A x. `b`: those columns' [rank][16]. Four sums as in shrink.
static inline f32x16 expand(const float* b, const float* t, int rank) {
  f32x16 sum[4] = {};
  int j = 0;
  for (; j + 4 <= rank; j += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum[i] += load(b + (size_t)(j + i) * 16) * splat(t[j + i]);
  }
  for (; j < rank; j++) sum[0] += load(b + (size_t)j * 16) * splat(t[j]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace arm
