// Keys and values in pages: where a token's are, how they are written, how a chunk of them is read.
//
// Slots come in tiles of 16, which are laid out for attention (attention.h):
//   fp32, fp16  keys [tile][kv_head][head_dim][16], so that one vector holds the same component of 16 keys and scores need
//               no horizontal sums; values [tile][kv_head][16][head_dim].
//   fp8         as these, a number being e4m3: sign, 4 bits of exponent, 3 of mantissa; up to 448, beyond which it saturates.
//   int8        keys [tile][kv_head][head_dim / 4][16][4] and values [tile][kv_head][4][head_dim][4], four numbers of a sum
//               side by side for byte dot products; a scale for each slot and head, [tile][kv_head][16]. A key's bytes are
//               biased by 128, as the unsigned operand has to be.
#pragma once
#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace arm {

constexpr int kChunk = 64;  // positions that attention takes at a time: their keys and values stay in the first-level cache
constexpr int kMaxHeadDim = 512;

enum CacheFormat : int32_t { CACHE_F32 = 0, CACHE_F16 = 1, CACHE_I8 = 2, CACHE_F8 = 3 };

struct e4m3 {
  uint8_t bits;
};

// Of a cache's element types: whether it is made fp32 before many rows use it, and whether it is multiplied in integers.
template <class T>
constexpr bool is_int8 = std::is_same_v<T, uint8_t>;
template <class T>
constexpr bool is_narrow = !is_int8<T> && sizeof(T) < 4;

struct Cache {
  void* keys;
  void* values;
  float* key_scales;  // int8 only
  float* value_scales;
  int8_t* bounds;       // of each tile's keys (page_select.h), or null: [kv_head][tile][2][head_dim], times ...
  float* bound_scales;  // ... [kv_head][tile]
  int64_t tiles;      // of the pool
  int32_t format;
  int32_t kv_heads, head_dim, block_size;
};

struct Sequence {
  const int32_t* table;  // block table
  int32_t start;         // position of its first query
  int32_t count;         // queries
  int32_t row;           // row of its first query in the flat batch
  int32_t selects;       // position of the first query that selects pages, where the model does so (page_select.h)
  int32_t dropped;       // blocks that the table has no longer, between those of the sinks and the rest (Sinks, attention.h)
};

// `position` is none of the sinks' where blocks have been dropped.
static inline size_t slot_of(const Sequence& s, int block_size, int position) {
  return (size_t)s.table[position / block_size - s.dropped] * block_size + position % block_size;
}

// Where the tile of `slot` begins, in elements of either array.
static inline size_t tile_of(const Cache& c, size_t slot, int head) { return (slot / 16 * c.kv_heads + head) * c.head_dim * 16; }

static inline f32x16 load_as_float(const float* p) { return load(p); }
static inline f32x16 load_as_float(const uint16_t* p) { return load_half(p); }

static inline f32x16 load_as_float(const e4m3* p) {
  i8x16 bytes;
  memcpy(&bytes, p, 16);
  const i32x16 code = __builtin_convertvector(bytes, i32x16), magnitude = (code & 0x7f) << 20;
  const f32x16 normal = (f32x16)(magnitude + (120 << 23)), below = (f32x16)(magnitude + (121 << 23)) - 0x1p-6f;  // no hidden bit
  const i32x16 value = magnitude < (1 << 23) ? (i32x16)below : (i32x16)normal;
  return (f32x16)((magnitude == (0x7f << 20) ? splat_int(0x7fc00000) : value) | (code & (int32_t)0x80000000));
}

// rows[i][j] becomes rows[j][i]: four perfect shuffles.
static inline void transpose(f32x16 rows[16]) {
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; stage++) {
    f32x16 next[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) rows[i] = next[i];
  }
}

static inline void store_as(float* p, f32x16 v) { store(p, v); }
static inline void store_as(uint16_t* p, f32x16 v) { store_half(p, v); }
static inline void store_as(e4m3* p, f32x16 v) {  // to nearest even
  const i32x16 sign = ((i32x16)v >> 24) & 0x80, all = (i32x16)v & 0x7fffffff;
  const f32x16 size = vmin(splat(448.0f), (f32x16)all);
  const i32x16 bits = (i32x16)size, rounded = bits + 0x7ffff + ((bits >> 20) & 1);
  const i32x16 normal = (rounded >> 20) - (120 << 3), below = (i32x16)(size + 0x1p14f) - (i32x16)splat(0x1p14f);  // the adder rounds
  const i32x16 code = (bits < ((127 - 6) << 23) ? below : normal) | sign;
  const i8x16 bytes = __builtin_convertvector(all > 0x7f800000 ? splat_int(0x7f) : code, i8x16);
  memcpy(p, &bytes, 16);
}

