// One iteration of a decoder over a flat batch of tokens, in one call: embedding, every layer, the head for the sampled
// rows. Phases are split over the pool's threads by output columns (products), by rows (norms) or by work items
// (attention); a barrier stands between phases.
#include <math.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "attention_plan.h"
#include "gemm.h"
#include "low_rank.h"
#include "pool.h"
#include "wide.h"

using namespace arm;

namespace {

enum Activation : int32_t { SILU = 0, GELU_TANH = 1, RELU = 2 };

struct Layer {
  Weight qkv, o, gate_up, down;
  const float *attention_norm, *mlp_norm;            // [hidden]
  const float *post_attention_norm, *post_mlp_norm;  // [hidden] or null (sandwich norms)
  const float *q_norm, *k_norm;                      // [head_dim] or null
  Cache cache;
  int32_t window;  // 0: none
  int32_t rope;    // which of the model's two rotary embeddings
};

struct Model {
  int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, activation;
  float norm_eps, attention_scale, attention_softcap, logit_softcap, embedding_scale;
  int32_t embedding_half;  // the embedding table is fp16
  int32_t deterministic;   // results must not depend on the batch: no product goes by wide.h
  Bounds bounds;           // of what queries see
  const void* embedding;   // [vocabulary][hidden]
  const float* final_norm;
  const Layer* layer;
  Weight head;
  const float* inverse_frequencies[2];  // [head_dim/2]; the second may be null
  float rope_scaling[2];                // what cosines and sines are multiplied by
};

struct Batch {
  int32_t tokens, sequences, sampled, adapters;
  const int32_t* token;        // [tokens]
  const int32_t* position;     // [tokens]
  const Sequence* sequence;    // [sequences]
  const int32_t* sampled_row;  // [sampled] rows whose logits are wanted
  float* logits;               // [sampled][vocabulary]
  float* peak;                 // [sampled] the largest logit; NaN when any is NaN
  int32_t* best;               // [sampled] the first token that has it
  const LowRank* const* adapter;  // [adapters], each [layers][PARTS]
  const int32_t* adapter_of;      // [sequences] which of them is theirs, -1 for none; not read when there are no adapters
  float* hidden;                  // [sampled][hidden] what the final norm reads of the sampled rows; null when nobody wants it
};

// Which rows have which adapter: of the batch, or of the sampled rows.
struct Adapted {
  std::vector<int> adapter_of;      // of each row, -1 for none; empty where no row has any
  std::vector<LowRankRows> blocks;  // rows of one adapter, a few at a time
};

// Memory that starts on a cache line, so that 16 floats are stored into one, and on huge pages where it is large: a tile of
// a product writes a line in each row, and rows lie on pages of their own.
template <class T>
class Buffer {
 public:
  ~Buffer() { free(data_); }
  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  void grow(size_t count) {
    const size_t page = count * sizeof(T) < kHuge ? 64 : kHuge, size = (count * sizeof(T) + page - 1) / page * page;
    void* memory = aligned_alloc(page, size);
    if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (page == kHuge) madvise(memory, size, MADV_HUGEPAGE);
#endif
    memset(memory, 0, size);
    free(data_);
    data_ = (T*)memory;
  }

 private:
  static constexpr size_t kHuge = 2 << 20;
  T* data_ = nullptr;
};

struct Buffers {
  int rows = 0;
  Buffer<float> x, normed, qkv, attended, hidden, scales;
  Buffer<float> cosines[2], sines[2];  // [rows][head_dim/2] of each rotary embedding
  Buffer<int8_t> quants;
  Buffer<int32_t> sums;
  Buffer<float> picked_x, picked_attended;  // of the last layer: the sampled rows
  std::vector<int> runs;  // of each sequence: in how many pieces its tokens go to the cache (run_of)
  AttentionPlans attention;
  Adapted adapted, picked_adapted;
  int low_rank = 0;        // the largest rank of the batch's adapters, padded
  std::vector<float> low;  // [rows][3][low_rank] scale * A x of up to three parts of a product
};

// Where an iteration's time goes, measured on the calling thread: a clock's reading a phase, 7 a layer.
enum Phase { PREPARE, QKV, ROPE, SELECT, ATTENTION, O, GATE_UP, DOWN, HEAD, EMBED, PHASES };

struct Engine {
  explicit Engine(int threads) : pool(threads) {}
  Pool pool;
  Buffers buffers;
  int64_t nanoseconds[PHASES] = {};  // since the engine was made
};

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  f32x16 total = f32x16{};
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    f32x16 v = load(x + i);
    total += v * v;
  }
  float sum = horizontal_sum(total);
  for (; i < n; i++) sum += x[i] * x[i];
  const float scale = 1.0f / sqrtf(sum / (float)n + eps);
  for (i = 0; i + 16 <= n; i += 16) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < n; i++) out[i] = x[i] * scale * weight[i];
}

