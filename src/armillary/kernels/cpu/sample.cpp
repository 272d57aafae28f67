// One token drawn from a row of logits: temperature, top-k, top-p and min-p without sorting the vocabulary. The law is that of
// kernels/sample.py: weights are integers, so every sum is exact in whatever order it is taken, and no filter's edge moves
// with the way it was found.
#include <math.h>

#include <algorithm>
#include <new>
#include <vector>

#include "simd.h"

using namespace arm;

namespace {

typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

constexpr double kOne = 0x1p44;      // the weight of the likeliest token
constexpr float kLikely = -9.2104f;  // ln 1e-4: a filter looks at these tokens first, and at all only when they do not suffice
constexpr int kBlock = 512;          // tokens whose weights are summed together, to be looked through by the draw

struct Row {
  const float* logits;
  int n;
  float peak, temperature;

  // (logit - peak) / temperature of 16 tokens from `first`; -inf past the end.
  f32x16 scaled(int first) const {
    if (first + 16 <= n) return (load(logits + first) - peak) / temperature;
    f32x16 x = splat(-INFINITY);
    for (int i = 0; first + i < n; i++) x[i] = (logits[first + i] - peak) / temperature;
    return x;
  }
};

struct Candidate {
  float x;
  int32_t token;
  int64_t weight;
};

// round(exp(x) 2^44) for x <= 0; exp is within an ulp of a double: argument reduced by multiples of ln 2, Taylor to degree 13.
i64x8 weights_of(f64x8 x) {
  const f64x8 zero = {}, shift = zero + 0x1.8p52;
  x = x < -40.0 ? zero - 40.0 : x;
  const f64x8 turns = x * 0x1.71547652b82fep0 + shift, n = turns - shift;
  const f64x8 r = (x - n * 0x1.62e42fefa39efp-1) - n * 0x1.abc9e3b39803fp-56;
  f64x8 p = zero + 1.0 / 6227020800.0;
  for (double c : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
    p = p * r + c;
  const i64x8 exponent = (i64x8)turns - (i64x8)shift + (1023 + 44);
  const f64x8 integer = p * (f64x8)(exponent << 52) + 0x1p52;  // the addition rounds to a whole number, half to even
  return (i64x8)integer & 0xfffffffffffff;
}

void weights_of(f32x16 x, i64x8& low, i64x8& high) {
  low = weights_of(__builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), f64x8));
  high = weights_of(__builtin_convertvector(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15), f64x8));
}

int64_t sum(i64x8 v) {
  int64_t total = 0;
  for (int i = 0; i < 8; i++) total += v[i];
  return total;
}

// The integer below u times `total`, and below `total`.
int64_t target_of(double u, int64_t total) { return std::min((int64_t)(u * (double)total), total - 1); }

// Every token may be drawn whose weight is at least `least`.
int32_t draw_of_all(const Row& row, int64_t least, double u) {
  std::vector<int64_t> sums;
  sums.reserve(row.n / kBlock + 1);
  const auto block = [&](int first, int64_t* each) {  // the sum of a block, and each of its weights
    i64x8 total = {}, low, high;
    for (int i = first, end = std::min(first + kBlock, row.n); i < end; i += 16) {
      weights_of(row.scaled(i), low, high);
      low &= low >= least, high &= high >= least;
      total += low + high;
      if (each) memcpy(each + (i - first), &low, 64), memcpy(each + (i - first) + 8, &high, 64);
    }
    return sum(total);
  };
  int64_t total = 0;
  for (int first = 0; first < row.n; first += kBlock) sums.push_back(block(first, nullptr)), total += sums.back();
  int64_t target = target_of(u, total);
  size_t b = 0;
  while (target >= sums[b]) target -= sums[b++];
  int64_t each[kBlock];
  block((int)b * kBlock, each);
  int i = 0;
  while (target >= each[i]) target -= each[i++];
  return (int32_t)b * kBlock + i;
}

