// Paged attention with online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//
// A row is one head of one query. A row's keys are taken in chunks of kChunk positions counted from 0, its softmax starts
// anew every kSegment positions, and the segments are merged in order; a key that it may not see contributes exactly 0 (but
// for a value that is not finite, which may reach the rows of its sequence that share a register tile with it).
// So a row's result depends on its own position alone: not on the rows computed beside it, nor on who computes which segment.
#pragma once
#include <algorithm>
#include <type_traits>

#include "attention_int8.h"
#include "kv_cache.h"

namespace arm {

constexpr int kSegment = 512;    // positions, a multiple of kChunk
constexpr int kTileRows = 6;     // rows of a register tile
constexpr int kBlockRows = 48;   // rows that share a pass over the keys
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;  // 6 x 4 of 32 registers accumulate
#else
constexpr int kTileVectors = 1;  // 6 x 1, two registers each, of 16
#endif

struct AttentionOptions {
  float scale;
  float softcap;   // 0: none
  int32_t window;  // 0: none
};

// 2^x for finite x <= 0 to 2 ulp, 0 far below; NaN stays NaN. The polynomial is the minimax of degree 5 on [-1/2, 1/2].
static inline f32x16 exp2_16(f32x16 x) {
#if defined(__AVX512F__)
  const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = vmax(splat(-127.0f), x);
  const f32x16 shifted = x + 12582912.0f, n = shifted - 12582912.0f;  // 1.5 x 2^23: the sum rounds to an integer
#endif
  const f32x16 r = x - n;
  f32x16 p = splat(1.3264727247e-3f);
  p = p * r + 9.6715126881e-3f;
  p = p * r + 5.5507337436e-2f;
  p = p * r + 2.4022242085e-1f;
  p = p * r + 6.9314697760e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  i32x16 bits;
  memcpy(&bits, &shifted, 64);
  bits = (bits - (0x4b400000 - 127)) << 23;
  f32x16 scale;
  memcpy(&scale, &bits, 64);
  return p * scale;
#endif
}

static inline f32x16 tanh16(f32x16 x) {
  f32x16 e = exp16(vmin(splat(9.0f), vmax(splat(-9.0f), x)) * 2.0f);  // in this order NaN stays NaN
  return (e - 1.0f) / (e + 1.0f);
}

// Raw scores of M queries q [M][d] against 16 W keys.
template <int M, int W, class T>
static inline __attribute__((always_inline)) void scores(const float* q, int d, const T* const* tile, float (*out)[kChunk]) {
  f32x16 acc[M][W] = {};
  for (int i = 0; i < d; i++) {
    f32x16 key[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) key[w] = load_as_float(tile[w] + (size_t)i * 16);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      const f32x16 b = splat(q[(size_t)r * d + i]);
#pragma GCC unroll 8
      for (int w = 0; w < W; w++) acc[r][w] += key[w] * b;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) store(out[r] + 16 * w, acc[r][w]);
}

// out[r] = out[r] shrink[r] + sum over the chunk's first `keys` keys of p[r][key] value[key], for 16 W components.
template <int M, int W, class T>
static inline __attribute__((always_inline)) void weigh(const float (*p)[kChunk], const T* const* tile, int keys, int d, const float* shrink, float* out) {
  f32x16 acc[M][W];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) acc[r][w] = load(out + (size_t)r * d + 16 * w) * shrink[r];
  for (int first = 0; first < keys; first += 16) {
    const T* value = *tile++;
    const float* weight = p[0] + first;
    const int count = std::min(16, keys - first);
    for (int i = 0; i < count; i++, value += d, weight++) {
      f32x16 v[W];
#pragma GCC unroll 8
      for (int w = 0; w < W; w++) v[w] = load_as_float(value + 16 * w);
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        const f32x16 b = splat(weight[r * kChunk]);
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) acc[r][w] += v[w] * b;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) store(out + (size_t)r * d + 16 * w, acc[r][w]);
}

// The running softmax of a register tile's rows within a segment: weights are 2^(score - peak), summed lane by lane.
struct Softmax {
  f32x16 sum[kTileRows];
  f32x16 peak;  // of row r in lane r
};

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kNothing = -1e30f;  // the peak of a row that has seen no key
constexpr float kMasked = -3e38f;   // so far below any peak, kNothing too, that its weight is 0

