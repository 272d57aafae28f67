// Sixteen lanes at a time, whatever the machine: GCC's vector types are lowered to one zmm, two ymm or four xmm
// registers. Only what GCC cannot express (byte dot products, half precision, broadcasts of 4 bytes) is written per ISA.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arm {

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef float f32x16u __attribute__((vector_size(64), aligned(4)));  // unaligned access

static inline f32x16 splat(float x) { return x - f32x16{}; }  // x + 0 would cost an addition: it turns -0 into 0
static inline i32x16 splat_int(int32_t x) { return i32x16{} + x; }
static inline f32x16 load(const float* p) { return *(const f32x16u*)p; }
static inline void store(float* p, f32x16 v) { *(f32x16u*)p = v; }
static inline f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }

// fp16 -> fp32, 16 at a time. Source: 32 bytes.
static inline f32x16 load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  f32x16 out;
  __m256 lo = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  __m256 hi = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
  memcpy(&out, &lo, 32);
  memcpy((char*)&out + 32, &hi, 32);
  return out;
#else
  // Exact for every finite half: shift the exponent in by a multiplication (subnormals included).
  f32x16 out;
  for (int i = 0; i < 16; i++) {
    uint32_t h = p[i], sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13, bits;
    float magnitude;
    memcpy(&magnitude, &rest, 4);
    magnitude *= 0x1p112f;
    if ((h & 0x7c00u) == 0x7c00u) {
      rest |= 0x7f800000u;
      memcpy(&magnitude, &rest, 4);
    }
    memcpy(&bits, &magnitude, 4);
    bits |= sign;
    memcpy((char*)&out + 4 * i, &bits, 4);
  }
  return out;
#endif
}

// fp32 -> fp16 (round to nearest even), 16 at a time.
static inline void store_half(uint16_t* p, f32x16 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 halves[2];
  memcpy(halves, &v, 64);
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; i++) {
    float x = v[i];
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu, half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal: let the adder round
      float f, magic = 0.5f;
      memcpy(&f, &magnitude, 4);
      f += magic;
      uint32_t fb, mb;
      memcpy(&fb, &f, 4);
      memcpy(&mb, &magic, 4);
      half = fb - mb;
    } else {
      half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    }
    p[i] = (uint16_t)(sign | half);
  }
#endif
}

// Halves folded on halves: a fixed tree, so that every ISA adds in the same order.
template <class Fold>
static inline float fold_lanes(f32x16 v, Fold fold) {
  const f32x8 a = fold(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  const f32x4 b = fold(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7));
  const f32x4 c = fold(b, __builtin_shufflevector(b, b, 2, 3, 2, 3));
  return fold(c, __builtin_shufflevector(c, c, 1, 1, 1, 1))[0];
}
static inline float horizontal_sum(f32x16 v) {
  return fold_lanes(v, [](auto x, auto y) { return x + y; });
}
static inline int32_t horizontal_sum(i32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#endif
  int32_t total = 0;
  for (int i = 0; i < 16; i++) total += v[i];
  return total;
}
static inline float horizontal_max(f32x16 v) {
  return fold_lanes(v, [](auto x, auto y) { return x > y ? x : y; });
}
// Bit i is lane i of a comparison.
static inline uint32_t lanes_of(i32x16 comparison) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)comparison);
#elif defined(__AVX2__)
  __m256 halves[2];
  memcpy(halves, &comparison, 64);
  return _mm256_movemask_ps(halves[0]) | _mm256_movemask_ps(halves[1]) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= (comparison[i] & 1u) << i;
  return bits;