inline f32x16 activate(f32x16 x, int kind) {
  if (kind == SILU) return x / (exp16(-x) + 1.0f);
  if (kind == RELU) return x < 0.0f ? f32x16{} : x;  // in this order NaN stays NaN
  f32x16 inner = (x + x * x * x * 0.044715f) * 0.7978845608028654f;
  return x * 0.5f * (tanh16(inner) + 1.0f);
}

// What of [0, n) belongs to `thread`.
inline void share(int n, int thread, int threads, int& begin, int& end) {
  begin = (int)((int64_t)n * thread / threads);
  end = (int)((int64_t)n * (thread + 1) / threads);
}

inline bool is_integer(const Weight& w) { return w.format > F16; }

inline void put(float* out, int column, int n, f32x16 v) {
  if (column + 16 <= n) return store(out + column, v);
  for (int i = 0; column + i < n; i++) out[column + i] = v[i];
}
inline f32x16 get(const float* in, int column, int n) {
  if (column + 16 <= n) return load(in + column);
  f32x16 v = {};
  for (int i = 0; column + i < n; i++) v[i] = in[column + i];
  return v;
}

// The largest of n numbers and where it first stands; NaN if any is NaN.
void find_peak(const float* x, int n, float& peak, int32_t& best) {
  f32x16 top = splat(-INFINITY), poison = {};
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 v = load(x + i);
    top = vmax(top, v);
    poison = v == v ? poison : v;
  }
  peak = horizontal_max(top);
  bool nan = false;
  for (int j = 0; j < 16; j++) nan |= poison[j] != poison[j];
  for (; i < n; i++) peak = x[i] > peak ? x[i] : peak, nan |= x[i] != x[i];
  best = 0;
  if (nan) {
    peak = NAN;
    return;
  }
  while (best < n - 1 && x[best] != peak) best++;
}

// The low-rank terms of a product of layer `layer` whose parts begin with `first`; none when `rows` is null.
struct Terms {
  const Adapted* rows = nullptr;
  int layer = 0, first = 0;
  explicit operator bool() const { return rows; }
};

// Whether queries of a layer see less than what is before them, beside a sliding window: its attention goes by plan 1.
inline bool bounds_what_is_seen(const Model& m, int layer) {
  return m.bounds.rolling || (m.bounds.read.pages && layer >= m.bounds.dense_layers && !m.layer[layer].window);
}

struct Run {
  Engine& engine;
  const Model& m;
  const Batch& b;
  const int thread, threads;
  Buffers& u;
  std::chrono::steady_clock::time_point began = std::chrono::steady_clock::now();

  void barrier() { engine.pool.barrier(); }

