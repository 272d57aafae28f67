// C (+)= A B in float32 by register tiles of kTileM rows and kTileN columns, for the products of a training step.
//
// A's element (row, k) is at a[row * step + k] ("along") or at a[k * step + row] ("across"): it is broadcast, so either is read where it
// lies. B's rows of kTileN columns are vectors: a panel of B is b[k * ldb + column]. Every element of C is one sum in order of k.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace arm {

constexpr int kTileM = 6;
#if defined(__AVX512F__)
constexpr int kTileV = 4;  // vectors: 6 x 4 of 32 registers accumulate
#else
constexpr int kTileV = 1;  // 6 x 1, two registers each, of 16
#endif
constexpr int kTileN = 16 * kTileV;
constexpr int kDeep = 128;  // rows of B's panel: 32 KiB of 4 vectors

static inline int vectors_of(int columns) { return (columns + 15) / 16; }

// The first `count` lanes, 1..16; the rest are 0.
static inline f32x16 load_part(const float* p, int count) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  f32x16 v{};
  memcpy(&v, p, (size_t)count * 4);
  return v;
#endif
}
static inline void store_part(float* p, f32x16 v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  memcpy(p, &v, (size_t)count * 4);
#endif
}

// M rows, 16 V columns of which the last vector has `last` (1..16).
template <int M, int V, bool ALONG>
static inline __attribute__((always_inline)) void tile(const float* a, ptrdiff_t step, const float* b, ptrdiff_t ldb, int k, float* c, ptrdiff_t ldc,
                                                       int last, bool add) {
  f32x16 acc[M][V];
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = v + 1 < V ? load(c + r * ldc + 16 * v) : load_part(c + r * ldc + 16 * v, last);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        acc[r][v] = f32x16{};
        __builtin_prefetch(c + r * ldc + 16 * v, 1);
      }
  }
  for (int i = 0; i < k; i++) {
    f32x16 w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) w[v] = load(b + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      const f32x16 x = splat(ALONG ? a[r * step] : a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] += w[v] * x;
    }
    a += ALONG ? 1 : step;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) v + 1 < V ? store(c + r * ldc + 16 * v, acc[r][v]) : store_part(c + r * ldc + 16 * v, acc[r][v], last);
}

template <int M, bool ALONG>
static void tile_of(int columns, const float* a, ptrdiff_t step, const float* b, ptrdiff_t ldb, int k, float* c, ptrdiff_t ldc, bool add) {
  const int vectors = vectors_of(columns), last = columns - 16 * (vectors - 1);
  if constexpr (kTileV == 4) {
    if (vectors == 4) return tile<M, 4, ALONG>(a, step, b, ldb, k, c, ldc, last, add);
    if (vectors == 3) return tile<M, 3, ALONG>(a, step, b, ldb, k, c, ldc, last, add);
    if (vectors == 2) return tile<M, 2, ALONG>(a, step, b, ldb, k, c, ldc, last, add);
  }
  tile<M, 1, ALONG>(a, step, b, ldb, k, c, ldc, last, add);
}

// One tile of any 1..kTileM rows and 1..kTileN columns.
template <bool ALONG>
static inline void any_tile(int rows, int columns, const float* a, ptrdiff_t step, const float* b, ptrdiff_t ldb, int k, float* c, ptrdiff_t ldc,
                            bool add) {
  switch (rows) {
    case 6: return tile_of<6, ALONG>(columns, a, step, b, ldb, k, c, ldc, add);
    case 5: return tile_of<5, ALONG>(columns, a, step, b, ldb, k, c, ldc, add);
    case 4: return tile_of<4, ALONG>(columns, a, step, b, ldb, k, c, ldc, add);
    case 3: return tile_of<3, ALONG>(columns, a, step, b, ldb, k, c, ldc, add);
    case 2: return tile_of<2, ALONG>(columns, a, step, b, ldb, k, c, ldc, add);
    case 1: return tile_of<1, ALONG>(columns, a, step, b, ldb, k, c, ldc, add);
  }
}

// All rows of one panel of 1..kTileN columns, kDeep of its rows at a time: they stay in the L1 cache while those of A pass by.
template <bool ALONG>
static inline void panel_product(int rows, int columns, const float* a, ptrdiff_t step, const float* b, ptrdiff_t ldb, int k, float* c, ptrdiff_t ldc,
                                 bool add) {
  for (int i = 0; i < k; i += kDeep)
    for (int r = 0; r < rows; r += kTileM)
      any_tile<ALONG>(std::min(kTileM, rows - r), columns, a + (ALONG ? r * step + i : i * step + r), step, b + i * ldb, ldb, std::min(kDeep, k - i),
                      c + r * ldc, ldc, add || i > 0);
}

// r[i][j] and r[j][i] change places: blocks of 8, 4, 2 and 1 in turn.
static inline void transpose16(f32x16 r[16]) {
#define ARM_EXCHANGE(S, LOW, HIGH)             \
  for (int i = 0; i < 16; i++)                 \
    if (!(i & S)) {                            \
      const f32x16 a = r[i], b = r[i + S];     \
      r[i] = __builtin_shufflevector(a, b, LOW); \
      r[i + S] = __builtin_shufflevector(a, b, HIGH); \
    }
#define ARM_LIST(...) __VA_ARGS__
#pragma GCC unroll 16
  ARM_EXCHANGE(8, ARM_LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23), ARM_LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#pragma GCC unroll 16
  ARM_EXCHANGE(4, ARM_LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27), ARM_LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#pragma GCC unroll 16
  ARM_EXCHANGE(2, ARM_LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29), ARM_LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#pragma GCC unroll 16
  ARM_EXCHANGE(1, ARM_LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30), ARM_LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef ARM_EXCHANGE
#undef ARM_LIST
}

// A panel of B laid out [k][16 vectors_of(columns)], zeros after the last column. B's element (k, column) is at b[column * ldb + k].
static inline void pack_transposed(const float* b, ptrdiff_t ldb, int k, int columns, float* out) {
  const int vectors = vectors_of(columns), width = 16 * vectors;
  for (int v = 0; v < vectors; v++)
    for (int i = 0; i < k; i += 16) {
      const int deep = std::min(16, k - i), wide = std::min(16, columns - 16 * v);
      f32x16 r[16];
      for (int j = 0; j < 16; j++) {
        const float* p = b + (ptrdiff_t)(16 * v + j) * ldb + i;
        r[j] = j >= wide ? f32x16{} : deep == 16 ? load(p) : load_part(p, deep);
      }
      transpose16(r);
      for (int j = 0; j < deep; j++) store(out + (ptrdiff_t)(i + j) * width + 16 * v, r[j]);
    }
}

// The same of a B whose element (k, column) is at b[k * ldb + column].
static inline void pack_rows(const float* b, ptrdiff_t ldb, int k, int columns, float* out) {
  const int vectors = vectors_of(columns), last = columns - 16 * (vectors - 1);
  for (int i = 0; i < k; i++, b += ldb, out += 16 * vectors)
    for (int v = 0; v < vectors; v++) store(out + 16 * v, v + 1 < vectors ? load(b + 16 * v) : load_part(b + 16 * v, last));
}

// Memory that a thread keeps for its next call.
class Scratch {
 public:
  ~Scratch() { free(data_); }
  float* floats(size_t count) {
    if (count > size_) {
      free(data_);
      size_ = 0;
      data_ = (float*)aligned_alloc(4096, (count * 4 + 4095) / 4096 * 4096);
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace arm