// Turns M rows' scores into weights and folds them into `s`; shrink[r]: what the row's earlier weights are multiplied by.
// Row r sees the positions begin[r]..end[r] of the chunk, whose first `tiles` tiles have been scored.
template <int M>
static inline __attribute__((always_inline)) void soften(float (*p)[kChunk], int tiles, const int* begin, const int* end, float softcap, Softmax& s, float* shrink) {
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  f32x16 peak = s.peak;
  for (int r = 0; r < M; r++) {
    if (softcap > 0.0f)
      for (int t = 0; t < tiles; t++) store(p[r] + 16 * t, tanh16(load(p[r] + 16 * t)) * (softcap * kLog2e));
    if (begin[r] > 0 || end[r] < 16 * tiles - 1)
      for (int t = 0; t < tiles; t++) {
        const i32x16 at = lanes + 16 * t;
        store(p[r] + 16 * t, (at < begin[r]) | (at > end[r]) ? splat(kMasked) : load(p[r] + 16 * t));
      }
    f32x16 top = load(p[r]);
    for (int t = 1; t < tiles; t++) top = vmax(top, load(p[r] + 16 * t));
    peak = lanes == r ? vmax(peak, splat(horizontal_max(top))) : peak;
  }
  store(shrink, exp2_16(s.peak - peak));
  s.peak = peak;
  float peaks[16];
  store(peaks, peak);
  for (int r = 0; r < M; r++) {
    f32x16 sum = {};
    for (int t = 0; t < tiles; t++) {
      const f32x16 weight = exp2_16(load(p[r] + 16 * t) - peaks[r]);
      store(p[r] + 16 * t, weight);
      sum += weight;
    }
    s.sum[r] = s.sum[r] * shrink[r] + sum;
  }
}

// The rows of one register tile.
struct TileRows {
  const float* q;  // [rows][head_dim]
  EncodedQueries encoded;  // int8 only
  const int *begin, *end;  // what of the chunk each row sees
  float softcap;
  Softmax& state;
  float* out;  // [rows][head_dim]
};

template <int M, int W, class T>
static inline __attribute__((always_inline)) void scores_of(const TileRows& x, int d, const Chunk<T>& chunk, int tile, float (*p)[kChunk]) {
  if constexpr (is_int8<T>)
    scores_int8<M, W>(x.encoded, d, chunk, tile, p);
  else
    scores<M, W>(x.q, d, chunk.keys + tile, (float(*)[kChunk])(p[0] + 16 * tile));
}

// One chunk for M rows of a block: scores, softmax, weighted values.
template <int M, class T>
static inline void attend_tile(const Chunk<T>& chunk, int d, const TileRows& x) {
  alignas(64) float p[M][kChunk];
  const int keys = std::min(*std::max_element(x.end, x.end + M) + 1, kChunk), tiles = (keys + 15) / 16;
  int t = 0;
  for (; t + kTileVectors <= tiles; t += kTileVectors) scores_of<M, kTileVectors>(x, d, chunk, t, p);
  if constexpr (kTileVectors > 2)
    if (t + 2 <= tiles) scores_of<M, 2>(x, d, chunk, t, p), t += 2;
  if constexpr (kTileVectors > 1)
    if (t < tiles) scores_of<M, 1>(x, d, chunk, t, p);
  float shrink[16];
  if (tiles == kChunk / 16)
    soften<M>(p, kChunk / 16, x.begin, x.end, x.softcap, x.state, shrink);
  else
    soften<M>(p, tiles, x.begin, x.end, x.softcap, x.state, shrink);
  int offset = 0;
  if constexpr (is_int8<T>) {
    alignas(64) int8_t weights[M * 2 * kChunk];
    float unit[M];
    encode_weights<M>(p, chunk, tiles, weights, unit);
    for (; offset + 16 * kTileVectors <= d; offset += 16 * kTileVectors) weigh_int8<M, kTileVectors>(weights, unit, chunk, keys, d, offset, shrink, x.out);
    if constexpr (kTileVectors > 1)
      for (; offset < d; offset += 16) weigh_int8<M, 1>(weights, unit, chunk, keys, d, offset, shrink, x.out);
  } else {
    const T* values[kChunk / 16];
    auto from = [&](int at) {
      for (int i = 0; i < tiles; i++) values[i] = chunk.values[i] + at;
      return values;
    };
    for (; offset + 16 * kTileVectors <= d; offset += 16 * kTileVectors) weigh<M, kTileVectors>(p, from(offset), keys, d, shrink, x.out + offset);
    if constexpr (kTileVectors > 1)
      for (; offset < d; offset += 16) weigh<M, 1>(p, from(offset), keys, d, shrink, x.out + offset);
  }
}

