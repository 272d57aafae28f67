// y = x W^T for weights that were laid out once. Every row of the result is summed in one fixed order (k ascending),
// whatever the batch, the tile it falls in or the number of threads: results are batch-invariant by construction.
//
// Layouts (n columns padded to the tile, k padded to 32 for the integer formats):
//   F32, F16   [n/48][k][48]            one panel of 48 columns streams in order of k
//   Q8         [n/16][k/32][8][64]      unsigned bytes (weight + 128): for each of 16 columns 4 consecutive k
//   Q4, Q4M    [n/16][k/32][4][64]      low nibbles are bytes j = 0..3 of the Q8 order, high nibbles j = 4..7
//   scales     [n/16][k/32][16] fp16    weight = scale * (u - 8), scale * (u - 128), or scale * u + minimum (Q4M)
#pragma once
#include <math.h>

#include "simd.h"

namespace arm {

enum Format : int32_t { F32 = 0, F16 = 1, Q8 = 2, Q4 = 3, Q4M = 4 };

struct Weight {
  int32_t format;
  int32_t n, k;
  int32_t reserved;
  const void* data;
  const uint16_t* scales;
  const uint16_t* minimums;
  const float* bias;  // [n] or null
};

constexpr int kGroup = 32;
constexpr int kPanel = 48;

static inline int tile_width(const Weight& w) { return w.format <= F16 ? kPanel : 16; }
static inline int tiles(const Weight& w) { return (w.n + tile_width(w) - 1) / tile_width(w); }
static inline int padded_k(int k) { return (k + kGroup - 1) / kGroup * kGroup; }

// Rows of activations, as the format of the weight wants them.
struct Rows {
  const float* values;   // [rows][k], floating formats
  const int8_t* quants;  // [rows/16][k/32][16][32], integer formats; one scale a row and group of 32
  const float* scales;   // [rows/16][k/32][16]
  const int32_t* sums;   // [rows/16][k/32][16], see sum_factor; of Q4M: the bits of the fp32 sum of quants x scale
};
constexpr int kRowBlock = 16;  // rows of a block stand side by side, so that the inner loop's addresses are constants

static inline size_t group_index(int row, int group, int groups) { return ((size_t)(row / kRowBlock) * groups + group) * kRowBlock + row % kRowBlock; }
static inline int padded_rows(int rows) { return (rows + kRowBlock - 1) / kRowBlock * kRowBlock; }

// Where activations are quantised to: the arrays of Rows (or of wide.h's blocks).
struct QuantisedRows {
  int8_t* quants;
  float* scales;
  int32_t* sums;
};

// What a group's sum of quants is multiplied by, so that the dot product can start from it and a weight's offset costs
// nothing: weight = scale * (u + factor). 0 stands for Q4M, whose minimum is multiplied by the scaled sum instead.
static inline int32_t sum_factor(int32_t format) { return format == Q8 ? -128 : format == Q4 ? -8 : 0; }

// q = round(x / scale), scale = max|x| / 127 over each group of 32. (A scale that is a power of two would save one of eleven
// multiplications; it was measured to cost 0.3 % of perplexity.) Non-finite input makes the scale NaN, so that it shows in the
// result instead of vanishing.
static inline void quantise_row(const float* x, int k, int row, int32_t factor, const QuantisedRows& to) {
  const int groups = padded_k(k) / kGroup;
  for (int g = 0; g < groups; g++) {
    const size_t at = group_index(row, g, groups);
    int8_t* q = to.quants + at * kGroup;
    const float* p = x + g * kGroup;
    float padded[kGroup];
    if ((g + 1) * kGroup > k) {
      memset(padded, 0, sizeof padded);
      memcpy(padded, p, (size_t)(k - g * kGroup) * 4);
      p = padded;
    }
    const f32x16 a = load(p), b = load(p + 16);
    const bool finite = all_finite(a) & all_finite(b);
    const float biggest = finite ? horizontal_max(vmax(a < 0.0f ? -a : a, b < 0.0f ? -b : b)) : NAN;
    const float inverse = biggest > 0x1p-120f ? 127.0f / biggest : 0.0f;  // beneath it the inverse would be infinite
    // Round half away from zero, as llama.cpp's reference does.
    const i32x16 ia = finite ? round_away(a * inverse) : i32x16{}, ib = finite ? round_away(b * inverse) : i32x16{};
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    const i8x16 qa = __builtin_convertvector(ia, i8x16), qb = __builtin_convertvector(ib, i8x16);
    memcpy(q, &qa, 16);
    memcpy(q + 16, &qb, 16);
    const int32_t total = horizontal_sum(ia + ib);
    const float scale = biggest / 127.0f, scaled = scale * (float)total;
    to.scales[at] = scale;
    if (factor)
      to.sums[at] = total * factor;
    else
      memcpy(&to.sums[at], &scaled, 4);
  }
}

static inline void unpack_q4(const uint8_t* p, Group& g) {
  const u8x64* v = (const u8x64*)p;
  for (int j = 0; j < 4; j++) {
    u8x64 b = v[j];
    g.w[j] = b & (uint8_t)15;
#if defined(__AVX512BW__)
    g.w[j + 4] = (u8x64)_mm512_and_si512(_mm512_srli_epi16((__m512i)b, 4), _mm512_set1_epi8(15));
#else
    g.w[j + 4] = b >> (uint8_t)4;
#endif
  }
}

// M rows x 16 columns of an integer format.
template <int FORMAT, int M>
static inline __attribute__((always_inline)) void int_tile(const Weight& w, int tile, const Rows& x, int row, f32x16 out[M]) {
  const int groups = padded_k(w.k) / kGroup;
  const size_t base = (size_t)tile * groups;
  const uint8_t* data = (const uint8_t*)w.data + base * (FORMAT == Q8 ? 512 : 256);
  const uint16_t* scales = w.scales + base * 16;
  const uint16_t* minimums = FORMAT == Q4M ? w.minimums + base * 16 : nullptr;
  const size_t first = group_index(row, 0, groups);
  const int8_t* quants = x.quants + first * kGroup;
  const float* row_scales = x.scales + first;
  const int32_t* sums = x.sums + first;
  f32x16 acc[M];
  for (int r = 0; r < M; r++) acc[r] = f32x16{};
  for (int g = 0; g < groups; g++, quants += kRowBlock * kGroup, row_scales += kRowBlock, sums += kRowBlock) {
    Group group;
    if (row == 0) {  // as in float_tile: the first rows stream the weights
      constexpr int size = FORMAT == Q8 ? 512 : 256;
      for (int line = 0; line < size; line += 64) __builtin_prefetch(data + (size_t)g * size + 4096 + line);
      __builtin_prefetch(scales + g * 16 + 512);
      if (FORMAT == Q4M) __builtin_prefetch(minimums + g * 16 + 512);
    }
    if (FORMAT == Q8) {
      for (int j = 0; j < 8; j++) group.w[j] = ((const u8x64*)(data + (size_t)g * 512))[j];
    } else {
      unpack_q4(data + (size_t)g * 256, group);
    }
    f32x16 scale = load_half(scales + g * 16), minimum;
    if (FORMAT == Q4M) minimum = load_half(minimums + g * 16);
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) {
      const int8_t* a = quants + r * kGroup;
      const i32x16 dot = FORMAT == Q8 ? dot_u8(group, a, sums[r]) : dot_u4(group, a, FORMAT == Q4 ? sums[r] : 0);
      acc[r] += to_float(dot) * (scale * row_scales[r]);
      if (FORMAT == Q4M) acc[r] += minimum * ((const float*)sums)[r];
    }
  }
  for (int r = 0; r < M; r++) out[r] = acc[r];
}

