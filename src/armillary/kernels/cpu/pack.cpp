// Weights laid out once for the products of gemm.h. Source: fp32 rows [n][k], or the blocks of a GGUF file as they are.
#include <math.h>

#include <algorithm>
#include <vector>

#include "wide.h"

using namespace arm;

namespace {

uint16_t to_half(float x) {
  uint16_t out[16];
  store_half(out, splat(x));
  return out[0];
}
float from_half(uint16_t h) {
  uint16_t in[16];
  for (auto& x : in) x = h;
  return load_half(in)[0];
}

// One group of 32 weights of one column to levels 0..15 (or 0..255), its fp16 scale and minimum.
void quantise_group(const float* x, int32_t format, uint8_t* level, uint16_t& scale, uint16_t& minimum) {
  float low = x[0], high = x[0], extreme = 0.0f;
  for (int i = 0; i < kGroup; i++) {
    low = std::min(low, x[i]), high = std::max(high, x[i]);
    if (fabsf(x[i]) > fabsf(extreme)) extreme = x[i];
  }
  float d, offset;
  int top;
  if (format == Q4M) {
    scale = to_half((high - low) / 15.0f), minimum = to_half(low);
    d = from_half(scale), offset = -from_half(minimum), top = 15;
  } else if (format == Q4) {  // the largest magnitude becomes -8, as in GGUF's Q4_0
    scale = to_half(extreme / -8.0f), d = from_half(scale), offset = 8.0f * d, top = 15;
  } else {
    scale = to_half(fabsf(extreme) / 127.0f), d = from_half(scale), offset = 128.0f * d, top = 255;
  }
  for (int i = 0; i < kGroup; i++) level[i] = d == 0.0f ? (format == Q4M ? 0 : format == Q4 ? 8 : 128) : (uint8_t)std::min(top, std::max(0, (int)floorf((x[i] + offset) / d + 0.5f)));
}

bool finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

// Where the rows of a matrix go: row j to a column of the weight. The tiles of `of` matrices alternate (1: none do).
struct Columns {
  int first, of, width;
  int operator[](int row) const { return first + row / width * width * of + row % width; }
};

// A group's place in a weight of 16-column tiles.
struct Slot {
  uint8_t* data;
  uint16_t *scale, *minimum;
};
Slot slot_of(int32_t format, int column, int g, int groups, void* data, uint16_t* scales, uint16_t* minimums) {
  const size_t group = (size_t)(column / 16) * groups + g, at = group * 16 + column % 16;
  return {(uint8_t*)data + group * (format == Q8 ? 512 : 256) + 4 * (column % 16), scales + at, minimums + at};
}

// GGUF's block types (ggml-common.h), by the ids that the files use.
enum Stored : int32_t { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, Q4_K = 12 };

uint16_t half_at(const uint8_t* p) { return (uint16_t)(p[0] | p[1] << 8); }

// 16 bytes whose low nibbles are levels 0..15 of a group and whose high nibbles are 16..31: the order of Q4_0 and Q4_1 is
// the layout's own, so that a block is four moves of four bytes.
void put_nibbles(const uint8_t* nibbles, uint8_t* to) {
  for (int j = 0; j < 4; j++) memcpy(to + 64 * j, nibbles + 4 * j, 4);
}

// One block of one column to the groups from `g` on. False when a scale or a minimum is not finite in half precision.
bool put_block(int32_t stored, const uint8_t* block, int32_t format, int column, int g, int groups, void* data, uint16_t* scales, uint16_t* minimums) {
  const Slot to = slot_of(format, column, g, groups, data, scales, minimums);
  if (stored == Q8_0) {
    for (int j = 0; j < 8; j++) {
      uint32_t four;
      memcpy(&four, block + 2 + 4 * j, 4);
      four ^= 0x80808080u;  // q + 128
      memcpy(to.data + 64 * j, &four, 4);
    }
    return finite(*to.scale = half_at(block));
  }
  if (stored == Q4_0) {
    const uint16_t d = *to.scale = half_at(block);
    if (format == Q8) {
      for (int i = 0; i < kGroup; i++) {
        const int level = i < 16 ? block[2 + i] & 15 : block[2 + i - 16] >> 4;
        to.data[64 * (i / 4) + i % 4] = (uint8_t)(level - 8 + 128);
      }
      return finite(d);
    }
    put_nibbles(block + 2, to.data);
    if (format == Q4M) *to.minimum = to_half(-8.0f * from_half(d));  // exact: a power of two
    return finite(d) && (format != Q4M || finite(*to.minimum));
  }
  if (stored == Q4_1) {
    *to.scale = half_at(block), *to.minimum = half_at(block + 2);
    put_nibbles(block + 4, to.data);
    return finite(*to.scale) && finite(*to.minimum);
  }
  const float d = from_half(half_at(block)), dmin = from_half(half_at(block + 2));
  const uint8_t *packed = block + 4, *levels = block + 16;  // eight 6-bit scales and minima; chunks of two groups of 32
  bool good = true;
  for (int i = 0; i < 8; i++) {
    const int scale = i < 4 ? packed[i] & 63 : (packed[i + 4] & 15) | (packed[i - 4] >> 6 << 4);
    const int minimum = i < 4 ? packed[i + 4] & 63 : packed[i + 4] >> 4 | (packed[i] >> 6 << 4);
    const Slot here = slot_of(format, column, g + i, groups, data, scales, minimums);
    *here.scale = to_half(d * (float)scale), *here.minimum = to_half(-(dmin * (float)minimum));
    good = good && finite(*here.scale) && finite(*here.minimum);
    const uint8_t* chunk = levels + 32 * (i / 2);
    uint8_t nibbles[16];
    for (int j = 0; j < 16; j++) nibbles[j] = i % 2 == 0 ? (uint8_t)((chunk[j] & 15) | (chunk[j + 16] & 15) << 4) : (uint8_t)(chunk[j] >> 4 | (chunk[j + 16] & 0xf0));
    put_nibbles(nibbles, here.data);
  }
  return good;
}

}  // namespace