template <class T>
static void write_cache(const Cache& c, size_t slot, int count, int head, const float* keys, const float* values, size_t stride) {
  const int d = c.head_dim;
  const size_t tile = tile_of(c, slot, head), lane = slot % 16;
  T *to = (T*)c.keys + tile, *rows = (T*)c.values + tile + lane * d;
  for (int i = 0; i < d; i += 16) {
    for (int t = 0; t < count; t++) store_as(rows + (size_t)t * d + i, load(values + t * stride + i));
    if (count == 16) {
      f32x16 tokens[16];
#pragma GCC unroll 16
      for (int t = 0; t < 16; t++) tokens[t] = load(keys + t * stride + i);
      transpose(tokens);
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++) store_as(to + (size_t)(i + j) * 16, tokens[j]);
      continue;
    }
    for (int t = 0; t < count; t++) {
      T token[16];
      store_as(token, load(keys + t * stride + i));
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++) to[(size_t)(i + j) * 16 + lane + t] = token[j];
    }
  }
}

// A row as whole numbers -127..127 times the returned scale; NaN when a number is not finite.
static inline float quantise(const float* x, int d, int8_t* out) {
  f32x16 top = {}, poison = {};
  for (int i = 0; i < d; i += 16) {
    const f32x16 v = load(x + i);
    top = vmax(top, vmax(v, -v));
    poison += v * 0.0f;
  }
  const float largest = horizontal_max(top), inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
  for (int i = 0; i < d; i += 16) {
    const i8x16 q = __builtin_convertvector(round_away(load(x + i) * inverse), i8x16);
    memcpy(out + i, &q, 16);
  }
  return largest * (1.0f / 127.0f) + horizontal_sum(poison);
}

static void write_cache_int8(const Cache& c, size_t slot, int count, int head, const float* keys, const float* values, size_t stride) {
  const int d = c.head_dim, lane = (int)(slot % 16);
  const size_t tile = tile_of(c, slot, head), scales = tile / d + lane;
  alignas(64) int8_t q[16][kMaxHeadDim];
  for (int t = 0; t < count; t++) c.key_scales[scales + t] = quantise(keys + t * stride, d, q[t]);
  uint8_t* key = (uint8_t*)c.keys + tile;
  int i = 0;
  for (; count == 16 && i + 64 <= d; i += 64) {
    f32x16 fours[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; t++) memcpy(&fours[t], q[t] + i, 64);
    transpose(fours);
#pragma GCC unroll 16
    for (int t = 0; t < 16; t++) {
      const i32x16 biased = (i32x16)fours[t] ^ (int32_t)0x80808080;
      memcpy(key + (size_t)(i + 4 * t) * 16, &biased, 64);
    }
  }
  for (; i < d; i += 4)
    for (int t = 0; t < count; t++) {
      uint32_t four;
      memcpy(&four, q[t] + i, 4);
      four ^= 0x80808080u;
      memcpy(key + (size_t)i * 16 + 4 * (lane + t), &four, 4);
    }
  for (int t = 0; t < count; t++) c.value_scales[scales + t] = quantise(values + t * stride, d, q[t]);
  for (int t = 0; t < count;) {
    int8_t* value = (int8_t*)c.values + tile + (size_t)((lane + t) / 4) * 4 * d;
    const int first = (lane + t) % 4, some = std::min(4 - first, count - t);
    if (some < 4) {  // byte by byte: another thread may be writing the others of the four
      for (int k = 0; k < some; k++)
        for (int at = 0; at < d; at++) value[4 * at + first + k] = q[t + k][at];
      t += some;
      continue;
    }
    for (int at = 0; at < d; at += 16) {
      i32x16 bytes = {};
      for (int k = 0; k < 4; k++) {
        i8x16 one;
        memcpy(&one, q[t + k] + at, 16);
        bytes |= (__builtin_convertvector(one, i32x16) & 255) << (8 * k);
      }
      memcpy(value + 4 * at, &bytes, 64);
    }
    t += some;
  }
}

// Keys and values of `count` consecutive slots of one tile; a token's lie `stride` apart from the next one's.
static inline void write_cache(const Cache& c, size_t slot, int count, int head, const float* keys, const float* values, size_t stride) {
  switch (c.format) {
    case CACHE_F32: return write_cache<float>(c, slot, count, head, keys, values, stride);
    case CACHE_F16: return write_cache<uint16_t>(c, slot, count, head, keys, values, stride);
    case CACHE_I8: return write_cache_int8(c, slot, count, head, keys, values, stride);
    case CACHE_F8: return write_cache<e4m3>(c, slot, count, head, keys, values, stride);
  }
}