  void finish(Phase phase) {  // all threads have done their part of it
    barrier();
    if (thread) return;
    const auto now = std::chrono::steady_clock::now();
    engine.nanoseconds[phase] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - began).count();
    began = now;
  }

  // Rows as a product takes them: one by one, or many at once (wide.h).
  struct Ready {
    Rows rows;
    WideRows wide;
    bool is_wide;
  };

  // Rows of `source` made ready for `w`: normed by `weight` when given (only then may `pick` choose rows), quantised when
  // the format wants it. Ends with a barrier.
  Ready ready(const Weight& w, const float* source, int stride, int rows, const float* weight, const int32_t* pick = nullptr) {
    const int k = w.k;
    const QuantisedRows to = {u.quants.data(), u.scales.data(), u.sums.data()};
    const bool is_wide = !m.deterministic && wide(w, rows);
    int begin, end;
    share(rows, thread, threads, begin, end);
    for (int r = begin; r < end; r++) {
      const float* x = source + (size_t)(pick ? pick[r] : r) * stride;
      float* normed = u.normed.data() + (size_t)r * k;
      if (weight) {
        rms_norm(x, weight, k, m.norm_eps, normed);
        x = normed;
      }
      if (is_wide)
        quantise_wide(x, k, r, to);
      else if (is_integer(w))
        quantise_row(x, k, r, sum_factor(w.format), to);
    }
    finish(PREPARE);
    return {{weight ? u.normed.data() : source, to.quants, to.scales, to.sums}, {to.quants, to.scales, to.sums}, is_wide};
  }

  // scale * A x of every row that has an adapter, x being the rows [rows][k] that the product reads. Ends with a barrier.
  Terms low_rank(Phase phase, const Adapted& rows, int layer, int first, int parts, const float* x, int k) {
    if (rows.blocks.empty()) return {};
    const int panels = u.low_rank / 16, each = parts * panels;
    int begin, end;
    share((int)rows.blocks.size() * each, thread, threads, begin, end);
    for (int i = begin; i < end; i++) {
      const LowRankRows& block = rows.blocks[i / each];
      const int part = i % each / panels, panel = i % panels;
      const LowRank& low = b.adapter[block.adapter][(size_t)layer * PARTS + first + part];
      if (panel * 16 >= low.rank) continue;
      const float* from[kLowRankRows];
      f32x16 y[kLowRankRows];
      for (int r = 0; r < block.count; r++) from[r] = x + (size_t)block.row[r] * k;
      shrink_rows(low.a + (size_t)panel * k * 16, k, from, block.count, y);
      for (int r = 0; r < block.count; r++) store(u.low.data() + ((size_t)block.row[r] * 3 + part) * u.low_rank + panel * 16, y[r] * low.scale);
    }
    finish(phase);
    return {&rows, layer, first};
  }

  // Adds to y, 16 columns from `column` on of part `part` of a product, the low-rank term of row `r`.
  void add_term(const Terms& terms, int r, int part, int column, f32x16& y) const {
    const int adapter = terms.rows->adapter_of[r];
    if (adapter < 0) return;
    const LowRank& low = b.adapter[adapter][(size_t)terms.layer * PARTS + terms.first + part];
    if (low.rank) y += expand(low.b + (size_t)column * low.rank, u.low.data() + ((size_t)r * 3 + part) * u.low_rank, low.rank);
  }

  template <class Sink>
  void product(const Weight& w, int tile, const Ready& x, int rows, const Sink& sink) {
    if constexpr (kHasWide)  // elsewhere it is not even compiled
      if (x.is_wide) return multiply_tile_wide(w, tile, x.wide, rows, sink);
    multiply_tile(w, tile, x.rows, rows, sink);
  }

  // out = rows W^T + bias + terms, added to what is there when `add`. Ends with a barrier.
  void multiply(Phase phase, const Weight& w, const Ready& x, int rows, float* out, int stride, bool add, const Terms& terms = {}) {
    const int q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;  // where a product has three parts
    int begin, end;
    share(tiles(w), thread, threads, begin, end);
    for (int t = begin; t < end; t++)
      product(w, t, x, rows, [&](int r, int column, f32x16 y) {
        if (column >= w.n) return;
        float* to = out + (size_t)r * stride;
        if (w.bias) y += get(w.bias, column, w.n);
        if (terms) {
          const int part = terms.first == PART_Q && column >= q ? 1 + (column >= q + kv) : 0;
          add_term(terms, r, part, column - (part ? q + (part - 1) * kv : 0), y);
        }
        if (add) y += get(to, column, w.n);
        put(to, column, w.n, y);
      });
    finish(phase);
  }

  // hidden = activation(gate) * up; the weight holds gate's and up's tiles in turn, 16 (or 48) columns each.
  void gated(const Weight& w, const Ready& x, int rows, const Terms& terms) {
    const int width = tile_width(w), pairs = tiles(w) / 2, n = m.intermediate;
    int begin, end;
    share(pairs, thread, threads, begin, end);
    for (int t = begin; t < end; t++) {
      product(w, 2 * t, x, rows, [&](int r, int column, f32x16 y) {
        const int at = column - width * t;
        if (at >= n) return;
        if (w.bias) y += load(w.bias + column);
        if (terms) add_term(terms, r, 0, at, y);
        put(u.hidden.data() + (size_t)r * n, at, n, activate(y, m.activation));
      });
      product(w, 2 * t + 1, x, rows, [&](int r, int column, f32x16 y) {
        const int at = column - width * (t + 1);
        if (at >= n) return;
        if (w.bias) y += load(w.bias + column);
        if (terms) add_term(terms, r, 1, at, y);
        float* to = u.hidden.data() + (size_t)r * n;
        put(to, at, n, y * get(to, at, n));
      });
    }
    finish(GATE_UP);
  }

  void rotate(float* head, const float* norm, const float* cosines, const float* sines) {
    const int d = m.head_dim, h = d / 2;
    if (norm) rms_norm(head, norm, d, m.norm_eps, head);
    int i = 0;
    for (; i + 16 <= h; i += 16) {
      f32x16 a = load(head + i), c = load(head + h + i), cs = load(cosines + i), sn = load(sines + i);
      store(head + i, a * cs - c * sn);
      store(head + h + i, c * cs + a * sn);
    }
    for (; i < h; i++) {
      float a = head[i], c = head[h + i];
      head[i] = a * cosines[i] - c * sines[i];
      head[h + i] = c * cosines[i] + a * sines[i];
    }
  }

  void rope_and_store(const Layer& l) {
    const int d = m.head_dim, width = (m.heads + 2 * m.kv_heads) * d, kinds = m.heads + m.kv_heads;
    for (int s = 0; s < b.sequences; s++) {
      const Sequence& seq = b.sequence[s];
      // In units of up to 16 tokens that fill a tile of the cache together, times one head.
      int first_unit = 0, begin, end;
      share(u.runs[s] * kinds, thread, threads, begin, end);
      for (int t = 0, run; t < seq.count; t += run, first_unit += kinds) {
        run = run_of(seq, l.cache.block_size, seq.start + t, seq.count - t);
        for (int i = std::max(begin - first_unit, 0); i < std::min(end - first_unit, kinds); i++) {
          float* rows = u.qkv.data() + (size_t)(seq.row + t) * width + (size_t)i * d;
          for (int k = 0; k < run; k++) {
            const size_t angle = (size_t)(seq.row + t + k) * (d / 2);
            rotate(rows + (size_t)k * width, i < m.heads ? l.q_norm : l.k_norm, u.cosines[l.rope].data() + angle, u.sines[l.rope].data() + angle);
          }
          if (i >= m.heads) {
            const size_t slot = slot_of(seq, l.cache.block_size, seq.start + t);
            write_cache(l.cache, slot, run, i - m.heads, rows, rows + (size_t)m.kv_heads * d, width);
            if (l.cache.bounds) bound_tile(l.cache, slot / 16, i - m.heads, (int)(slot % 16) + run);
          }
        }
      }
    }
    finish(ROPE);
  }

  // Which pages each query that selects them reads in this layer; whoever scores the last of a query's pages chooses.
  void select(const Layer& l, std::atomic<int>& next) {
    AttentionPlans& plans = u.attention;
    const int stride = (m.heads + 2 * m.kv_heads) * m.head_dim, items = (int)plans.selection_items.size(), most = m.bounds.read.pages;
    for (int i = next.fetch_add(1); i < items; i = next.fetch_add(1)) {
      const SelectionItem& item = plans.selection_items[i];
      Selection& wanted = plans.selections[item.selection];
      const Sequence& s = b.sequence[wanted.sequence];
      const Queries x = {u.qkv.data() + (size_t)s.row * stride, (size_t)stride, nullptr, m.heads};
      int32_t* keys = plans.page_keys.data() + wanted.keys;
      score_pages(l.cache, s, x, m.attention_scale, wanted.query, wanted.head, item.first, item.last, keys);
      const int scored = item.last - item.first;
      if (std::atomic_ref(wanted.unfinished).fetch_sub(scored, std::memory_order_acq_rel) == scored) {
        wanted.unfinished = wanted.pages;
        choose_pages(l.cache, s, keys, wanted.pages, m.bounds.read, plans.page_tables.data() + (size_t)item.selection * most);
      }
    }
    finish(SELECT);
  }

  void attention(const Layer& l, AttentionPlan& plan, std::atomic<int>& next) {
    const int d = m.head_dim, stride = (m.heads + 2 * m.kv_heads) * d, width = merged_width(d);
    const AttentionOptions options = {m.attention_scale, m.attention_softcap, l.window};
    const bool sees_sinks = !l.window || l.window > m.bounds.rolling;  // a narrower window never saw the first tokens
    const int items = (int)plan.items.size();
    for (int i = next.fetch_add(1); i < items; i = next.fetch_add(1)) {
      const AttentionItem& item = plan.items[i];
      const View& view = plan.views[item.view];
      const Sequence& s = view.seen;
      Cache cache = l.cache;
      cache.block_size = view.block_size;
      const Queries x = {u.qkv.data() + (size_t)s.row * stride, (size_t)stride, u.attended.data() + (size_t)s.row * m.heads * d, m.heads};
      Sinks sinks;
      if (view.sinks && sees_sinks) {
        const float* turn = u.attention.turns.data() + view.turn + (size_t)l.rope * d;
        sinks = {view.sinks, m.bounds.sinks, turn, turn + d / 2};
      }
      if (item.share < 0) {
        attend_block(cache, s, options, x, item.block, sinks);
        continue;
      }
      SharedBlock& shared = plan.shared[item.share];
      const int rows = item.block.rows;
      float* partials = u.attention.partials.data() + shared.partial;
      const bool last = view.sinks && item.segment == shared.segments - 1;
      attend_part(cache, s, options, x, item.block, last ? -1 : item.segment, sinks, partials + (size_t)item.segment * rows * width);
      // Whoever finishes last merges, in the segments' order.
      if (std::atomic_ref(shared.unfinished).fetch_sub(1, std::memory_order_acq_rel) == 1) {
        shared.unfinished = shared.segments;
        merge_parts(cache, x, item.block, shared.segments, partials);
      }
    }
    finish(ATTENTION);
  }

  void add_normed(const float* source, const float* norm, int rows, float* x) {  // x += norm(source)
    int begin, end;
    share(rows, thread, threads, begin, end);
    for (int r = begin; r < end; r++) {
      float* normed = u.normed.data() + (size_t)r * m.hidden;
      rms_norm(source + (size_t)r * m.hidden, norm, m.hidden, m.norm_eps, normed);
      for (int i = 0; i < m.hidden; i++) x[(size_t)r * m.hidden + i] += normed[i];
    }
    finish(PREPARE);
  }

  void pick_sampled() {
    int begin, end;
    share(b.sampled, thread, threads, begin, end);
    const size_t h = m.hidden, width = (size_t)m.heads * m.head_dim;
    for (size_t r = begin; r < (size_t)end; r++) {
      memcpy(u.picked_x.data() + r * h, u.x.data() + b.sampled_row[r] * h, h * 4);
      memcpy(u.picked_attended.data() + r * width, u.attended.data() + b.sampled_row[r] * width, width * 4);
    }
    finish(PREPARE);
  }

  // What follows attention in layer `index`, for `rows` rows of its result and of the residual stream `x`.
  void after_attention(int index, const float* attended, int rows, float* x, const Adapted& adapted) {
    const Layer& l = m.layer[index];
    const int h = m.hidden;
    const Ready heads = ready(l.o, attended, m.heads * m.head_dim, rows, nullptr);
    Terms terms = low_rank(O, adapted, index, PART_O, 1, heads.rows.values, l.o.k);
    if (l.post_attention_norm) {
      multiply(O, l.o, heads, rows, u.qkv.data(), h, false, terms);
      add_normed(u.qkv.data(), l.post_attention_norm, rows, x);
    } else {
      multiply(O, l.o, heads, rows, x, h, true, terms);
    }
    const Ready normed = ready(l.gate_up, x, h, rows, l.mlp_norm);
    gated(l.gate_up, normed, rows, low_rank(GATE_UP, adapted, index, PART_GATE, 2, normed.rows.values, l.gate_up.k));
    const Ready hidden = ready(l.down, u.hidden.data(), m.intermediate, rows, nullptr);
    terms = low_rank(DOWN, adapted, index, PART_DOWN, 1, hidden.rows.values, l.down.k);
    if (l.post_mlp_norm) {
      multiply(DOWN, l.down, hidden, rows, u.qkv.data(), h, false, terms);
      add_normed(u.qkv.data(), l.post_mlp_norm, rows, x);
    } else {
      multiply(DOWN, l.down, hidden, rows, x, h, true, terms);
    }
  }

  void operator()(std::atomic<int>* next) {
    const int h = m.hidden, rows = b.tokens, qkv_width = (m.heads + 2 * m.kv_heads) * m.head_dim;
    int begin, end;
    share(rows, thread, threads, begin, end);
    for (int r = begin; r < end; r++) {
      float* x = u.x.data() + (size_t)r * h;
      for (int i = 0; i < h; i += 16) {
        f32x16 e = {};
        const size_t at = (size_t)b.token[r] * h + i;
        if (i + 16 <= h) {
          e = m.embedding_half ? load_half((const uint16_t*)m.embedding + at) : load((const float*)m.embedding + at);
        } else if (m.embedding_half) {
          uint16_t tail[16] = {};
          memcpy(tail, (const uint16_t*)m.embedding + at, (size_t)(h - i) * 2);
          e = load_half(tail);
        } else {
          e = get((const float*)m.embedding + (size_t)b.token[r] * h, i, h);
        }
        put(x, i, h, e * m.embedding_scale);
      }
      for (int rope = 0; rope < 2 && m.inverse_frequencies[rope]; rope++)
        for (int i = 0; i < m.head_dim / 2; i++) {
          const float turn = angle(b.position[r], m.inverse_frequencies[rope][i]);
          const size_t at = (size_t)r * (m.head_dim / 2) + i;
          u.cosines[rope][at] = cosf(turn) * m.rope_scaling[rope];
          u.sines[rope][at] = sinf(turn) * m.rope_scaling[rope];
        }
    }
    finish(EMBED);
    for (int i = 0; i < m.layers; i++) {
      const Layer& l = m.layer[i];
      const Ready normed = ready(l.qkv, u.x.data(), h, rows, l.attention_norm);
      multiply(QKV, l.qkv, normed, rows, u.qkv.data(), qkv_width, false, low_rank(QKV, u.adapted, i, PART_Q, 3, normed.rows.values, h));
      rope_and_store(l);
      const bool bounded = bounds_what_is_seen(m, i);
      if (bounded && !u.attention.selections.empty()) select(l, next[2 * i]);
      attention(l, bounded ? u.attention.bounded : u.attention.whole, next[2 * i + 1]);
      // Of the last layer nobody but the head reads: its other rows end here.
      if (i + 1 < m.layers || b.sampled >= rows) {
        after_attention(i, u.attended.data(), rows, u.x.data(), u.adapted);
      } else if (b.sampled) {
        pick_sampled();
        after_attention(i, u.picked_attended.data(), b.sampled, u.picked_x.data(), u.picked_adapted);
      }
    }
    if (b.sampled) {
      const bool picked = b.sampled < rows;
      if (b.hidden) {
        share(b.sampled, thread, threads, begin, end);
        for (int r = begin; r < end; r++) memcpy(b.hidden + (size_t)r * h, picked ? u.picked_x.data() + (size_t)r * h : u.x.data() + (size_t)b.sampled_row[r] * h, h * sizeof(float));
      }
      const Ready x = ready(m.head, picked ? u.picked_x.data() : u.x.data(), h, b.sampled, m.final_norm, picked ? nullptr : b.sampled_row);
      multiply(HEAD, m.head, x, b.sampled, b.logits, m.vocabulary, false);
      if (m.logit_softcap > 0.0f) {
        share(b.sampled, thread, threads, begin, end);
        for (size_t i = (size_t)begin * m.vocabulary; i < (size_t)end * m.vocabulary; i++) b.logits[i] = tanhf(b.logits[i] / m.logit_softcap) * m.logit_softcap;
      }
      share(b.sampled, thread, threads, begin, end);
      for (int r = begin; r < end; r++) find_peak(b.logits + (size_t)r * m.vocabulary, m.vocabulary, b.peak[r], b.best[r]);
    }
  }
};