// M rows x 48 columns of a floating format.
template <int FORMAT, int M>
static inline __attribute__((always_inline)) void float_tile(const Weight& w, int tile, const Rows& x, int row, f32x16 out[M * 3]) {
  const int k = w.k;
  const float* wf = (const float*)w.data + (size_t)tile * k * kPanel;
  const uint16_t* wh = (const uint16_t*)w.data + (size_t)tile * k * kPanel;
  const float* a = x.values + (size_t)row * k;
  // Weights are asked for before they are needed, across page borders too: the first rows stream this panel, a little ahead
  // of themselves; later rows, which find it in the cache, fetch the next panel in shares of a line a step.
  constexpr size_t bytes = kPanel * (FORMAT == F32 ? 4 : 2);
  const bool first_rows = row == 0, fetch_next = row / 8 <= (int)bytes / 64;
  const char* ahead = (const char*)w.data + (size_t)tile * k * bytes + (first_rows ? 8192 : (size_t)k * bytes + (size_t)(row / 8 - 1) * k * 64);
  // Sums of kRun products are added up, not one sum of k: its rounding error grows with the root of its length.
  constexpr int kRun = 128;
#pragma GCC unroll 24
  for (int i = 0; i < M * 3; i++) out[i] = f32x16{};
  for (int first = 0; first < k; first += kRun) {
    f32x16 acc[M * 3];
#pragma GCC unroll 24
    for (int i = 0; i < M * 3; i++) acc[i] = f32x16{};
    const int last = first + kRun < k ? first + kRun : k;
    for (int i = first; i < last; i++) {
      f32x16 w0, w1, w2;
      if (first_rows)
        for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + (size_t)i * bytes + line);
      else if (fetch_next)
        __builtin_prefetch(ahead + (size_t)i * 64, 0, 2);
      if (FORMAT == F32) {
        w0 = load(wf + (size_t)i * kPanel), w1 = load(wf + (size_t)i * kPanel + 16), w2 = load(wf + (size_t)i * kPanel + 32);
      } else {
        w0 = load_half(wh + (size_t)i * kPanel), w1 = load_half(wh + (size_t)i * kPanel + 16), w2 = load_half(wh + (size_t)i * kPanel + 32);
      }
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        f32x16 b = splat(a[(size_t)r * k + i]);
        acc[r * 3] += w0 * b;
        acc[r * 3 + 1] += w1 * b;
        acc[r * 3 + 2] += w2 * b;
      }
    }