template <class T>
static void attend_tile(int rows, const Chunk<T>& chunk, int d, const TileRows& x) {
  switch (rows) {
    case 1: return attend_tile<1>(chunk, d, x);
    case 2: return attend_tile<2>(chunk, d, x);
    case 3: return attend_tile<3>(chunk, d, x);
    case 4: return attend_tile<4>(chunk, d, x);
    case 5: return attend_tile<5>(chunk, d, x);
    case 6: return attend_tile<6>(chunk, d, x);
  }
}

// A row's softmax over all segments so far; `peak` and `sum` stand behind the head_dim components of its output.
static inline int merged_width(int head_dim) { return head_dim + 2; }

static inline void merge_nothing(float* into, int d) {
  memset(into, 0, (size_t)d * 4);
  into[d] = kNothing;
  into[d + 1] = 0.0f;
}

static __attribute__((noinline)) void merge(float* into, const float* out, float peak, float sum, int d) {
  const float top = std::max(into[d], peak);
  const float a = exp2_16(splat(into[d] - top))[0], b = exp2_16(splat(peak - top))[0];
  for (int i = 0; i < d; i += 16) store(into + i, load(into + i) * a + load(out + i) * b);
  into[d] = top;
  into[d + 1] = into[d + 1] * a + sum * b;
}

// Where a batch's queries [tokens][stride] and results [tokens][heads][head_dim] are; queries of head h begin at h head_dim.
struct Queries {
  const float* q;
  size_t stride;
  float* out;
  int heads;
};

// `rows` rows of one kv head, from row `first` on: row r is query r / group of the sequence, head r % group of the kv head's.
struct Block {
  int head, first, rows;
};

struct AttentionScratch {
  alignas(64) float q[kBlockRows * kMaxHeadDim];    // [rows][d], scaled
  alignas(64) float out[kBlockRows * kMaxHeadDim];  // [rows][d], this segment's
  alignas(64) int8_t encoded[kBlockRows * kMaxHeadDim * 2];  // queries for an int8 cache
  float query_scale[kBlockRows];
  int32_t query_bias[kBlockRows];
  alignas(64) float keys[kChunk * kMaxHeadDim];  // tiles that had to be copied
  alignas(64) float values[kChunk * kMaxHeadDim];
  alignas(64) float scales[kChunk * 2];
  alignas(64) Softmax state[kBlockRows / kTileRows];
  alignas(64) float merged[kBlockRows * (kMaxHeadDim + 2)];
};

static inline AttentionScratch& attention_scratch() {
  static thread_local AttentionScratch scratch;
  return scratch;
}

static inline float peak_of(const AttentionScratch& u, int r) { return u.state[r / kTileRows].peak[r % kTileRows]; }
static inline float sum_of(const AttentionScratch& u, int r) { return horizontal_sum(u.state[r / kTileRows].sum[r % kTileRows]); }

static inline int position_of(const Sequence& s, const Block& b, int group, int r) { return s.start + (b.first + r) / group; }