void plan_runs(const Model& m, const Batch& b, Buffers& u) {
  u.runs.assign(b.sequences, 0);
  const int block_size = m.layer[0].cache.block_size;
  for (int s = 0; s < b.sequences; s++)
    for (int t = 0; t < b.sequence[s].count; u.runs[s]++) t += run_of(b.sequence[s], block_size, b.sequence[s].start + t, b.sequence[s].count - t);
}

// Sorts `rows` rows, whose adapters `of` gives, into blocks of one adapter each.
template <class Of>
void plan_adapters(int rows, int adapters, const Of& of, Adapted& to) {
  to.adapter_of.clear(), to.blocks.clear();
  if (!adapters) return;
  std::vector<int> open(adapters, -1);  // the block of each adapter that still has room
  for (int r = 0; r < rows; r++) {
    const int adapter = of(r);
    to.adapter_of.push_back(adapter);
    if (adapter < 0) continue;
    if (open[adapter] < 0 || to.blocks[open[adapter]].count == kLowRankRows) {
      open[adapter] = (int)to.blocks.size();
      to.blocks.push_back({adapter, 0, {}});
    }
    LowRankRows& block = to.blocks[open[adapter]];
    block.row[block.count++] = r;
  }
}

void plan_adapters(const Model& m, const Batch& b, Buffers& u) {
  int sequence = 0;
  plan_adapters(b.tokens, b.adapters, [&](int r) {
    while (r >= b.sequence[sequence].row + b.sequence[sequence].count) sequence++;
    return b.adapter_of[sequence];
  }, u.adapted);
  plan_adapters(b.sampled, b.adapters, [&](int r) { return u.adapted.adapter_of[b.sampled_row[r]]; }, u.picked_adapted);
  u.low_rank = 0;
  for (int a = 0; a < b.adapters; a++)
    for (int i = 0; i < m.layers * PARTS; i++) u.low_rank = std::max(u.low_rank, padded_rank(b.adapter[a][i].rank));
  const size_t size = (size_t)std::max(b.tokens, b.sampled) * 3 * u.low_rank;
  if (size > u.low.size()) u.low.resize(size);
}

}  // namespace