#endif
}
static inline f32x16 vmax(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
static inline bool all_finite(f32x16 v) {
  const i32x16 exponent = (i32x16)v & 0x7f800000;
#if defined(__AVX512F__)
  return _mm512_cmpneq_epi32_mask((__m512i)exponent, _mm512_set1_epi32(0x7f800000)) == 0xffff;
#endif
  return horizontal_sum(exponent == 0x7f800000) == 0;
}
static inline i32x16 round_away(f32x16 v) { return __builtin_convertvector(v + (v < 0.0f ? splat(-0.5f) : splat(0.5f)), i32x16); }
static inline f32x16 vmin(f32x16 a, f32x16 b) { return a < b ? a : b; }

// e^x to about 1 ulp for x in [-87, 88]; below, 0 within the smallest normal. Cephes' polynomial.
static inline f32x16 exp16(f32x16 x) {
  x = vmin(splat(88.3f), vmax(splat(-87.3f), x));  // in this order NaN stays NaN
  f32x16 t = x * 1.44269504088896341f;
  i32x16 n = __builtin_convertvector(t + (t < 0.0f ? splat(-0.5f) : splat(0.5f)), i32x16);
  f32x16 fn = __builtin_convertvector(n, f32x16);
  f32x16 r = x - fn * 0.693359375f;
  r = r - fn * -2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  i32x16 e = (n + 127) << 23;
  f32x16 scale;
  memcpy(&scale, &e, 64);
  return p * scale;
}

// ---- Byte dot products: 16 columns x 32 consecutive k, unsigned weights x signed activations ----
// w[j] holds, for each of 16 columns, the 4 weights of k = 4j..4j+3; a points at 32 int8 activations.

struct Group {
  u8x64 w[8];
};

#if defined(__AVX512VNNI__)
#define ARM_VNNI 1
#endif

typedef int32_t int32_aliased __attribute__((may_alias, aligned(1)));
static inline int32_t four_bytes(const int8_t* a) {
  int32_t x;
  memcpy(&x, a, 4);
  return x;
}

#if !defined(__AVX2__)
// Never inlined: unrolled into every tile, its 512 products were most of what there was to compile.
static __attribute__((noinline)) i32x16 dot_bytes(const Group& g, const int8_t* a, int32_t init) {
  i32x16 acc = splat_int(init);
  for (int j = 0; j < 8; j++)
    for (int c = 0; c < 16; c++)
      for (int t = 0; t < 4; t++) acc[c] += (int32_t)g.w[j][4 * c + t] * (int32_t)a[4 * j + t];
  return acc;
}
#endif

// Exact for any unsigned weights in 0..15 and activations in -127..127.
static inline i32x16 dot_u4(const Group& g, const int8_t* a, int32_t init) {
#if defined(ARM_VNNI)
  i32x16 acc = splat_int(init);
  // In assembler, for the broadcast as part of the instruction: GCC would load it apart, and Zen 5 was measured to take
  // two products a cycle with it and one and a half with a load beside each.
  for (int j = 0; j < 8; j++) asm("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(acc) : "m"(*(const int32_aliased*)(a + 4 * j)), "v"(g.w[j]));
  return acc;
#elif defined(__AVX512BW__)
  // One step is at most 15*127*2 = 3,810; eight are 30,480 < 32,767: no saturation before the widening.
  __m512i acc = _mm512_setzero_si512();
  for (int j = 0; j < 8; j++)
    acc = _mm512_add_epi16(acc, _mm512_maddubs_epi16((__m512i)g.w[j], _mm512_set1_epi32(four_bytes(a + 4 * j))));
  return (i32x16)_mm512_add_epi32(_mm512_madd_epi16(acc, _mm512_set1_epi16(1)), _mm512_set1_epi32(init));
#elif defined(__AVX2__)
  __m256i lo = _mm256_setzero_si256(), hi = lo, ones = _mm256_set1_epi16(1);
  for (int j = 0; j < 8; j++) {
    __m256i half[2], x = _mm256_set1_epi32(four_bytes(a + 4 * j));
    memcpy(half, &g.w[j], 64);
    lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(half[0], x));
    hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(half[1], x));
  }
  __m256i out[2] = {_mm256_madd_epi16(lo, ones), _mm256_madd_epi16(hi, ones)};
  i32x16 result;
  memcpy(&result, out, 64);
  return result + init;
#else
  return dot_bytes(g, a, init);
#endif
}

// Exact for any unsigned weights in 0..255 and activations in -127..127.
static inline i32x16 dot_u8(const Group& g, const int8_t* a, int32_t init) {
#if defined(ARM_VNNI)
  return dot_u4(g, a, init);  // vpdpbusd does not saturate
#elif defined(__AVX512BW__)
  // vpmaddubsw would saturate: even and odd bytes go through the 16-bit product instead.
  __m512i acc = _mm512_set1_epi32(init), low = _mm512_set1_epi16(0xff);
  for (int j = 0; j < 8; j++) {
    __m512i x = _mm512_set1_epi32(four_bytes(a + 4 * j)), w = (__m512i)g.w[j];
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_and_si512(w, low), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8)));
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8)));
  }
  return (i32x16)acc;
#elif defined(__AVX2__)
  __m256i acc[2] = {_mm256_set1_epi32(init), _mm256_set1_epi32(init)}, low = _mm256_set1_epi16(0xff);
  for (int j = 0; j < 8; j++) {
    __m256i half[2], x = _mm256_set1_epi32(four_bytes(a + 4 * j));
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
    memcpy(half, &g.w[j], 64);
    for (int h = 0; h < 2; h++) {
      acc[h] = _mm256_add_epi32(acc[h], _mm256_madd_epi16(_mm256_and_si256(half[h], low), even));
      acc[h] = _mm256_add_epi32(acc[h], _mm256_madd_epi16(_mm256_srli_epi16(half[h], 8), odd));
    }
  }
  i32x16 result;
  memcpy(&result, acc, 64);
  return result;
#else
  return dot_bytes(g, a, init);
#endif
}

}  // namespace arm
