// How a batch's attention is cut into work for threads, and what its queries see: everything before them, or less.
#pragma once
#include <math.h>

#include <algorithm>
#include <vector>

#include "page_select.h"

namespace arm {

// What bounds the positions that queries see; 0 where nothing does.
struct Bounds {
  PageBudget read;              // at most so many pages are read (page_select.h) ...
  int32_t dense_layers;         // ... but all in the first layers
  int32_t sinks, rolling;       // the first tokens are seen and at least so many last ones (Sinks, attention.h)
};

struct Shape {
  int heads, kv_heads, head_dim, block_size;
};

// The angle of a position. Far out a float has no room for its fraction: from there on it is computed without loss.
static inline float angle(int position, float frequency) {
  constexpr int kFar = 1 << 16;
  return position < kFar ? (float)position * frequency : (float)fmod((double)position * (double)frequency, 6.283185307179586476925);
}

// What queries of a sequence see: a table of its own, whose positions count from where it begins, and perhaps sinks.
struct View {
  Sequence seen;
  int block_size;  // tokens of an entry of the table
  int head = -1;   // the kv head that it is for; -1: all of them
  const int32_t* sinks = nullptr;
  size_t turn = 0;  // where in AttentionPlans::turns the sinks' shift is: [rope][cosines, sines][head_dim / 2]
};

// A block of attention rows, or one segment of a block that threads share.
struct AttentionItem {
  int view;
  Block block;
  int share = -1;    // which shared block it belongs to, if any
  int segment = -1;  // its segment of that; the last is the sinks'
};

struct SharedBlock {
  int segments, unfinished;
  size_t partial;  // where in AttentionPlans::partials: [segment][row][merged_width]
};

struct AttentionPlan {
  std::vector<View> views;
  std::vector<AttentionItem> items;
  std::vector<SharedBlock> shared;
};

// A query of a kv head that reads the best `Bounds::read` of its pages; items are ranges of pages to score.
struct Selection {
  int sequence, query, head, pages, unfinished;
  size_t keys;  // where in AttentionPlans::page_keys, padded_pages(pages) of them
};
struct SelectionItem {
  int selection, first, last;
};


// Everything about a batch's attention that is the same in all layers, and what its phases leave for each other.
class AttentionPlans {
 public:
  AttentionPlan whole, bounded;  // of layers whose queries see everything before them, and of those where `Bounds` hold
  std::vector<Selection> selections;
  std::vector<SelectionItem> selection_items;
  std::vector<int32_t> page_keys;
  std::vector<int32_t> page_tables;  // [selection][pages]
  std::vector<float> turns;          // cosines and sines of the sinks' shifts
  std::vector<float> partials;       // of shared blocks

  void plan(const Bounds& bounds, const Shape& shape, const Sequence* sequence, int sequences, const float* const* frequencies, int threads) {
    whole.views.clear(), bounded.views.clear(), selections.clear(), selection_items.clear(), turns.clear();
    size_t keys = 0;
    for (int s = 0; s < sequences; s++) {
      if (bounds.rolling)
        view_rolling(bounds, shape, sequence[s], frequencies);
      else
        whole.views.push_back({sequence[s], shape.block_size});
      if (bounds.read.pages) view_pages(bounds, shape, s, sequence[s], threads, keys);
    }
    if (keys > page_keys.size()) page_keys.resize(keys);
    if (selections.size() * bounds.read.pages > page_tables.size()) page_tables.resize(selections.size() * bounds.read.pages);
    size_t selection = 0;
    for (View& view : bounded.views)
      if (view.head >= 0) view.seen.table = page_tables.data() + selection++ * bounds.read.pages;
    for (AttentionPlan* plan : {&whole, &bounded}) plan_items(shape, threads, *plan);
  }