template <class T>
static void attend_segment(const Cache& c, const Sequence& s, const AttentionOptions& o, const Block& b, int group, int segment, AttentionScratch& u) {
  const int d = c.head_dim;
  int seen_from[kBlockRows], seen_to[kBlockRows];  // positions, both included
  for (int r = 0; r < b.rows; r++) {
    seen_to[r] = position_of(s, b, group, r);
    seen_from[r] = o.window ? std::max(0, seen_to[r] - o.window + 1) : 0;
  }
  for (int r = 0; r < b.rows; r += kTileRows) u.state[r / kTileRows] = {{}, splat(kNothing)};
  memset(u.out, 0, (size_t)b.rows * d * 4);
  const int last = std::min(seen_to[b.rows - 1], (segment + 1) * kSegment - 1);
  for (int chunk = std::max(segment * kSegment, seen_from[0] / kChunk * kChunk); chunk <= last; chunk += kChunk) {
    const int tiles = std::min(kChunk / 16, (last - chunk) / 16 + 1);
    const bool whole = c.block_size % 16 == 0;
    // Halves and less that are used once are read where they lie; what many rows use is made fp32 first.
    const bool in_place = whole && (b.rows <= kTileRows || !is_narrow<T>);
    Chunk<T> there;
    Chunk<std::conditional_t<is_int8<T>, T, float>> copied;
    if (in_place) {
      tiles_in_place(c, s, b.head, chunk, tiles, there);
      if (b.rows <= kTileRows)  // read once, tiles lie anywhere: values come while keys are multiplied
        for (int t = 0; t < tiles; t++)
          for (size_t line = 0; line < 16 * d * sizeof(T); line += 64) __builtin_prefetch((const char*)there.values[t] + line, 0, 2);
    } else if constexpr (is_int8<T>)
      copy_tiles_int8(c, s, b.head, chunk, tiles, last, (T*)u.keys, (T*)u.values, u.scales, copied);
    else
      copy_tiles<T>(c, s, b.head, chunk, tiles, last, u.keys, u.values, copied);
    for (int r = 0; r < b.rows; r += kTileRows) {
      const int rows = std::min(kTileRows, b.rows - r);
      if (seen_to[r + rows - 1] < chunk || seen_from[r] >= chunk + kChunk) continue;
      int begin[kTileRows], end[kTileRows];
      for (int i = 0; i < rows; i++) begin[i] = seen_from[r + i] - chunk, end[i] = seen_to[r + i] - chunk;
      const size_t at = (size_t)r * d;
      const EncodedQueries encoded = {u.encoded + 2 * at, u.query_scale + r, u.query_bias + r};
      const TileRows x = {u.q + at, encoded, begin, end, o.softcap, u.state[r / kTileRows], u.out + at};
      if (in_place)
        attend_tile(rows, there, d, x);
      else
        attend_tile(rows, copied, d, x);
    }
  }
}

// The block's queries, scaled so that scores are powers of two; with a cap, so that they are what tanh takes.
static inline void scale_queries(const Cache& c, const AttentionOptions& o, const Queries& x, const Block& b, AttentionScratch& u) {
  const int d = c.head_dim, group = x.heads / c.kv_heads;
  const float scale = o.softcap > 0.0f ? o.scale / o.softcap : o.scale * kLog2e;
  for (int r = 0; r < b.rows; r++) {
    const int index = b.first + r;
    const float* q = x.q + (size_t)(index / group) * x.stride + (size_t)(b.head * group + index % group) * d;
    for (int i = 0; i < d; i += 16) store(u.q + (size_t)r * d + i, load(q + i) * scale);
    if (c.format == CACHE_I8) encode_query(u.q + (size_t)r * d, d, u.encoded + (size_t)r * 2 * d, u.query_scale[r], u.query_bias[r]);
  }
}

static inline void attend_segment(const Cache& c, const Sequence& s, const AttentionOptions& o, const Block& b, int group, int segment, AttentionScratch& u) {
  switch (c.format) {
    case CACHE_F32: return attend_segment<float>(c, s, o, b, group, segment, u);
    case CACHE_F16: return attend_segment<uint16_t>(c, s, o, b, group, segment, u);
    case CACHE_I8: return attend_segment<uint8_t>(c, s, o, b, group, segment, u);
    case CACHE_F8: return attend_segment<e4m3>(c, s, o, b, group, segment, u);
  }
}

static inline void write_result(const Cache& c, const Queries& x, const Block& b, int r, const float* merged) {
  const int d = c.head_dim, group = x.heads / c.kv_heads, index = b.first + r;
  float* out = x.out + ((size_t)(index / group) * x.heads + b.head * group + index % group) * d;
  const float inverse = 1.0f / merged[d + 1];
  for (int i = 0; i < d; i += 16) store(out + i, load(merged + i) * inverse);
}

// The first tokens of a stream whose middle is gone (StreamingLLM; Xiao et al., ICLR 2024): every query of a block sees all
// of them, some positions nearer than they are. Their keys stay as they were written, queries are turned back instead: a
// shift that grows leaves no trace of its earlier values, and the blocks may be anybody's.
struct Sinks {
  const int32_t* table = nullptr;  // their blocks; null: none
  int count = 0;                   // 1..kSegment
  const float *cosines = nullptr, *sines = nullptr;  // [head_dim / 2] of the shift
};