// How many of the sequence's tokens from `position` on, at most `left`, lie in consecutive slots of one tile.
static inline int run_of(const Sequence& s, int block_size, int position, int left) {
  const size_t slot = slot_of(s, block_size, position);
  return std::min({left, 16 - (int)(slot % 16), block_size - position % block_size});
}

// One chunk's keys and values, tile by tile: in the cache itself, or copied.
template <class T>
struct Chunk {  // for int8 in the shapes of above
  const T* keys[kChunk / 16];    // each [head_dim][16]
  const T* values[kChunk / 16];  // each [16][head_dim]
  const float *key_scales[kChunk / 16], *value_scales[kChunk / 16];  // each [16]; int8 only
};

// The tiles of a chunk in the cache, where blocks are whole tiles.
template <class T>
static inline void tiles_in_place(const Cache& c, const Sequence& s, int head, int position, int tiles, Chunk<T>& to) {
  for (int t = 0; t < tiles; t++) {
    const size_t at = tile_of(c, slot_of(s, c.block_size, position + 16 * t), head);
    to.keys[t] = (const T*)c.keys + at;
    to.values[t] = (const T*)c.values + at;
    if (is_int8<T>) to.key_scales[t] = c.key_scales + at / c.head_dim, to.value_scales[t] = c.value_scales + at / c.head_dim;
  }
}

// The tiles of a chunk as fp32, side by side.
template <class T>
static void copy_tiles(const Cache& c, const Sequence& s, int head, int position, int tiles, int last, float* all_keys, float* all_values, Chunk<float>& to) {
  const int d = c.head_dim;
  for (int t = 0; t < tiles; t++) {
    float *keys = all_keys + (size_t)t * 16 * d, *values = all_values + (size_t)t * 16 * d;
    to.keys[t] = keys;
    to.values[t] = values;
    if (c.block_size % 16 == 0) {
      const size_t at = tile_of(c, slot_of(s, c.block_size, position + 16 * t), head);
      for (int i = 0; i < d; i++) {
        store(keys + (size_t)i * 16, load_as_float((const T*)c.keys + at + (size_t)i * 16));
        store(values + (size_t)i * 16, load_as_float((const T*)c.values + at + (size_t)i * 16));
      }
      continue;
    }
    for (int lane = 0; lane < 16; lane++) {
      const size_t slot = slot_of(s, c.block_size, std::min(position + 16 * t + lane, last)), at = tile_of(c, slot, head);
      const T *key = (const T*)c.keys + at + slot % 16, *value = (const T*)c.values + at + slot % 16 * d;
      for (int i = 0; i < d; i += 16) {
        store(values + (size_t)lane * d + i, load_as_float(value + i));
        T sixteen[16];
        for (int j = 0; j < 16; j++) sixteen[j] = key[(size_t)(i + j) * 16];
        float as_float[16];
        store(as_float, load_as_float(sixteen));
        for (int j = 0; j < 16; j++) keys[(size_t)(i + j) * 16 + lane] = as_float[j];
      }
    }
  }
}

// The same of int8, kept as int8: blocks smaller than a tile are brought side by side.
static inline void copy_tiles_int8(const Cache& c, const Sequence& s, int head, int position, int tiles, int last, uint8_t* all_keys, uint8_t* all_values, float* all_scales, Chunk<uint8_t>& to) {
  const int d = c.head_dim;
  for (int t = 0; t < tiles; t++) {
    uint8_t *keys = all_keys + (size_t)t * 16 * d, *values = all_values + (size_t)t * 16 * d;
    float *key_scales = all_scales + 32 * t, *value_scales = key_scales + 16;
    to.keys[t] = keys, to.values[t] = values, to.key_scales[t] = key_scales, to.value_scales[t] = value_scales;
    for (int lane = 0; lane < 16; lane++) {
      const size_t slot = slot_of(s, c.block_size, std::min(position + 16 * t + lane, last)), at = tile_of(c, slot, head);
      const size_t from = slot % 16;
      const uint8_t *key = (const uint8_t*)c.keys + at + 4 * from, *value = (const uint8_t*)c.values + at + from / 4 * 4 * d + from % 4;
      for (int i = 0; i < d; i += 4) memcpy(keys + (size_t)i * 16 + 4 * lane, key + (size_t)i * 16, 4);
      for (int i = 0; i < d; i++) values[(size_t)(lane / 4) * 4 * d + lane % 4 + (size_t)i * 4] = value[(size_t)i * 4];
      key_scales[lane] = c.key_scales[at / d + from];
      value_scales[lane] = c.value_scales[at / d + from];
    }
  }
}

}  // namespace arm