 private:
  // Queries with more pages than are read have a table of tiles for each kv head, which is filled in every layer. The
  // query's own page is the last of the table, so that positions count from the first.
  void view_pages(const Bounds& bounds, const Shape& shape, int index, const Sequence& all, int threads, size_t& keys) {
    const int range = threads == 1 ? 1 << 30 : 256;  // pages of an item
    const int first = std::clamp(std::max(all.selects, bounds.read.pages * kPage) - all.start, 0, all.count);  // query that selects
    Sequence before = all;
    before.count = first;
    if (first) bounded.views.push_back({before, shape.block_size});
    for (int t = first; t < all.count; t++)
      for (int head = 0; head < shape.kv_heads; head++) {
        const int position = all.start + t, pages = position / kPage + 1, selection = (int)selections.size();
        selections.push_back({index, t, head, pages, pages, keys});
        keys += (size_t)padded_pages(pages);
        for (int page = 0, some; page < pages; page += some) {
          some = std::min(range, pages - page);
          selection_items.push_back({selection, page, page + some});
        }
        bounded.views.push_back({{nullptr, (bounds.read.pages - 1) * kPage + position % kPage, 1, all.row + t, 0, 0}, kPage, head});
      }
  }

  // While nothing is left out a query sees all that is before it. From then on it sees whole blocks at least as far back as
  // it should, so that the queries of a block share a view.
  void view_rolling(const Bounds& bounds, const Shape& shape, const Sequence& all, const float* const* frequencies) {
    const auto first_seen = [&](int t) {
      const int first = std::max(0, all.start + t + 1 - bounds.rolling) / shape.block_size * shape.block_size;
      return first > bounds.sinks ? first : 0;
    };
    for (int t = 0, end; t < all.count; t = end) {
      const int first = first_seen(t);
      for (end = t + 1; end < all.count && first_seen(end) == first; end++) continue;
      View view = {all, shape.block_size};
      view.seen.start += t - first, view.seen.count = end - t, view.seen.row += t;
      if (first) {
        view.seen.table += first / shape.block_size - all.dropped;
        view.seen.dropped = 0;
        if (bounds.sinks) view.sinks = all.table, view.turn = turns.size();
        for (int rope = 0; rope < 2 && frequencies[rope]; rope++)
          for (float (*part)(float) : {cosf, sinf})
            for (int i = 0; i < shape.head_dim / 2; i++) turns.push_back(part(angle(first - bounds.sinks, frequencies[rope][i])));
      }
      bounded.views.push_back(view);
    }
  }

  // Work items, the costly first. Small batches get smaller blocks, so that every thread finds some; a block of few rows (a
  // decoding sequence) with a long context is shared segment by segment. None of it changes a result.
  void plan_items(const Shape& shape, int threads, AttentionPlan& plan) {
    const int group = shape.heads / shape.kv_heads, width = merged_width(shape.head_dim);
    int step = kBlockRows;
    auto blocks = [&](int rows) {
      int64_t n = 0;
      for (const View& view : plan.views) n += (int64_t)(view.head < 0 ? shape.kv_heads : 1) * ((view.seen.count * group + rows - 1) / rows);
      return n;
    };
    while (step > kTileRows && blocks(step) < 4 * threads) step /= 2;
    plan.items.clear(), plan.shared.clear();
    size_t size = 0;
    for (int v = 0; v < (int)plan.views.size(); v++) {
      const View& view = plan.views[v];
      const int count = view.seen.count * group;
      for (int first = 0; first < count; first += step)
        for (int kv = std::max(view.head, 0); kv < (view.head < 0 ? shape.kv_heads : view.head + 1); kv++) {
          const Block block = {kv, first, std::min(step, count - first)};
          const int segments = position_of(view.seen, block, group, block.rows - 1) / kSegment + 1 + (view.sinks != nullptr);
          if (threads == 1 || segments == 1 || count > kTileRows) {
            plan.items.push_back({v, block});
            continue;
          }
          for (int i = 0; i < segments; i++) plan.items.push_back({v, block, (int)plan.shared.size(), i});
          plan.shared.push_back({segments, segments, size});
          size += (size_t)segments * block.rows * width;
        }
    }
    if (size > partials.size()) partials.resize(size);
    auto cost = [&](const AttentionItem& i) {
      const int keys = i.share < 0 ? position_of(plan.views[i.view].seen, i.block, group, i.block.rows - 1) + 1 : kSegment;
      return (int64_t)i.block.rows * keys;
    };
    std::stable_sort(plan.items.begin(), plan.items.end(), [&](const AttentionItem& x, const AttentionItem& y) { return cost(x) > cost(y); });
  }
};

}  // namespace arm
