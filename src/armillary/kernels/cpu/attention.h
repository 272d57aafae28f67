// Paged attention with online softmax (Milakov & Gimelshein 2018; Dao et al. 2022) over keys stored transposed.
//
// Keys live as [slot/16][kv_head][head_dim][16]: 16 slots side by side, so that one vector holds the same component of
// 16 keys and scores need no horizontal sums. Values live as [slot][kv_head][head_dim].
// Keys are taken in chunks of kChunk positions counted from 0, for decode and prefill alike: a query's result does not
// depend on which other queries are computed beside it.
#pragma once
#include "simd.h"

namespace arm {

constexpr int kChunk = 96;

struct Cache {
  void* keys;
  void* values;
  int32_t half;  // 0: fp32, 1: fp16
  int32_t kv_heads, head_dim, block_size;
};

struct Sequence {
  const int32_t* table;  // block table
  int32_t start;         // position of its first query
  int32_t count;         // queries
  int32_t row;           // row of its first query in the flat batch
};

static inline size_t slot_of(const Sequence& s, int block_size, int position) {
  return (size_t)s.table[position / block_size] * block_size + position % block_size;
}

static inline f32x16 load_cached(const void* base, size_t index, int half) {
  return half ? load_half((const uint16_t*)base + index) : load((const float*)base + index);
}

static inline void write_cache(const Cache& c, size_t slot, int head, const float* key, const float* value) {
  const int d = c.head_dim;
  size_t k0 = ((slot / 16 * c.kv_heads + head) * d) * 16 + slot % 16;
  size_t v0 = (slot * c.kv_heads + head) * d;
  if (c.half) {
    uint16_t* keys = (uint16_t*)c.keys;
    uint16_t* values = (uint16_t*)c.values;
    for (int i = 0; i < d; i += 16) {
      uint16_t packed[16];
      store_half(packed, load(key + i));
      for (int j = 0; j < 16; j++) keys[k0 + (size_t)(i + j) * 16] = packed[j];
      store_half(values + v0 + i, load(value + i));
    }
  } else {
    float* keys = (float*)c.keys;
    for (int i = 0; i < d; i++) keys[k0 + (size_t)i * 16] = key[i];
    memcpy((float*)c.values + v0, value, (size_t)d * 4);
  }
}

// Scores of M queries against 16*TILES keys. q: [M][head_dim], tiles: one [head_dim][16] block each.
template <int M, int TILES>
static inline __attribute__((always_inline)) void scores(const float* const* q, const void* const* tile, int half, int d, f32x16 out[M * TILES]) {
  f32x16 acc[M * TILES];
#pragma GCC unroll 24
  for (int i = 0; i < M * TILES; i++) acc[i] = f32x16{};
  for (int i = 0; i < d; i++) {
    f32x16 k[TILES];
    for (int t = 0; t < TILES; t++) k[t] = load_cached(tile[t], (size_t)i * 16, half);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      f32x16 b = splat(q[r][i]);
      for (int t = 0; t < TILES; t++) acc[r * TILES + t] += k[t] * b;
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < M * TILES; i++) out[i] = acc[i];
}

// out[r] += sum over keys of p[r][key] * value[key], for VECTORS*16 components from `offset`.
template <int M, int VECTORS>
static inline __attribute__((always_inline)) void weigh(const float (*p)[kChunk], const Cache& c, const size_t* rows, int keys, int offset, float* const* out) {
  f32x16 acc[M * VECTORS];
#pragma GCC unroll 32
  for (int r = 0; r < M; r++)
    for (int v = 0; v < VECTORS; v++) acc[r * VECTORS + v] = load(out[r] + offset + 16 * v);
  for (int i = 0; i < keys; i++) {
    f32x16 value[VECTORS];
    for (int v = 0; v < VECTORS; v++) value[v] = load_cached(c.values, rows[i] + offset + 16 * v, c.half);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      f32x16 b = splat(p[r][i]);
      for (int v = 0; v < VECTORS; v++) acc[r * VECTORS + v] += value[v] * b;
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < M; r++)
    for (int v = 0; v < VECTORS; v++) store(out[r] + offset + 16 * v, acc[r * VECTORS + v]);
}

struct AttentionOptions {
  float scale;
  float softcap;   // 0: none
  int32_t window;  // 0: none
};

static inline f32x16 tanh16(f32x16 x) {
  f32x16 e = exp16(vmin(vmax(x, splat(-9.0f)), splat(9.0f)) * 2.0f);
  return (e - 1.0f) / (e + 1.0f);
}

// M query rows of one kv head. position[r] is the query's position; q[r], out[r]: [head_dim].
template <int M>
static void attend_rows(const Cache& c, const Sequence& s, int head, const AttentionOptions& o, const int* position, const float* const* q, float* const* out) {
  const int d = c.head_dim, element = c.half ? 2 : 4;
  float running_max[M], running_sum[M];
  int first = position[0], last = position[0];
  for (int r = 0; r < M; r++) {
    running_max[r] = -1e30f;
    running_sum[r] = 0.0f;
    memset(out[r], 0, (size_t)d * 4);
    int begin = o.window ? (position[r] - o.window + 1 > 0 ? position[r] - o.window + 1 : 0) : 0;
    if (begin < first || r == 0) first = begin;
    if (position[r] > last) last = position[r];
  }
  alignas(64) float p[M][kChunk];
  size_t value_rows[kChunk];
  alignas(64) static thread_local float gathered[kChunk * 512];
  for (int chunk = first / kChunk * kChunk; chunk <= last; chunk += kChunk) {
    const int keys = last + 1 - chunk < kChunk ? last + 1 - chunk : kChunk;
    const int tile_count = (keys + 15) / 16;
    const void* tile[kChunk / 16];
    for (int i = 0; i < keys; i++) value_rows[i] = (slot_of(s, c.block_size, chunk + i) * c.kv_heads + head) * d;
    const bool in_place = c.block_size % 16 == 0;
    for (int t = 0; t < tile_count; t++) {
      if (in_place) {
        size_t slot = slot_of(s, c.block_size, chunk + 16 * t);
        tile[t] = (const char*)c.keys + (slot / 16 * c.kv_heads + head) * d * 16 * element;
        continue;
      }
      // Blocks smaller than a tile: bring 16 keys side by side first.
      float* to = gathered + (size_t)t * 16 * d;
      for (int lane = 0; lane < 16; lane++) {
        int at = chunk + 16 * t + lane;
        if (at > last) at = last;
        size_t slot = slot_of(s, c.block_size, at);
        size_t from = ((slot / 16 * c.kv_heads + head) * d) * 16 + slot % 16;
        for (int i = 0; i < d; i++) {
          if (c.half) {
            uint16_t one[16] = {((const uint16_t*)c.keys)[from + (size_t)i * 16]};
            to[i * 16 + lane] = load_half(one)[0];
          } else {
            to[i * 16 + lane] = ((const float*)c.keys)[from + (size_t)i * 16];
          }
        }
      }
      tile[t] = to;
    }
    const int half = in_place ? c.half : 0;
    for (int t = 0; t < tile_count;) {
      f32x16 s3[M * 3];
      const int n = tile_count - t >= 3 ? 3 : 1;
      if (n == 3)
        scores<M, 3>(q, tile + t, half, d, s3);
      else
        scores<M, 1>(q, tile + t, half, d, s3);
      for (int r = 0; r < M; r++)
        for (int i = 0; i < n; i++) store(p[r] + 16 * (t + i), s3[r * n + i] * o.scale);
      t += n;
    }
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int r = 0; r < M; r++) {
      const int begin = o.window ? position[r] - o.window + 1 : 0;
      f32x16 top = splat(-1e30f);
      for (int t = 0; t < tile_count; t++) {
        f32x16 v = load(p[r] + 16 * t);
        if (o.softcap > 0.0f) v = tanh16(v * (1.0f / o.softcap)) * o.softcap;
        const int at = chunk + 16 * t;
        if (at + 15 > position[r] || at < begin) {
          i32x16 where = lanes + at;
          v = (where > position[r]) | (where < begin) ? splat(-1e30f) : v;
        }
        store(p[r] + 16 * t, v);
        top = vmax(top, v);
      }
      const float m = running_max[r] > horizontal_max(top) ? running_max[r] : horizontal_max(top);
      f32x16 total = f32x16{};
      for (int t = 0; t < tile_count; t++) {
        f32x16 v = load(p[r] + 16 * t);
        v = v > -1e29f ? exp16(v - m) : f32x16{};
        store(p[r] + 16 * t, v);
        total += v;
      }
      const float shrink = running_max[r] > -1e29f ? exp16(splat(running_max[r] - m))[0] : 0.0f;
      running_sum[r] = running_sum[r] * shrink + horizontal_sum(total);
      running_max[r] = m;
      if (shrink != 1.0f)
        for (int i = 0; i < d; i += 16) store(out[r] + i, load(out[r] + i) * shrink);
    }
    int offset = 0;
    for (; offset + 64 <= d; offset += 64) weigh<M, 4>(p, c, value_rows, keys, offset, out);
    for (; offset + 16 <= d; offset += 16) weigh<M, 1>(p, c, value_rows, keys, offset, out);
  }
  for (int r = 0; r < M; r++) {
    const float inverse = 1.0f / running_sum[r];
    for (int i = 0; i < d; i += 16) store(out[r] + i, load(out[r] + i) * inverse);
  }
}

// `rows` (1..6) query rows of one kv head.
static inline void attend(int rows, const Cache& c, const Sequence& s, int head, const AttentionOptions& o, const int* position, const float* const* q, float* const* out) {
  switch (rows) {
    case 1: return attend_rows<1>(c, s, head, o, position, q, out);
    case 2: return attend_rows<2>(c, s, head, o, position, q, out);
    case 3: return attend_rows<3>(c, s, head, o, position, q, out);
    case 4: return attend_rows<4>(c, s, head, o, position, q, out);
    case 5: return attend_rows<5>(c, s, head, o, position, q, out);
    case 6: return attend_rows<6>(c, s, head, o, position, q, out);
  }
}

}  // namespace arm