// The sinks' part for the block's queries, which `scale_queries` has made, in u.out and u.state.
static inline void attend_sinks(const Cache& c, const Sinks& sinks, const AttentionOptions& o, const Block& b, AttentionScratch& u) {
  const int d = c.head_dim, h = d / 2;
  for (int r = 0; r < b.rows; r++) {
    float* q = u.q + (size_t)r * d;
    for (int i = 0; i < h; i++) {
      const float x = q[i], y = q[h + i];
      q[i] = x * sinks.cosines[i] + y * sinks.sines[i];
      q[h + i] = y * sinks.cosines[i] - x * sinks.sines[i];
    }
    if (c.format == CACHE_I8) encode_query(q, d, u.encoded + (size_t)r * 2 * d, u.query_scale[r], u.query_bias[r]);
  }
  const int one_position = kBlockRows;  // as many rows: all of them see up to the last sink
  attend_segment(c, {sinks.table, sinks.count - 1, 1, 0, 0, 0}, {o.scale, o.softcap, 0}, {b.head, 0, b.rows}, one_position, 0, u);
}

// A whole block: every segment, merged, normalised and written.
static inline void attend_block(const Cache& c, const Sequence& s, const AttentionOptions& o, const Queries& x, const Block& b, const Sinks& sinks = {}) {
  AttentionScratch& u = attention_scratch();
  const int d = c.head_dim, width = merged_width(d), group = x.heads / c.kv_heads;
  const int low = position_of(s, b, group, 0) - o.window + 1, last = position_of(s, b, group, b.rows - 1);
  scale_queries(c, o, x, b, u);
  for (int r = 0; r < b.rows; r++) merge_nothing(u.merged + (size_t)r * width, d);
  for (int segment = o.window && low > 0 ? low / kSegment : 0; segment <= last / kSegment; segment++) {
    attend_segment(c, s, o, b, group, segment, u);
    for (int r = 0; r < b.rows; r++) merge(u.merged + (size_t)r * width, u.out + (size_t)r * d, peak_of(u, r), sum_of(u, r), d);
  }
  if (sinks.table) {
    attend_sinks(c, sinks, o, b, u);
    for (int r = 0; r < b.rows; r++) merge(u.merged + (size_t)r * width, u.out + (size_t)r * d, peak_of(u, r), sum_of(u, r), d);
  }
  for (int r = 0; r < b.rows; r++) write_result(c, x, b, r, u.merged + (size_t)r * width);
}

// One segment of a block that several threads share, or (`segment` -1) its sinks: its part, [rows][merged_width], is left in `part`.
static inline void attend_part(const Cache& c, const Sequence& s, const AttentionOptions& o, const Queries& x, const Block& b, int segment, const Sinks& sinks, float* part) {
  AttentionScratch& u = attention_scratch();
  const int d = c.head_dim, width = merged_width(d);
  if (segment < 0 && !sinks.table) {  // this layer sees none
    for (int r = 0; r < b.rows; r++) merge_nothing(part + (size_t)r * width, d);
    return;
  }
  scale_queries(c, o, x, b, u);
  if (segment < 0)
    attend_sinks(c, sinks, o, b, u);
  else
    attend_segment(c, s, o, b, x.heads / c.kv_heads, segment, u);
  for (int r = 0; r < b.rows; r++) {
    float* to = part + (size_t)r * width;
    memcpy(to, u.out + (size_t)r * d, (size_t)d * 4);
    to[d] = peak_of(u, r);
    to[d + 1] = sum_of(u, r);
  }
}

// The parts of all segments, [segments][rows][merged_width], merged in order, normalised and written.
static inline void merge_parts(const Cache& c, const Queries& x, const Block& b, int segments, const float* parts) {
  AttentionScratch& u = attention_scratch();
  const int d = c.head_dim, width = merged_width(d);
  for (int r = 0; r < b.rows; r++) {
    merge_nothing(u.merged, d);
    for (int i = 0; i < segments; i++) {
      const float* part = parts + ((size_t)i * b.rows + r) * width;
      merge(u.merged, part, part[d], part[d + 1], d);
    }
    write_result(c, x, b, r, u.merged);
  }
}

}  // namespace arm