// Tokens with x >= floor, in order; gives the sum of all weights of the row.
int64_t gather(const Row& row, float floor, std::vector<Candidate>& out) {
  out.clear();
  i64x8 total = {}, low, high;
  for (int i = 0; i < row.n; i += 16) {
    const f32x16 x = row.scaled(i);
    weights_of(x, low, high);
    total += low + high;
    if (horizontal_sum(x >= floor) == 0) continue;
    for (int j = 0; j < 16 && i + j < row.n; j++)
      if (x[j] >= floor) out.push_back({x[j], i + j, j < 8 ? low[j] : high[j - 8]});
  }
  return sum(total);
}

int64_t mass(const Candidate* c, size_t n) {
  int64_t total = 0;
  for (size_t i = 0; i < n; i++) total += c[i].weight;
  return total;
}

bool heavier(const Candidate& a, const Candidate& b) { return a.x > b.x || (a.x == b.x && a.token < b.token); }
bool earlier(const Candidate& a, const Candidate& b) { return a.token < b.token; }

// Where in the given order the running sum of weights first exceeds `target`, which is below their sum. Afterwards the
// candidates up to there stand first. Halving instead of sorting: n + n/2 + n/4 + ... steps.
template <class Order>
size_t select(std::vector<Candidate>& c, int64_t target, Order order) {
  size_t low = 0, high = c.size();
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    std::nth_element(c.begin() + low, c.begin() + middle, c.begin() + high, order);
    const int64_t before = mass(c.data() + low, middle - low);
    if (target < before)
      high = middle;
    else
      target -= before, low = middle;
  }
  return low;
}

}  // namespace

extern "C" {

// The token that the number u in [0, 1) draws from a row of finite `peak`; -1 when there is no memory for the candidates.
// top_k in 1..n, top_p in (0, 1], min_p in [0, 1].
int32_t arm_sample(const float* logits, int32_t n, float peak, float temperature, int32_t top_k, double top_p, double min_p, double u) try {
  const Row row = {logits, n, peak, temperature};
  const int64_t least = (int64_t)ceil(min_p * kOne);
  if (top_k >= n && top_p >= 1.0) return draw_of_all(row, least, u);
  const auto limit_of = [&](int64_t total) { return std::min(total, (int64_t)ceil(top_p * (double)total)); };
  std::vector<Candidate> c;
  int64_t total = gather(row, kLikely, c);
  if (top_k < n ? c.size() < (size_t)top_k : mass(c.data(), c.size()) < limit_of(total)) gather(row, -INFINITY, c);
  if (top_k < n) {
    if ((size_t)top_k < c.size()) std::nth_element(c.begin(), c.begin() + top_k, c.end(), heavier);
    c.resize(top_k);
    total = mass(c.data(), c.size());
  }
  if (top_p < 1.0) c.resize(select(c, limit_of(total) - 1, heavier) + 1);
  c.erase(std::remove_if(c.begin(), c.end(), [&](const Candidate& one) { return one.weight < least; }), c.end());
  return c[select(c, target_of(u, mass(c.data(), c.size())), earlier)].token;
} catch (const std::bad_alloc&) {
  return -1;
}

// The first token with the largest of those logits whose bit is set in `allowed` (bit t % 32 of word t / 32 for token t), and
// that logit in `peak`; -1 and -inf where all of them are -inf. `out`, unless null, gets the row with -inf for the others.
int32_t arm_allowed(const float* logits, int32_t n, const uint32_t* allowed, float* out, float* peak) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 never = splat(-INFINITY);
  float best = -INFINITY;
  int32_t token = -1;
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const uint32_t bits = allowed[i / 32] >> (i % 32) & 0xffff;
    if (!bits) {
      if (out) store(out + i, never);
      continue;
    }
    f32x16 v = load(logits + i);
    if (bits != 0xffff) v = ((splat_int((int32_t)bits) >> lane) & 1) != 0 ? v : never;
    if (out) store(out + i, v);
    if (horizontal_max(v) <= best) continue;
    for (int j = 0; j < 16; j++)
      if (v[j] > best) best = v[j], token = i + j;
  }
  for (; i < n; i++) {
    const float x = allowed[i / 32] >> (i % 32) & 1 ? logits[i] : -INFINITY;
    if (out) out[i] = x;
    if (x > best) best = x, token = i;
  }
  *peak = best;
  return token;
}

}  // extern "C"