extern "C" {

// Null when the threads or their memory cannot be had.
void* arm_engine_create(int threads) try {
  return new Engine(threads);
} catch (const std::exception&) {
  return nullptr;
}

// What each phase of every iteration so far took: nanoseconds, in the order of Phase.
void arm_engine_phases(const void* engine, int64_t out[PHASES]) { memcpy(out, ((const Engine*)engine)->nanoseconds, sizeof(Engine::nanoseconds)); }

void arm_engine_destroy(void* engine) { delete (Engine*)engine; }

// Sizes of the structs, so that the caller can check that both sides agree.
void arm_struct_sizes(int32_t out[7]) {
  out[0] = sizeof(Weight), out[1] = sizeof(Layer), out[2] = sizeof(Model), out[3] = sizeof(Batch), out[4] = sizeof(Sequence), out[5] = sizeof(Cache);
  out[6] = sizeof(LowRank);
}

// The bounds of the pages of `count` slots from the beginning of tile `first` on, whose keys have come otherwise than by a batch.
void arm_bound_pages(const Cache* cache, int64_t first, int64_t count) {
  for (int64_t slot = 0; slot < count; slot += kPage)
    for (int head = 0; head < cache->kv_heads; head++) bound_tile(*cache, (size_t)(first + slot / kPage), head, (int)std::min<int64_t>(kPage, count - slot));
}

// Attention alone, on the calling thread: stores the new keys and values (rows [count][kv_heads][head_dim]) of one
// sequence and attends with q [count][heads][head_dim] into out. With a `budget` (else null) each query reads at most so many pages of each kv head;
// `read` [count][kv_heads][budget->pages], where given, is then which tiles.
void arm_attention(const Cache* cache, const Sequence* sequence, int32_t heads, float scale, float softcap, int32_t window, const PageBudget* budget, const float* q, const float* keys, const float* values, float* out, int32_t* read) {
  const int d = cache->head_dim, kv_heads = cache->kv_heads, group = heads / kv_heads;
  for (int t = 0, run; t < sequence->count; t += run) {
    run = run_of(*sequence, cache->block_size, sequence->start + t, sequence->count - t);
    const size_t slot = slot_of(*sequence, cache->block_size, sequence->start + t);
    for (int kv = 0; kv < kv_heads; kv++) {
      const size_t at = ((size_t)t * kv_heads + kv) * d;
      write_cache(*cache, slot, run, kv, keys + at, values + at, (size_t)kv_heads * d);
      if (cache->bounds) bound_tile(*cache, slot / 16, kv, (int)(slot % 16) + run);
    }
  }
  const Queries x = {q, (size_t)heads * d, out, heads};
  const AttentionOptions options = {scale, softcap, window};
  if (!budget) {
    for (int kv = 0; kv < kv_heads; kv++)
      for (int first = 0; first < sequence->count * group; first += kBlockRows)
        attend_block(*cache, *sequence, options, x, {kv, first, std::min(kBlockRows, sequence->count * group - first)});
    return;
  }
  std::vector<int32_t> page_keys(padded_pages((sequence->start + sequence->count) / kPage + 1));
  std::vector<int32_t> tiles(budget->pages);
  Cache by_page = *cache;
  by_page.block_size = kPage;
  for (int t = 0; t < sequence->count; t++)
    for (int kv = 0; kv < kv_heads; kv++) {
      const int position = sequence->start + t, count = position / kPage + 1, some = std::min(count, budget->pages);
      score_pages(*cache, *sequence, x, scale, t, kv, 0, count, page_keys.data());
      choose_pages(*cache, *sequence, page_keys.data(), count, {some, budget->first, std::min(budget->last, some)}, tiles.data());
      if (read) std::copy_n(tiles.data(), some, read + ((size_t)t * kv_heads + kv) * budget->pages);
      const Queries own = {q + (size_t)t * heads * d, (size_t)heads * d, out + (size_t)t * heads * d, heads};
      attend_block(by_page, {tiles.data(), (some - 1) * kPage + position % kPage, 1, 0, 0, 0}, options, own, {kv, 0, group});
    }
}

// Returns 0 when there is no memory for the batch's buffers; nothing has been computed then.
int32_t arm_forward(void* handle, const Model* model, const Batch* batch) try {
  Engine& e = *(Engine*)handle;
  Buffers& u = e.buffers;
  const int rows = padded_rows(std::max(batch->tokens, batch->sampled));
  const int width = padded_k(std::max({model->hidden, model->intermediate, model->heads * model->head_dim}));
  const int qkv = std::max((model->heads + 2 * model->kv_heads) * model->head_dim, model->hidden);
  if (rows > u.rows) {
    u.rows = 0;  // until all of them have grown
    u.x.grow((size_t)rows * model->hidden);
    u.normed.grow((size_t)rows * width);
    u.qkv.grow((size_t)rows * qkv);
    u.attended.grow((size_t)rows * model->heads * model->head_dim);
    u.hidden.grow((size_t)rows * model->intermediate);
    for (int rope = 0; rope < 2; rope++) u.cosines[rope].grow((size_t)rows * model->head_dim / 2), u.sines[rope].grow((size_t)rows * model->head_dim / 2);
    u.quants.grow((size_t)rows * width);
    u.scales.grow((size_t)rows * width / kGroup);
    u.sums.grow((size_t)rows * width / kGroup);
    u.picked_x.grow((size_t)rows * model->hidden);
    u.picked_attended.grow((size_t)rows * model->heads * model->head_dim);
    u.rows = rows;
  }
  plan_runs(*model, *batch, u);
  const Shape shape = {model->heads, model->kv_heads, model->head_dim, model->layer[0].cache.block_size};
  u.attention.plan(model->bounds, shape, batch->sequence, batch->sequences, model->inverse_frequencies, e.pool.size());
  plan_adapters(*model, *batch, u);
  std::unique_ptr<std::atomic<int>[]> next(new std::atomic<int>[2 * model->layers]);
  for (int i = 0; i < 2 * model->layers; i++) next[i].store(0, std::memory_order_relaxed);
  e.pool.run([&](int thread) { Run{e, *model, *batch, thread, e.pool.size(), u}(next.get()); });
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

}  // extern "C"