extern "C" {

// What arm_pack and arm_pack_blocks answer.
enum { kPacked = 0, kNotFinite = 1, kBeyondHalf = 2 };

// Rows [n][k] go to columns `column`, `column + 1`, ... of a weight of `format` whose arrays are zeroed and padded; with
// `alternate` 2 every second tile is left to another matrix. Columns never share a byte, so that pieces may be packed by
// several threads at once. kNotFinite: a weight is NaN or infinite; kBeyondHalf: the format's half precision does not hold one.
int32_t arm_pack(int32_t format, const float* w, int32_t n, int32_t k, int64_t stride, int32_t column, int32_t alternate, void* data, uint16_t* scales, uint16_t* minimums) {
  float poison = 0.0f;  // becomes NaN with the first NaN or infinity
  for (int j = 0; j < n; j++) {
    f32x16 row = {};
    int i = 0;
    for (; i + 16 <= k; i += 16) row += load(w + (size_t)j * stride + i) * 0.0f;
    for (; i < k; i++) poison += w[(size_t)j * stride + i] * 0.0f;
    poison += horizontal_sum(row);
  }
  if (poison != 0.0f) return kNotFinite;
  const Columns columns = {column, alternate, format <= F16 ? kPanel : 16};
  bool holds = true;
  if (format <= F16) {
    constexpr int kRun = 64;  // of k at a time: the panel's part that is being written stays in the first-level cache
    for (int first = 0; first < k; first += kRun)
      for (int j = 0; j < n; j++) {
        const int c = columns[j], last = std::min(k, first + kRun);
        const size_t panel = (size_t)(c / kPanel) * k * kPanel + c % kPanel;
        for (int i = first; i < last; i++) {
          const float x = w[(size_t)j * stride + i];
          if (format == F32) {
            ((float*)data)[panel + (size_t)i * kPanel] = x;
          } else {
            const uint16_t half = to_half(x);
            ((uint16_t*)data)[panel + (size_t)i * kPanel] = half;
            holds = holds && finite(half);
          }
        }
      }
    return holds ? kPacked : kBeyondHalf;
  }
  const int groups = padded_k(k) / kGroup;
  for (int j = 0; j < n; j++)
    for (int g = 0; g < groups; g++) {
      float x[kGroup] = {};
      memcpy(x, w + (size_t)j * stride + (size_t)g * kGroup, (size_t)std::min(kGroup, k - g * kGroup) * 4);
      uint8_t level[kGroup];
      uint16_t scale = 0, minimum = 0;
      quantise_group(x, format, level, scale, minimum);
      if (!finite(scale) || !finite(minimum)) return kBeyondHalf;
      const Slot to = slot_of(format, columns[j], g, groups, data, scales, minimums);
      *to.scale = scale;
      if (format == Q4M) *to.minimum = minimum;
      if (format == Q8) {
        for (int i = 0; i < kGroup; i += 4) memcpy(to.data + 16 * i, level + i, 4);
      } else {
        for (int i = 0; i < 16; i++) level[i] = (uint8_t)(level[i] | level[i + 16] << 4);
        put_nibbles(level, to.data);
      }
    }
  return kPacked;
}

// The same for rows of a GGUF file's blocks, `stride` bytes apart, k a multiple of the block. Q4_0 goes to Q4, Q4M and Q8,
// Q4_1 to Q4M and Q8_0 to Q8 without loss; of Q4_K, which goes to Q4M, each group's scale and minimum are rounded to half.
int32_t arm_pack_blocks(int32_t format, int32_t stored, const uint8_t* w, int32_t n, int32_t k, int64_t stride, int32_t column, int32_t alternate, void* data, uint16_t* scales, uint16_t* minimums) {
  const int bytes = stored == Q4_0 ? 18 : stored == Q4_1 ? 20 : stored == Q8_0 ? 34 : 144;
  const int span = stored == Q4_K ? 8 : 1, groups = k / kGroup;
  const Columns columns = {column, alternate, 16};
  for (int tile = 0; tile < n; tile += 16)  // a tile's 16 columns are written together, group by group
    for (int g = 0; g < groups; g += span)
      for (int j = tile; j < std::min(n, tile + 16); j++) {
        const uint8_t* block = w + (size_t)j * stride + (size_t)(g / span) * bytes;
        if (put_block(stored, block, format, columns[j], g, groups, data, scales, minimums)) continue;
        const bool given = finite(half_at(block)) && (stored == Q8_0 || stored == Q4_0 || finite(half_at(block + 2)));
        return given ? kBeyondHalf : kNotFinite;
      }
  return kPacked;
}

// Tells `n` bytes (and where they belong, `seed`) from others: 64-bit lanes multiplied and rotated, at the speed of memory.
// It finds damage, not malice. No byte order but little-endian is served here.
uint64_t arm_checksum(const uint8_t* bytes, int64_t n, uint64_t seed) {
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15ull;
  uint64_t lane[8];
  for (int i = 0; i < 8; i++) lane[i] = (seed + (uint64_t)i + 1) * kOdd;
  const auto mix = [&](const uint8_t* from) {
    for (int i = 0; i < 8; i++) {
      uint64_t x;
      memcpy(&x, from + 8 * i, 8);
      lane[i] = (lane[i] ^ x) * kOdd;
      lane[i] ^= lane[i] >> 29;
    }
  };
  int64_t at = 0;
  for (; at + 64 <= n; at += 64) mix(bytes + at);
  uint8_t last[64] = {};
  memcpy(last, bytes + at, (size_t)(n - at));
  mix(last);
  uint64_t sum = (uint64_t)n;
  for (int i = 0; i < 8; i++) sum = (sum ^ lane[i]) * kOdd, sum ^= sum >> 32;
  return sum;
}

// What the packed weight stands for, as fp32 rows [n][k]: the law that the products are tested against.
void arm_unpack(const Weight* w, float* out) {
  const int groups = padded_k(w->k) / kGroup;
  for (int c = 0; c < w->n; c++)
    for (int i = 0; i < w->k; i++) {
      float y;
      if (w->format <= F16) {
        const size_t at = ((size_t)(c / kPanel) * w->k + i) * kPanel + c % kPanel;
        y = w->format == F32 ? ((const float*)w->data)[at] : from_half(((const uint16_t*)w->data)[at]);
      } else {
        const size_t group = (size_t)(c / 16) * groups + i / kGroup;
        const int byte = i % kGroup / 4, at = 4 * (c % 16) + i % 4;
        const float d = from_half(w->scales[group * 16 + c % 16]);
        if (w->format == Q8) {
          y = d * (float)(((const uint8_t*)w->data)[group * 512 + (size_t)byte * 64 + at] - 128);
        } else {
          const uint8_t b = ((const uint8_t*)w->data)[group * 256 + (size_t)(byte % 4) * 64 + at];
          const int level = byte < 4 ? b & 15 : b >> 4;
          y = w->format == Q4 ? d * (float)(level - 8) : d * (float)level + from_half(w->minimums[group * 16 + c % 16]);
        }
      }
      out[(size_t)c * w->k + i] = y;
    }
}

// y [rows][n] = x [rows][k] W^T, on the calling thread: what the tests and the benchmark call.
void arm_multiply(const Weight* w, const float* x, int32_t rows, float* y) {
  const int pk = padded_k(w->k);
  std::vector<int8_t> quants;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  if (w->format > F16) {
    const size_t padded = padded_rows(rows);
    quants.resize(padded * pk), scales.resize(padded * pk / kGroup), sums.resize(padded * pk / kGroup);
    for (int r = 0; r < rows; r++) quantise_row(x + (size_t)r * w->k, w->k, r, sum_factor(w->format), {quants.data(), scales.data(), sums.data()});
  }
  const Rows input = {x, quants.data(), scales.data(), sums.data()};
  for (int t = 0; t < tiles(*w); t++)
    multiply_tile(*w, t, input, rows, [&](int r, int column, f32x16 v) {
      for (int i = 0; i < 16 && column + i < w->n; i++) y[(size_t)r * w->n + column + i] = v[i] + (w->bias ? w->bias[column + i] : 0.0f);
    });
}

// The same by wide.h, which only the 4-bit formats know.
void arm_multiply_wide(const Weight* w, const float* x, int32_t rows, float* y) {
  const size_t padded = padded_rows(rows), pk = padded_k(w->k), blocks = wide_blocks(w->k);
  std::vector<int8_t> quants(padded * pk);
  std::vector<float> scales(padded * blocks);
  std::vector<int32_t> sums(padded * blocks);
  for (int r = 0; r < rows; r++) quantise_wide(x + (size_t)r * w->k, w->k, r, {quants.data(), scales.data(), sums.data()});
  const WideRows input = {quants.data(), scales.data(), sums.data()};
  for (int t = 0; t < tiles(*w); t++)
    multiply_tile_wide(*w, t, input, rows, [&](int r, int column, f32x16 v) {
      for (int i = 0; i < 16 && column + i < w->n; i++) y[(size_t)r * w->n + column + i] = v[i] + (w->bias ? w->bias[column + i] : 0.0f);
    });
}

}  // extern "C"
