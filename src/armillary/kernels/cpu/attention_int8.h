// Attention over int8 keys and values in integers: queries and softmax weights as 15-bit whole numbers of a row's largest.
//
// The products and sums are exact, so every ISA computes the same numbers; what is lost beside the cache's own rounding is
// 2^-15 of a row's largest query component and of its largest weight. With byte dot products (VNNI) a 15-bit number is
// two operands, 128 high + low, and a sum costs two of them: half of what fp32 costs.
#pragma once
#include "kv_cache.h"

namespace arm {

// Rows of `n` encoded numbers take 2 n bytes.
static inline void encode(i32x16 v, int8_t* row, int n, int at) {
#if defined(ARM_VNNI)
  const i8x16 high = __builtin_convertvector(v >> 7, i8x16), low = __builtin_convertvector(v & 127, i8x16);
  memcpy(row + at, &high, 16);
  memcpy(row + n + at, &low, 16);
#else
  // 16-bit numbers, of each four the even ones first.
  const i16x16 words = __builtin_convertvector(v, i16x16);
  const i16x16 paired = __builtin_shufflevector(words, words, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  memcpy(row + 2 * at, &paired, 32);
#endif
}

// acc + the products of 16-bit numbers, summed in pairs.
static inline i32x16 add_pairs(i32x16 acc, i32x16 a, i32x16 b) {
#if defined(ARM_VNNI)
  return (i32x16)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return acc + (i32x16)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  __m256i x[2], y[2];
  memcpy(x, &a, 64);
  memcpy(y, &b, 64);
  const __m256i products[2] = {_mm256_madd_epi16(x[0], y[0]), _mm256_madd_epi16(x[1], y[1])};
  i32x16 sum;
  memcpy(&sum, products, 64);
  return acc + sum;
#else
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// acc[r][w] = the sum over 4 `steps` numbers of row r times column w, where bytes(j, w) are those of step j: [16][4].
// kKeys: bytes are unsigned and rows signed; else (values) bytes are signed and rows are not negative.
template <int M, int W, bool kKeys, class Bytes>
static inline __attribute__((always_inline)) void dots(const int8_t* rows, int n, int steps, Bytes&& bytes, i32x16 (&acc)[M][W]) {
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) acc[r][w] = i32x16{};
#if defined(ARM_VNNI)
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const int8_t* row = rows + half * n;
    for (int j = 0; j < steps; j++, row += 4) {
      i32x16 b[W];
#pragma GCC unroll 8
      for (int w = 0; w < W; w++) memcpy(&b[w], bytes(j, w), 64);
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        const i32x16 a = splat_int(four_bytes(row + (size_t)r * 2 * n));
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) {
          const __m512i u = (__m512i)(kKeys ? b[w] : a), s = (__m512i)(kKeys ? a : b[w]);
          acc[r][w] = (i32x16)_mm512_dpbusd_epi32((__m512i)acc[r][w], u, s);
        }
      }
    }
    if (half) break;
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 8
      for (int w = 0; w < W; w++) acc[r][w] <<= 7;
  }
#else
  for (int j = 0; j < steps; j++) {
    i32x16 even[W], odd[W];
    for (int w = 0; w < W; w++) {
      i32x16 b;
      memcpy(&b, bytes(j, w), 64);
      const i16x32 words = (i16x32)b;
      even[w] = kKeys ? (b & 0x00ff00ff) : (i32x16)((words << 8) >> 8);
      odd[w] = kKeys ? ((b >> 8) & 0x00ff00ff) : (i32x16)(words >> 8);
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      const int8_t* row = rows + (size_t)r * 2 * n + 8 * j;
      const i32x16 first = splat_int(four_bytes(row)), second = splat_int(four_bytes(row + 4));
      for (int w = 0; w < W; w++) acc[r][w] = add_pairs(add_pairs(acc[r][w], even[w], first), odd[w], second);
    }
  }
