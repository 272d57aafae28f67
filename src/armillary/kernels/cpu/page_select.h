// Which pages of a long context a query reads (Quest; Tang et al., ICML 2024).
//
// A page is a tile of 16 slots. Beside it lie, for each kv head and component, the largest of its keys and the largest of
// their negatives, so that sum_d max(q_d, 0) above_d + max(-q_d, 0) below_d is at least every q . k in the page. They are
// halves rounded upwards: a bound stays one, and they cost 1/32 of what fp32 keys and values do.
// They are made from the tile's keys as they are stored, up to the last one written: what was there before does not matter
// (drafts that were not accepted, another sequence), nor how many keys came at a time.
#pragma once
#include <algorithm>
#include <vector>

#include "attention.h"

namespace arm {

constexpr int kPage = 16;

// 16 numbers as halves, none below the number itself.
static inline void store_half_above(uint16_t* p, f32x16 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
#else
  store_half(p, v);
  const f32x16 nearest = load_half(p);
  for (int i = 0; i < 16; i++)
    if (nearest[i] < v[i]) p[i] = p[i] == 0x8000 || p[i] == 0 ? 1 : p[i] & 0x8000 ? p[i] - 1 : p[i] + 1;
#endif
}

static inline size_t bounds_of(const Cache& c, size_t tile, int head) { return ((size_t)head * c.tiles + tile) * 2 * c.head_dim; }

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

// The bounds of the first `count` slots of a tile; NaN where a key is not finite, so that its page is always read.
static inline void bound_tile(const Cache& c, size_t tile, int head, int count) {
  const int d = c.head_dim;
  const size_t at = (tile * c.kv_heads + head) * d * 16;
  uint16_t* to = c.bounds + bounds_of(c, tile, head);
  for (int i = 0; i < d; i += 16) {
    f32x16 keys[16];
    keys_of_tile(c, at, i, keys);
    f32x16 above = keys[0], below = -keys[0], poison = keys[0] * 0.0f;
    for (int t = 1; t < count; t++) above = vmax(above, keys[t]), below = vmax(below, -keys[t]), poison += keys[t] * 0.0f;
    store_half_above(to + i, above + poison);
    store_half_above(to + d + i, below + poison);
  }
}

// A page's score as a number whose order is the order in which pages are taken: by score, NaN first, then the earlier one.
static inline uint64_t page_key(float score, int page) {
  uint32_t bits;
  memcpy(&bits, &score, 4);
  bits = score != score ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)page);
}
static inline int page_of(uint64_t key) { return (int)(0xffffffffu - (uint32_t)key); }

// Queries split by sign, [heads][d]: above = max(q, 0), below = max(-q, 0).
struct PageQueries {
  static constexpr int kHeads = 8;  // at a time
  alignas(64) float above[kHeads * kMaxHeadDim], below[kHeads * kMaxHeadDim];
};

// The largest of M queries' scores for a page.
template <int M>
static inline __attribute__((always_inline)) float page_score(const PageQueries& q, int d, const uint16_t* bounds) {
  f32x16 above[M] = {}, below[M] = {};
  for (int i = 0; i < d; i += 16) {
    const f32x16 largest = load_half(bounds + i), smallest = load_half(bounds + d + i);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) above[r] += load(q.above + (size_t)r * d + i) * largest, below[r] += load(q.below + (size_t)r * d + i) * smallest;
  }
  float best = horizontal_sum(above[0] + below[0]);
#pragma GCC unroll 8
  for (int r = 1; r < M; r++) {
    const float other = horizontal_sum(above[r] + below[r]);
    best = best >= other || best != best ? best : other;  // NaN stays
  }
  return best;
}

template <int M>
static void score_pages(const Cache& c, const Sequence& s, const PageQueries& q, int head, int first, int last, bool more, uint64_t* keys) {
  constexpr int kAhead = 8;  // pages: blocks lie anywhere, and the machine foresees no further than the next line
  const auto bounds_at = [&](int page) { return c.bounds + bounds_of(c, slot_of(s, c.block_size, page * kPage) / kPage, head); };
  for (int page = first; page < last; page++) {
    if (page + kAhead < last)
      for (int i = 0; i < 2 * c.head_dim; i += 32) __builtin_prefetch(bounds_at(page + kAhead) + i);
    const uint16_t* bounds = bounds_at(page);
    const uint64_t key = page_key(page_score<M>(q, c.head_dim, bounds), page);
    keys[page] = more ? std::max(keys[page], key) : key;
  }
}

// Scores of pages first..last-1 for query `t` of a sequence: over the heads that share the kv head, the largest.
static inline void score_pages(const Cache& c, const Sequence& s, const Queries& x, float scale, int t, int head, int first, int last, uint64_t* keys) {
  static thread_local PageQueries split;
  const int d = c.head_dim, group = x.heads / c.kv_heads;
  const float* q = x.q + (size_t)t * x.stride + (size_t)head * group * d;
  for (int begin = 0, heads; begin < group; begin += heads) {
    heads = std::min(PageQueries::kHeads, group - begin);
    for (int i = 0; i < heads * d; i += 16) {
      const f32x16 v = load(q + (size_t)begin * d + i) * scale;
      store(split.above + i, vmax(f32x16{}, v));
      store(split.below + i, vmax(f32x16{}, -v));
    }
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

// Moves the `most` largest of `count` different keys to the front: counted in 2^11 equal parts of their range, and only those
// of the part that the last one taken falls into are compared.
static inline void take_largest(uint64_t* keys, int count, int most) {
  if (most <= 0 || most >= count) return;
  static thread_local int counts[1 << 11];
  static thread_local std::vector<uint64_t> ties;
  uint64_t low = keys[0], high = keys[0];
  for (int i = 1; i < count; i++) low = std::min(low, keys[i]), high = std::max(high, keys[i]);
  const int shift = std::max(0, 53 - __builtin_clzll(high - low));
  memset(counts, 0, sizeof(counts));
  for (int i = 0; i < count; i++) counts[(keys[i] - low) >> shift]++;
  int part = (1 << 11) - 1, above = 0;  // keys in the parts above
  while (above + counts[part] < most) above += counts[part--];
  int taken = 0, tied = 0;
  ties.resize(counts[part]);
  for (int i = 0; i < count; i++) {
    const int own = (int)((keys[i] - low) >> shift);
    if (own > part)
      keys[taken++] = keys[i];
    else if (own == part)
      ties[tied++] = keys[i];
  }
  std::nth_element(ties.begin(), ties.begin() + (most - above), ties.end(), std::greater<uint64_t>());
  std::copy_n(ties.begin(), most - above, keys + taken);
}

// Of `count` pages with their keys (which are reordered) the `most` that are read, in the order of positions, as tiles: the
// last page, which holds the query's own token, and the best of the others.
static inline void choose_pages(const Cache& c, const Sequence& s, uint64_t* keys, int count, int most, int32_t* tiles) {
  const int others = most - 1;
  take_largest(keys, count - 1, others);
  for (int i = 0; i < others; i++) tiles[i] = page_of(keys[i]);
  std::sort(tiles, tiles + others);
  tiles[others] = count - 1;
  for (int i = 0; i < most; i++) tiles[i] = (int32_t)(slot_of(s, c.block_size, tiles[i] * kPage) / kPage);
}

}  // namespace arm
