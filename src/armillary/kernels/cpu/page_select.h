// Which pages of a long context a query reads (Quest; Tang et al., ICML 2024).
//
// A page is a tile of 16 slots. Beside it lie, for each kv head and component, the largest of its keys and the largest of
// their negatives, so that sum_d max(q_d, 0) above_d + max(-q_d, 0) below_d is at least every q . k in the page. They are
// bytes times the page's scale, rounded upwards: a bound stays one, and they cost 1/64 of what fp32 keys and values do.
// They are made from the tile's keys as they are stored, up to the last one written: what was there before does not matter
// (drafts that were not accepted, another sequence), nor how many keys came at a time.
#pragma once
#include <algorithm>

#include "attention.h"

namespace arm {

constexpr int kPage = 16;

// Of a head's bounds of a tile: where its scale is, and 2 head_dim times as far its bytes.
static inline size_t bounds_of(const Cache& c, size_t tile, int head) { return (size_t)head * c.tiles + tile; }

// Components i..i+15 of the keys of a tile's 16 slots: vector t is the key in lane t.
static inline void keys_of_tile(const Cache& c, size_t at, int i, f32x16 keys[16]) {
  const int d = c.head_dim;
  for (int j = 0; j < 16; j++) {
    const size_t component = at + (size_t)(i + j) * 16;
    switch (c.format) {
      case CACHE_F32: keys[j] = load((const float*)c.keys + component); break;
      case CACHE_F16: keys[j] = load_half((const uint16_t*)c.keys + component); break;
      case CACHE_F8: keys[j] = load_as_float((const e4m3*)c.keys + component); break;
      case CACHE_I8: {  // [head_dim / 4][16][4], biased by 128
        const uint8_t* four = (const uint8_t*)c.keys + at + (size_t)(i + j) / 4 * 64 + (i + j) % 4;
        for (int lane = 0; lane < 16; lane++) keys[j][lane] = (float)((int)four[4 * lane] - 128) * c.key_scales[at / d + lane];
      }
    }
  }
  transpose(keys);
}

// The smallest scale of 8 significant bits by which 127 units reach `largest`: a byte times it is exact in fp32.
static inline float scale_above(float largest) {
  constexpr float kLeast = 0x1p-120f;  // its inverse is finite
  if (!(largest > 127.0f * kLeast)) return kLeast;
  float scale = largest * (1.0f / 127.0f);
  uint32_t bits;
  memcpy(&bits, &scale, 4);
  bits = (bits + 0xffff) & 0xffff0000u;
  memcpy(&scale, &bits, 4);
  if (scale * 127.0f < largest) {
    bits += 0x10000;
    memcpy(&scale, &bits, 4);
  }
  return scale;
}

// The smallest whole numbers that are not below v / scale.
static inline i8x16 bytes_above(f32x16 v, float scale) {
  i32x16 n = __builtin_convertvector(v * (1.0f / scale), i32x16);
  n -= to_float(n) * scale < v;  // a comparison is -1 where it holds
  n += to_float(n - 1) * scale >= v;
  return __builtin_convertvector(n, i8x16);
}

// The bounds of the first `count` slots of a tile; the scale is NaN where a key is not finite, so that its page is always read.
static inline void bound_tile(const Cache& c, size_t tile, int head, int count) {
  const int d = c.head_dim;
  const size_t at = (tile * c.kv_heads + head) * d * 16, to = bounds_of(c, tile, head);
  alignas(64) float bounds[2 * kMaxHeadDim];
  f32x16 largest = {}, poison = {};
  for (int i = 0; i < d; i += 16) {
    f32x16 keys[16];
    keys_of_tile(c, at, i, keys);
    f32x16 above = keys[0], below = -keys[0];
    poison += keys[0] * 0.0f;
    for (int t = 1; t < count; t++) above = vmax(above, keys[t]), below = vmax(below, -keys[t]), poison += keys[t] * 0.0f;
    store(bounds + i, above);
    store(bounds + d + i, below);
    largest = vmax(largest, vmax(above, below));
  }
  const float scale = scale_above(horizontal_max(largest));
  for (int i = 0; i < 2 * d; i += 16) {
    const i8x16 bytes = bytes_above(load(bounds + i), scale);
    memcpy(c.bounds + to * 2 * d + i, &bytes, 16);
  }
  c.bound_scales[to] = scale + horizontal_sum(poison);
}

// Queries split by sign, [heads][2][d]: max(q, 0) and max(-q, 0) as 15-bit whole numbers times the head's unit. So sums are
// exact: half a unit a component is what a score is off by.
struct PageQueries {
  static constexpr int kHeads = 8;  // at a time
  alignas(64) int16_t split[kHeads * 2 * kMaxHeadDim];
  float unit[kHeads];
};

static inline float split_query(const float* q, float scale, int d, int16_t* split) {
  constexpr float kMost = 32767.0f;  // times 127, over the at most kMaxHeadDim components that are not 0, stays below 2^31
  f32x16 top = {}, poison = {};
  for (int i = 0; i < d; i += 16) {
    const f32x16 v = load(q + i) * scale;
    top = vmax(top, vmax(v, -v));
    poison += v * 0.0f;
  }
  const float largest = horizontal_max(top), inverse = largest > 1e-30f ? kMost / largest * scale : 0.0f;
  for (int i = 0; i < d; i += 16) {
    const i32x16 n = round_away(load(q + i) * inverse);
    const i16x16 above = __builtin_convertvector(n > 0 ? n : i32x16{}, i16x16), below = __builtin_convertvector(n < 0 ? -n : i32x16{}, i16x16);
    memcpy(split + i, &above, 32);
    memcpy(split + d + i, &below, 32);
  }
  return largest * (1.0f / kMost) + horizontal_sum(poison);
}

// The sums of every STEPth of 16 rows, the first in lane 0: half of them shuffled perfectly with the others, and added.
template <int STEP>
static inline __attribute__((always_inline)) i32x16 sum_rows(const i32x16* rows) {
  if constexpr (STEP == 16) {
    return *rows;
  } else {
    const i32x16 a = sum_rows<2 * STEP>(rows), b = sum_rows<2 * STEP>(rows + STEP);
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
           __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// Scores as whole numbers of the same order; NaN above all others.
static inline i32x16 order_of(f32x16 score) {
  const i32x16 bits = (i32x16)score;
  return score == score ? bits ^ ((bits >> 31) & 0x7fffffff) : splat_int(0x7fffffff);
}

// The largest of M queries' scores for pages first..last-1, 16 at a time; `first` is a multiple of 16.
template <int M>
static void score_pages(const Cache& c, const Sequence& s, const PageQueries& q, int head, int first, int last, bool more, int32_t* keys) {
  typedef int8_t i8x32 __attribute__((vector_size(32)));
  const int d = c.head_dim;
  const int pages = c.block_size / kPage;  // of a block
  int block = first / pages, within = first % pages;
  size_t next[16];
  const auto find = [&](int page) {  // pages lie anywhere, and the machine foresees no further than the next line
    for (int i = 0; i < std::min(16, last - page); i++) {
      next[i] = bounds_of(c, (size_t)s.table[block] * pages + within, head);
      if (++within == pages) within = 0, block++;
      for (int line = 0; line < 2 * d; line += 64) __builtin_prefetch(c.bounds + next[i] * 2 * d + line);
    }
  };
  find(first);
  for (int page = first; page < last; page += 16) {
    const int count = std::min(16, last - page);
    const int8_t* bounds[16];
    f32x16 scales = {};
    for (int i = 0; i < count; i++) bounds[i] = c.bounds + next[i] * 2 * d, scales[i] = c.bound_scales[next[i]];
    find(page + 16);
    i32x16 sums[M][16];
    for (int i = 0; i < count; i++) {
      i32x16 sum[M] = {};
      for (int at = 0; at < 2 * d; at += 32) {
        i8x32 bytes;
        memcpy(&bytes, bounds[i] + at, 32);
        const i32x16 words = (i32x16)__builtin_convertvector(bytes, i16x32);
#pragma GCC unroll 8
        for (int r = 0; r < M; r++) {
          i32x16 query;
          memcpy(&query, q.split + (size_t)r * 2 * d + at, 64);
          sum[r] = add_pairs(sum[r], words, query);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) sums[r][i] = sum[r];
    }
    f32x16 best = {};
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      for (int i = count; i < 16; i++) sums[r][i] = i32x16{};
      const f32x16 score = to_float(sum_rows<1>(sums[r])) * q.unit[r];
      best = r ? vmax(best, score) : score;
    }
    i32x16 found = order_of(best * scales);
    if (more) {
      i32x16 before;
      memcpy(&before, keys + page, 64);
      found = before > found ? before : found;
    }
    memcpy(keys + page, &found, 64);
  }
}

// How many numbers a query's pages' keys take: whole vectors.
static inline int padded_pages(int pages) { return (pages + 15) / 16 * 16; }

// Scores of pages first..last-1 for query `t` of a sequence, as numbers in their order: over the heads that share the kv
// head, the largest.
static inline void score_pages(const Cache& c, const Sequence& s, const Queries& x, float scale, int t, int head, int first, int last, int32_t* keys) {
  static thread_local PageQueries split;
  const int d = c.head_dim, group = x.heads / c.kv_heads;
  const float* q = x.q + (size_t)t * x.stride + (size_t)head * group * d;
  for (int begin = 0, heads; begin < group; begin += heads) {
    heads = std::min(PageQueries::kHeads, group - begin);
    for (int r = 0; r < heads; r++) split.unit[r] = split_query(q + (size_t)(begin + r) * d, scale, d, split.split + (size_t)r * 2 * d);
    switch (heads) {
      case 1: score_pages<1>(c, s, split, head, first, last, begin, keys); break;
      case 2: score_pages<2>(c, s, split, head, first, last, begin, keys); break;
      case 3: score_pages<3>(c, s, split, head, first, last, begin, keys); break;
      case 4: score_pages<4>(c, s, split, head, first, last, begin, keys); break;
      case 5: score_pages<5>(c, s, split, head, first, last, begin, keys); break;
      case 6: score_pages<6>(c, s, split, head, first, last, begin, keys); break;
      case 7: score_pages<7>(c, s, split, head, first, last, begin, keys); break;
      case 8: score_pages<8>(c, s, split, head, first, last, begin, keys); break;
    }
  }
}

// Which pages a query reads.
struct PageBudget {
  int32_t pages;        // in all
  int32_t first, last;  // these are always among them; the last of all holds the query's own token
};

// Of `count` pages, whose keys may be overwritten, those that are read, in the order of positions, as tiles: what `budget`
// always takes, and the best of the others, of equals the earlier. There are at least `budget.pages`.
static inline void choose_pages(const Cache& c, const Sequence& s, int32_t* keys, int count, const PageBudget& budget, int32_t* tiles) {
  constexpr int32_t kNone = INT32_MIN;
  const int others = budget.pages - budget.last, candidates = count - budget.last, padded = padded_pages(candidates);
  for (int i = 0; i < std::min(budget.first, candidates); i++) keys[i] = INT32_MAX;
  for (int i = candidates; i < padded; i++) keys[i] = kNone;
  const auto vector = [&](int i) {
    i32x16 v;
    memcpy(&v, keys + i, 64);
    return v;
  };
  // The others-th largest key, by halving an interval: at least `others` are not below `low`, fewer are not below `high`.
  i32x16 least = splat_int(INT32_MAX), greatest = splat_int(kNone);
  for (int i = 0; i < padded; i += 16) {
    const i32x16 v = vector(i), present = v == kNone ? splat_int(INT32_MAX) : v;
    least = present < least ? present : least, greatest = v > greatest ? v : greatest;
  }
  int64_t low = INT32_MAX, high = kNone;
  for (int i = 0; i < 16; i++) low = std::min<int64_t>(low, least[i]), high = std::max<int64_t>(high, greatest[i] + (int64_t)1);
  for (int reached = candidates; high - low > 1 && reached != others;) {
    const int64_t middle = low + (high - low) / 2;
    i32x16 above = {};
    for (int i = 0; i < padded; i += 16) above -= vector(i) >= (int32_t)middle;
    const int not_below = horizontal_sum(above);
    (not_below >= others ? low : high) = middle;
    if (not_below >= others) reached = not_below;
  }
  i32x16 above = {};
  for (int i = 0; i < padded; i += 16) above -= vector(i) > (int32_t)low;
  int taken = 0, equals = others - horizontal_sum(above);  // of those that are `low`, so many
  for (int i = 0; i < padded; i += 16) {
    const i32x16 v = vector(i);
    uint32_t of_low = lanes_of(v == (int32_t)low), bits = lanes_of(v > (int32_t)low);
    for (; of_low && equals > 0; of_low &= of_low - 1, equals--) bits |= of_low & -of_low;
    for (; bits; bits &= bits - 1) tiles[taken++] = i + __builtin_ctz(bits);
  }
  for (int i = candidates; i < count; i++) tiles[taken++] = i;
  for (int i = 0; i < budget.pages; i++) tiles[i] = (int32_t)(slot_of(s, c.block_size, tiles[i] * kPage) / kPage);
}

}  // namespace arm