#endif
}

// A register tile's queries, encoded: [M][2 head_dim]; what one unit is worth, and 128 times the sum of a row's numbers,
// which the keys' bias has added to every score.
struct EncodedQueries {
  const int8_t* q;
  const float* scale;
  const int32_t* bias;
};

constexpr int kMostQuery = 16256, kMostWeight = 32767;  // 127 x 128; both fit two operands of 7 and 8 bits

static inline void encode_query(const float* q, int d, int8_t* out, float& scale, int32_t& bias) {
  f32x16 top = {}, poison = {};
  for (int i = 0; i < d; i += 16) {
    const f32x16 v = load(q + i);
    top = vmax(top, vmax(v, -v));
    poison += v * 0.0f;
  }
  const float largest = horizontal_max(top), inverse = largest > 1e-30f ? (float)kMostQuery / largest : 0.0f;
  i32x16 sum = {};
  for (int i = 0; i < d; i += 16) {
    const i32x16 v = round_away(load(q + i) * inverse);
    encode(v, out, d, i);
    sum += v;
  }
  bias = 128 * horizontal_sum(sum);
  scale = largest * (1.0f / kMostQuery) + horizontal_sum(poison);
}

template <int M, int W>
static inline __attribute__((always_inline)) void scores_int8(const EncodedQueries& q, int d, const Chunk<uint8_t>& chunk, int tile, float (*out)[kChunk]) {
  i32x16 acc[M][W];
  dots<M, W, true>(q.q, d, d / 4, [&](int j, int w) { return chunk.keys[tile + w] + (size_t)j * 64; }, acc);
#pragma GCC unroll 8
  for (int w = 0; w < W; w++) {
    const f32x16 scale = load(chunk.key_scales[tile + w]);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) store(out[r] + 16 * (tile + w), to_float(acc[r][w] - q.bias[r]) * q.scale[r] * scale);
  }
}

// Weights times their values' scales as 15-bit numbers, [M][2 kChunk] bytes; unit[r]: what one unit of row r is worth.
template <int M>
static inline void encode_weights(float (*p)[kChunk], const Chunk<uint8_t>& chunk, int tiles, int8_t* out, float* unit) {
  for (int r = 0; r < M; r++) {
    f32x16 top = {}, poison = {};
    for (int t = 0; t < tiles; t++) {
      const f32x16 weight = load(p[r] + 16 * t);
      const f32x16 v = weight == 0.0f ? f32x16{} : weight * load(chunk.value_scales[t]);  // what it may not see may be anything
      store(p[r] + 16 * t, v);
      top = vmax(top, v);
      poison += v * 0.0f;
    }
    const float largest = horizontal_max(top), inverse = largest > 1e-30f ? (float)kMostWeight / largest : 0.0f;
    for (int t = 0; t < tiles; t++) encode(__builtin_convertvector(load(p[r] + 16 * t) * inverse + 0.5f, i32x16), out + (size_t)r * 2 * kChunk, kChunk, 16 * t);
    unit[r] = largest * (1.0f / kMostWeight) + horizontal_sum(poison);
  }
}

// out[r] = out[r] shrink[r] + the weighted values, for 16 W components from `offset` on.
template <int M, int W>
static inline __attribute__((always_inline)) void weigh_int8(const int8_t* weights, const float* unit, const Chunk<uint8_t>& chunk, int keys, int d, int offset, const float* shrink, float* out) {
  i32x16 acc[M][W];
  dots<M, W, false>(weights, kChunk, (keys + 3) / 4, [&](int j, int w) { return chunk.values[j / 4] + (size_t)(j % 4) * 4 * d + 4 * (offset + 16 * w); }, acc);
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) {
      float* to = out + (size_t)r * d + offset + 16 * w;
      store(to, load(to) * shrink[r] + to_float(acc[r][w]) * unit[r]);
    }
}

}  // namespace arm