#pragma GCC unroll 24
    for (int i = 0; i < M * 3; i++) out[i] += acc[i];
  }
}

// Calls sink(row, column, vector) for every 16 columns of `tile` and every row in [0, rows).
template <int FORMAT, int M, class Sink>
static inline void block(const Weight& w, int tile, const Rows& x, int& row, int rows, const Sink& sink) {
  constexpr int vectors = FORMAT <= F16 ? 3 : 1;
  for (; row + M <= rows; row += M) {
    f32x16 y[M * vectors];
    if constexpr (FORMAT <= F16)
      float_tile<FORMAT, M>(w, tile, x, row, y);
    else
      int_tile<FORMAT, M>(w, tile, x, row, y);
    for (int r = 0; r < M; r++)
      for (int v = 0; v < vectors; v++) sink(row + r, tile * 16 * vectors + 16 * v, y[r * vectors + v]);
  }
}

template <int FORMAT, class Sink>
static void tile_rows(const Weight& w, int tile, const Rows& x, int rows, const Sink& sink) {
  int row = 0;
  if constexpr (FORMAT > F16) block<FORMAT, 16>(w, tile, x, row, rows, sink);
  block<FORMAT, 8>(w, tile, x, row, rows, sink);
  block<FORMAT, 4>(w, tile, x, row, rows, sink);
  block<FORMAT, 2>(w, tile, x, row, rows, sink);
  block<FORMAT, 1>(w, tile, x, row, rows, sink);
}

template <class Sink>
static inline void multiply_tile(const Weight& w, int tile, const Rows& x, int rows, const Sink& sink) {
  switch (w.format) {
    case F32: return tile_rows<F32>(w, tile, x, rows, sink);
    case F16: return tile_rows<F16>(w, tile, x, rows, sink);
    case Q8: return tile_rows<Q8>(w, tile, x, rows, sink);
    case Q4: return tile_rows<Q4>(w, tile, x, rows, sink);
    case Q4M: return tile_rows<Q4M>(w, tile, x, rows, sink);
  }
}

}  // namespace arm
