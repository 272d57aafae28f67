// Products of many rows with 4-bit weights, faster and not batch-invariant: a tile of weights is widened to bytes with one scale
// a column, rows have one scale for 64 numbers, and the products of such a block are summed as integers. Without it every
// 32 products end in three more instructions on the ports that multiply (measured: 68 % of the peak against 80 %).
//
// The widening rounds weights to 1/127 of their column's largest: about a tenth of the step of their 4 bits.
#pragma once
#include "gemm.h"

namespace arm {

constexpr int kWideGroups = 2;  // groups of 32 of a row that share a scale
constexpr int kWideRows = 64;   // fewer rows are not worth the widening (about 20 pay for it)
constexpr int kWideK = 8192;    // longer rows than this are multiplied group by group: a widened tile has to stay in the cache

typedef uint16_t u16x32 __attribute__((vector_size(64)));

#if defined(ARM_VNNI)
constexpr bool kHasWide = true;
#else
constexpr bool kHasWide = false;  // without vpdpbusd bytes cost twice what nibbles do
#endif

// Whether `rows` rows of this weight go this way.
static inline bool wide(const Weight& w, int rows) { return kHasWide && (w.format == Q4 || w.format == Q4M) && rows >= kWideRows && w.k <= kWideK; }

static inline int wide_blocks(int k) { return (padded_k(k) / kGroup + kWideGroups - 1) / kWideGroups; }

// The activations: quants as in Rows; one scale and -128 times the sum of the quants a block of 64.
struct WideRows {
  const int8_t* quants;  // [rows/16][k/32][16][32]
  const float* scales;   // [rows/16][k/64][16]
  const int32_t* sums;   // [rows/16][k/64][16]
};

// q = round(x / scale), scale = max|x| / 127 over a block of 64. What is not finite makes the scale NaN.
static inline void quantise_wide(const float* x, int k, int row, const QuantisedRows& to) {
  const int groups = padded_k(k) / kGroup, blocks = wide_blocks(k);
  float tail[kGroup] = {};  // the last group, padded with zeros
  if (k % kGroup) memcpy(tail, x + k / kGroup * kGroup, (size_t)(k % kGroup) * 4);
  for (int b = 0; b < blocks; b++) {
    const int first = b * kWideGroups, last = first + kWideGroups < groups ? first + kWideGroups : groups;
    const auto group = [&](int g) { return (g + 1) * kGroup > k ? tail : x + g * kGroup; };
    f32x16 top = {};
    bool finite = true;
    for (int g = first; g < last; g++) {
      const f32x16 u = load(group(g)), v = load(group(g) + 16);
      top = vmax(top, vmax(u < 0.0f ? -u : u, v < 0.0f ? -v : v));
      finite &= all_finite(u) & all_finite(v);
    }
    const float biggest = finite ? horizontal_max(top) : NAN, inverse = biggest > 0x1p-120f ? 127.0f / biggest : 0.0f;
    i32x16 sum = {};
    for (int g = first; g < last; g++) {
      typedef int8_t i8x16 __attribute__((vector_size(16)));
      int8_t* q = to.quants + group_index(row, g, groups) * kGroup;
      for (int half = 0; half < 2; half++) {
        const i32x16 rounded = finite ? round_away(load(group(g) + 16 * half) * inverse) : i32x16{};
        const i8x16 packed = __builtin_convertvector(rounded, i8x16);
        memcpy(q + 16 * half, &packed, 16);
        sum += rounded;
      }
    }
    const size_t at = group_index(row, b, blocks);
    to.scales[at] = biggest / 127.0f;
    to.sums[at] = -128 * horizontal_sum(sum);
  }
}

// One tile of 16 columns as bytes [k/32][8][64] (weight / scale + 128); returns the columns' scales.
template <int FORMAT>
static inline f32x16 widen(const Weight& w, int tile, uint8_t* bytes) {
  const int groups = padded_k(w.k) / kGroup;
  const size_t base = (size_t)tile * groups;
  const uint8_t* data = (const uint8_t*)w.data + base * 256;
  const uint16_t *scales = w.scales + base * 16, *minimums = FORMAT == Q4M ? w.minimums + base * 16 : nullptr;
  const auto magnitude = [](f32x16 v) { return v < 0.0f ? -v : v; };
  const auto lowest = [&](int g, f32x16 scale) { return FORMAT == Q4M ? load_half(minimums + g * 16) : scale * -8.0f; };
  f32x16 top = {};
  for (int g = 0; g < groups; g++) {
    const f32x16 scale = load_half(scales + g * 16), low = lowest(g, scale);
    top = vmax(top, vmax(magnitude(low), magnitude(low + scale * 15.0f)));
  }
  const f32x16 inverse = top > 0.0f ? 127.0f / top : f32x16{};
  for (int g = 0; g < groups; g++) {
    // byte = level * a + b in 8.8 fixed point; products and sums wrap around modulo 2^16 on their way to 0.5 .. 255.5.
    const f32x16 scale = load_half(scales + g * 16);
    const i32x16 a = round_away(scale * inverse * 256.0f) & 0xffff;
    const i32x16 b = (round_away(lowest(g, scale) * inverse * 256.0f) + (128 * 256 + 128)) & 0xffff;
    const u16x32 factor = (u16x32)(a | (a << 16)), offset = (u16x32)(b | (b << 16));
    Group levels;
    unpack_q4(data + (size_t)g * 256, levels);
    for (int j = 0; j < 8; j++) {
      const u16x32 pairs = (u16x32)levels.w[j], even = (pairs & (uint16_t)0xff) * factor + offset, odd = (pairs >> (uint16_t)8) * factor + offset;
      const u16x32 both = (even >> (uint16_t)8) | (odd & (uint16_t)0xff00);
      memcpy(bytes + ((size_t)g * 8 + j) * 64, &both, 64);
    }
  }
  return top * (1.0f / 127.0f);
}

#if defined(ARM_VNNI)
static inline i32x16 accumulate(i32x16 acc, const u8x64& w, const int8_t* a) {
  asm("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(acc) : "m"(*(const int32_aliased*)a), "v"(w));  // as in dot_u4
  return acc;
}
#else
static __attribute__((noinline)) i32x16 accumulate(i32x16 acc, const u8x64& w, const int8_t* a) {  // as dot_bytes
  for (int c = 0; c < 16; c++)
    for (int t = 0; t < 4; t++) acc[c] += (int32_t)w[4 * c + t] * (int32_t)a[t];
  return acc;
}
#endif

// M rows x 16 columns of a widened tile.
template <int M>
static inline void wide_tile(const uint8_t* bytes, f32x16 column_scales, int k, const WideRows& x, int row, f32x16 out[M]) {
  const int groups = padded_k(k) / kGroup, blocks = wide_blocks(k);
  const int8_t* quants = x.quants + group_index(row, 0, groups) * kGroup;
  const float* scales = x.scales + group_index(row, 0, blocks);
  const int32_t* sums = x.sums + group_index(row, 0, blocks);
  f32x16 total[M] = {};
  for (int b = 0; b < blocks; b++, scales += kRowBlock, sums += kRowBlock) {
    i32x16 acc[M];
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) acc[r] = splat_int(sums[r]);
    const int last = (b + 1) * kWideGroups < groups ? (b + 1) * kWideGroups : groups;
    for (int g = b * kWideGroups; g < last; g++, quants += kRowBlock * kGroup, bytes += 512) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        u8x64 w;
        memcpy(&w, bytes + j * 64, 64);
#pragma GCC unroll 16
        for (int r = 0; r < M; r++) acc[r] = accumulate(acc[r], w, quants + r * kGroup + 4 * j);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) total[r] += to_float(acc[r]) * scales[r];
  }
  for (int r = 0; r < M; r++) out[r] = total[r] * column_scales;
}

template <int M, class Sink>
static inline void wide_block(const uint8_t* bytes, f32x16 column_scales, int k, int tile, const WideRows& x, int& row, int rows, const Sink& sink) {
  for (; row + M <= rows; row += M) {
    f32x16 y[M];
    wide_tile<M>(bytes, column_scales, k, x, row, y);
    for (int r = 0; r < M; r++) sink(row + r, tile * 16, y[r]);
  }
}

static inline uint8_t* wide_scratch() {
  alignas(64) static thread_local uint8_t bytes[kWideK * 16];
  return bytes;
}

// As multiply_tile.
template <class Sink>
static inline void multiply_tile_wide(const Weight& w, int tile, const WideRows& x, int rows, const Sink& sink) {
  uint8_t* bytes = wide_scratch();
  const f32x16 scales = w.format == Q4M ? widen<Q4M>(w, tile, bytes) : widen<Q4>(w, tile, bytes);
  int row = 0;
  wide_block<16>(bytes, scales, w.k, tile, x, row, rows, sink);
  wide_block<4>(bytes, scales, w.k, tile, x, row, rows, sink);
  wide_block<1>(bytes, scales, w.k, tile, x, row, rows, sink);
}

}  // namespace arm
