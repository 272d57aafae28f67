// Weights laid out once for the products of gemm.h. Source: fp32 rows [n][k].
#include <math.h>

#include <algorithm>

#include "gemm.h"

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

}  // namespace

extern "C" {

// Rows [n][k] go to columns `column`, `column + 1`, ... of a weight of `format` whose arrays are zeroed and padded.
// Columns never share a byte, so that pieces may be packed by several threads at once. Returns 0 when a weight is not finite.
int32_t arm_pack(int32_t format, const float* w, int32_t n, int32_t k, int64_t stride, int32_t column, void* data, uint16_t* scales, uint16_t* minimums) {
  float poison = 0.0f;  // becomes NaN with the first NaN or infinity
  for (int j = 0; j < n; j++) {
    f32x16 row = {};
    int i = 0;
    for (; i + 16 <= k; i += 16) row += load(w + (size_t)j * stride + i) * 0.0f;
    for (; i < k; i++) poison += w[(size_t)j * stride + i] * 0.0f;
    poison += horizontal_sum(row);
  }
  if (poison != 0.0f) return 0;
  if (format <= F16) {
    constexpr int kRun = 64;  // of k at a time: the panel's part that is being written stays in the first-level cache
    for (int first = 0; first < k; first += kRun)
      for (int j = 0; j < n; j++) {
        const int c = column + j, last = std::min(k, first + kRun);
        const size_t panel = (size_t)(c / kPanel) * k * kPanel + c % kPanel;
        for (int i = first; i < last; i++) {
          const float x = w[(size_t)j * stride + i];
          if (format == F32)
            ((float*)data)[panel + (size_t)i * kPanel] = x;
          else
            ((uint16_t*)data)[panel + (size_t)i * kPanel] = to_half(x);
        }
      }
    return 1;
  }
  const int groups = padded_k(k) / kGroup;
  for (int j = 0; j < n; j++) {
    const int c = column + j;
    for (int g = 0; g < groups; g++) {
      float x[kGroup] = {};
      memcpy(x, w + (size_t)j * stride + (size_t)g * kGroup, (size_t)std::min(kGroup, k - g * kGroup) * 4);
      uint8_t level[kGroup];
      uint16_t scale = 0, minimum = 0;
      quantise_group(x, format, level, scale, minimum);
      const size_t group = (size_t)(c / 16) * groups + g;
      scales[group * 16 + c % 16] = scale;
      if (format == Q4M) minimums[group * 16 + c % 16] = minimum;
      for (int i = 0; i < kGroup; i++) {
        const int byte = i / 4, at = 4 * (c % 16) + i % 4;
        if (format == Q8) {
          ((uint8_t*)data)[group * 512 + (size_t)byte * 64 + at] = level[i];
        } else {
          uint8_t& b = ((uint8_t*)data)[group * 256 + (size_t)(byte % 4) * 64 + at];
          b = byte < 4 ? (uint8_t)((b & 0xf0) | level[i]) : (uint8_t)((b & 0x0f) | (level[i] << 4));
        }
      }
    }
  }
  return 1;
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
  const int pk = padded_k(w->k), groups = pk / kGroup;
  int8_t* quants = nullptr;
  float* scales = nullptr;
  int32_t* sums = nullptr;
  if (w->format > F16) {
    const size_t padded = padded_rows(rows);
    quants = new int8_t[padded * pk], scales = new float[padded * groups], sums = new int32_t[padded * groups];
    for (int r = 0; r < rows; r++) quantise_row(x + (size_t)r * w->k, w->k, r, sum_factor(w->format), quants, scales, sums);
  }
  const Rows input = {x, quants, scales, sums};
  for (int t = 0; t < tiles(*w); t++)
    multiply_tile(*w, t, input, rows, [&](int r, int column, f32x16 v) {
      for (int i = 0; i < 16 && column + i < w->n; i++) y[(size_t)r * w->n + column + i] = v[i] + (w->bias ? w->bias[column + i] : 0.0f);
    });
  delete[] quants, delete[] scales, delete[] sums;
}

// x [rows][k] to quants, scales and sums in the layout of gemm.h's Rows (rows padded to 16, factor 1).
void arm_quantise_rows(const float* x, int32_t rows, int32_t k, int8_t* quants, float* scales, int32_t* sums) {
  for (int r = 0; r < rows; r++) quantise_row(x + (size_t)r * k, k, r, 1, quants, scales, sums);
}

}  // extern "C"
