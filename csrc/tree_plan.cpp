#include "tree_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace tts {
namespace {

constexpr int32_t kNobody = -1;

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument("a tree plan: " + sentence); }

// Children of every node, in the order of their first slots: the same whatever order the rows came in.
struct Children {
  std::vector<int32_t> begin, list;  // [N + 2] by parent, the tops' first; all nodes

  explicit Children(const Forest& forest) : begin(forest.parent.size() + 2, 0), list(forest.parent.size()) {
    const int32_t count = static_cast<int32_t>(forest.parent.size());
    for (int32_t parent : forest.parent) ++begin[parent + 2];
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int32_t> at(begin.begin(), begin.end() - 1);
    for (int32_t node = 0; node < count; ++node) list[at[forest.parent[node] + 1]++] = node;
    const auto key = [&](int32_t node) { return forest.len[node] ? forest.slots[forest.first[node]] : -1; };
    for (int32_t parent = 0; parent <= count; ++parent)
      std::sort(list.begin() + begin[parent], list.begin() + begin[parent + 1],
                [&](int32_t a, int32_t b) { return key(a) < key(b); });
  }

  const int32_t* of(int32_t node) const { return list.data() + begin[node + 1]; }
  int32_t count(int32_t node) const { return begin[node + 2] - begin[node + 1]; }
};

void check(const Forest& forest, const int32_t* starts, const int32_t* row_starts, size_t num_rows) {
  const size_t count = forest.parent.size();
  if (forest.first.size() != count || forest.len.size() != count || forest.node.size() != num_rows)
    refuse("its arrays differ in length");
  for (size_t node = 0; node < count; ++node) {
    if (forest.parent[node] < kNobody || forest.parent[node] >= static_cast<int64_t>(node))
      refuse("node " + std::to_string(node) + " comes before its parent");
    if (forest.first[node] < 0 || forest.len[node] < 0 ||
        forest.first[node] + static_cast<int64_t>(forest.len[node]) > static_cast<int64_t>(forest.slots.size()))
      refuse("node " + std::to_string(node) + " has slots beyond those given");
  }
  if (row_starts[0] != 0) refuse("its rows do not begin at token 0");
  std::vector<bool> taken(count, false);
  for (size_t row = 0; row < num_rows; ++row) {
    const int32_t node = forest.node[row];
    if (node < 0 || node >= static_cast<int64_t>(count) || taken[node])
      refuse("row " + std::to_string(row) + " stands on no node of its own");
    taken[node] = true;
    if (starts[row] < 0 || row_starts[row + 1] < row_starts[row] ||
        starts[row] + static_cast<int64_t>(row_starts[row + 1] - row_starts[row]) > forest.len[node])
      refuse("row " + std::to_string(row) + " goes beyond its node's written tokens");
  }
}

// The ends of tiles of at most max_queries queries. With options.tile they are those for which the keys read by all tiles together,
// and `tile` more for each, are fewest: cut there, a segment is read once more.
std::vector<int32_t> tile_ends(const std::vector<Segment>& segments, int32_t num_queries, const PlanOptions& options) {
  std::vector<int32_t> ends;
  if (!options.tile) {
    for (int64_t end = 0; end < num_queries;)
      ends.push_back(static_cast<int32_t>(end = std::min<int64_t>(num_queries, end + options.max_queries)));
    return ends;
  }
  std::vector<int64_t> crossing(num_queries + 2, 0), least(num_queries + 1, 0);
  for (const Segment& s : segments) {
    if (s.hi - s.lo < 2) continue;
    crossing[s.lo + 1] += s.len;
    crossing[s.hi] -= s.len;
  }
  std::partial_sum(crossing.begin(), crossing.end(), crossing.begin());
  std::vector<int32_t> begin(num_queries + 1, 0);  // of the tile that ends there
  for (int32_t end = 1; end <= num_queries; ++end) {
    least[end] = std::numeric_limits<int64_t>::max();
    for (int32_t at = end - 1; at >= std::max(0, end - options.max_queries); --at) {
      const int64_t keys = least[at] + crossing[at] + options.tile;
      if (keys <= least[end]) least[end] = keys, begin[end] = at;  // of equals the longest tile
    }
  }
  for (int32_t end = num_queries; end > 0; end = begin[end]) ends.push_back(end);
  std::reverse(ends.begin(), ends.end());
  return ends;
}

}  // namespace

TreePlan::TreePlan(const Forest& forest, const int32_t* starts, const int32_t* row_starts, size_t num_rows,
                   const PlanOptions& options) {
  check(forest, starts, row_starts, num_rows);
  if (options.max_queries < 1 || options.split < 1 || options.reserve < 0 || options.tile < 0 || options.tail_queries < 0 ||
      options.tail < 0)
    refuse("its options are out of range");
  const int32_t num_nodes = static_cast<int32_t>(forest.parent.size());
  const int32_t num_queries = row_starts[num_rows];
  const Children children(forest);
  std::vector<int32_t> row_of(num_nodes, kNobody);
  for (size_t row = 0; row < num_rows; ++row)
    if (row_starts[row + 1] > row_starts[row]) row_of[forest.node[row]] = static_cast<int32_t>(row);
  bool all_single = num_rows > 0;
  for (size_t row = 0; row < num_rows; ++row) all_single &= row_starts[row + 1] - row_starts[row] == 1;

  // Depth first: queries, and segments in the order of their paths. A segment is cut where its depth passes a multiple of
  // `split`; `zone` counts the multiples.
  std::vector<int32_t> zone, depth(num_nodes), open(num_nodes, kNobody);  // open: the segment that a node ended up in
  std::vector<std::pair<int32_t, bool>> stack;                            // (node, has it been entered?)
  order.reserve(num_queries);
  slots.reserve(forest.slots.size() + (all_single ? num_rows * options.reserve : 0));
  segments.reserve(num_nodes);
  zone.reserve(num_nodes);
  leaf.assign(num_rows, kNobody);
  growth = all_single ? options.reserve : 0;
  std::vector<int32_t> first_segment(num_nodes);
  for (int32_t i = children.count(kNobody); i-- > 0;) stack.emplace_back(children.of(kNobody)[i], false);
  while (!stack.empty()) {
    const int32_t node = stack.back().first;
    if (stack.back().second) {
      stack.pop_back();
      for (int32_t s = first_segment[node]; s <= open[node]; ++s) segments[s].hi = static_cast<int32_t>(order.size());
      continue;
    }
    stack.back().second = true;
    const int32_t parent = forest.parent[node], row = row_of[node];
    depth[node] = parent == kNobody ? 0 : depth[parent] + forest.len[parent];
    const int32_t own_end = row == kNobody ? forest.len[node] : starts[row] + row_starts[row + 1] - row_starts[row];
    const bool joins = options.compress && parent != kNobody && row_of[parent] == kNobody && children.count(parent) == 1 &&
                       open[parent] + 1 == static_cast<int32_t>(segments.size()) && open[parent] >= first_segment[parent] &&
                       own_end == forest.len[node];
    const int32_t offset = static_cast<int32_t>(slots.size());
    slots.insert(slots.end(), forest.slots.begin() + forest.first[node],
                 forest.slots.begin() + forest.first[node] + forest.len[node]);
    // The node's first `end` tokens, those from `start` on seen one query later each.
    const auto add = [&](int32_t start, int32_t end) {
      const int32_t lo = static_cast<int32_t>(order.size());
      first_segment[node] = static_cast<int32_t>(segments.size());
      for (int32_t done = 0; done < end;) {
        const int32_t at = depth[node] + done;
        const int32_t length = std::min(end - done, options.split - at % options.split);
        // A piece that begins at a multiple of `split` never joins, so a path's pieces are the same however it is chained.
        if (joins && !done && at % options.split) {
          Segment& last = segments.back();
          last.len += length;
          last.start += std::min(start, length);
          first_segment[node] = open[parent];
        } else {
          segments.push_back({offset + done, length, lo + std::max(0, done - start), 0,
                              std::max(0, std::min(length, start - done))});
          zone.push_back(at / options.split);
        }
        done += length;
      }
      open[node] = static_cast<int32_t>(segments.size()) - 1;
    };
    add(row == kNobody ? own_end : starts[row], own_end);
    if (row != kNobody)
      for (int32_t token = row_starts[row]; token < row_starts[row + 1]; ++token) order.push_back(token);
    if (own_end < forest.len[node]) {
      // Those below see all of the node: for them it stands here again, cut as if it had no row, so that how they group its keys
      // does not hang on who else reads.
      for (int32_t s = first_segment[node]; s <= open[node]; ++s) segments[s].hi = static_cast<int32_t>(order.size());
      add(forest.len[node], forest.len[node]);
      growth = 0;
    }
    if (row != kNobody && growth) {
      const int32_t end = depth[node] + forest.len[node];
      if (!options.tail_queries) growth = std::min(growth, options.split - 1 - (end - 1) % options.split);
      leaf[row] = open[node];
      if (children.count(node)) growth = 0;
      slots.resize(slots.size() + options.reserve);
    }
    for (int32_t i = children.count(node); i-- > 0;) stack.emplace_back(children.of(node)[i], false);
  }

  if (!growth) leaf.clear();

  // Tiles of neighbouring queries. What a tile reads together is one item a zone, and so are tails next to each other.
  std::vector<int32_t> active, shared, mine;  // segments that still have queries to come; those of the tile; those of an item
  std::vector<std::pair<int32_t, int32_t>> tails;             // (query, segment) of segments that one query of the tile sees
  std::vector<int32_t> tail_keys, bounds;
  std::vector<int64_t> cost;
  const auto emit = [&](int32_t query, int32_t end) {
    std::stable_sort(mine.begin(), mine.end(), [&](int32_t a, int32_t b) { return zone[a] < zone[b]; });
    for (size_t i = 0; i < mine.size();) {
      size_t j = i;
      int64_t work = 0;
      for (; j < mine.size() && zone[mine[j]] == zone[mine[i]]; ++j) {
        const Segment& s = segments[mine[j]];
        work += static_cast<int64_t>(std::min(s.hi, end) - std::max(s.lo, query)) * s.len;
      }
      items.push_back({query, end - query, static_cast<int32_t>(item_segments.size()), static_cast<int32_t>(j - i), kNobody});
      item_segments.insert(item_segments.end(), mine.begin() + i, mine.begin() + j);
      cost.push_back(work);
      i = j;
    }
  };
  size_t next = 0;
  int32_t query = 0;
  for (int32_t end : tile_ends(segments, num_queries, options)) {
    active.erase(std::remove_if(active.begin(), active.end(), [&](int32_t s) { return segments[s].hi <= query; }), active.end());
    for (; next < segments.size() && segments[next].lo < end; ++next)
      if (segments[next].hi > segments[next].lo) active.push_back(static_cast<int32_t>(next));
    const size_t first_item = items.size();
    bool apart = false;
    int32_t lo = end, hi = query;
    if (options.tail_queries) {  // what the tile's queries share, and the tails that each sees alone
      shared.clear();
      tails.clear();
      tail_keys.assign(end - query, 0);
      int64_t alone = 0;
      for (int32_t s : active) {
        const int32_t from = std::max(segments[s].lo, query), to = std::min(segments[s].hi, end);
        if (to - from > 1) {
          shared.push_back(s);
          lo = std::min(lo, from);
          hi = std::max(hi, to);
        } else {
          tails.emplace_back(from, s);
          tail_keys[from - query] += segments[s].len;
          alone += segments[s].len;
        }
      }
      apart = shared.empty() || alone >= static_cast<int64_t>(options.tail) * (end - query);
    }
    if (!apart) {
      mine = active;
      emit(query, end);
    } else {
      mine = shared;
      emit(lo, hi);
      for (size_t i = 0; i < tails.size();) {  // segments lie depth first: one query's behind those of the query before
        const int32_t from = tails[i].first;
        int32_t to = from;
        int64_t keys = 0;
        mine.clear();
        while (i < tails.size() && tails[i].first == to && to - from < options.tail_queries &&
               (to == from || keys + tail_keys[to - query] <= options.split)) {
          keys += tail_keys[to - query];
          for (; i < tails.size() && tails[i].first == to; ++i) mine.push_back(tails[i].second);
          ++to;
        }
        emit(from, to);
      }
    }

    // Where several items have a query, each of them has places for partial results; runs of queries of the same items are merged.
    bounds.clear();
    for (size_t i = first_item; i < items.size(); ++i) {
      bounds.push_back(items[i].query);
      bounds.push_back(items[i].query + items[i].num_queries);
    }
    std::sort(bounds.begin(), bounds.end());
    bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
    const auto each = [&](int32_t at, const auto& act) {
      for (size_t i = first_item; i < items.size(); ++i)
        if (items[i].query <= at && at < items[i].query + items[i].num_queries) act(items[i]);
    };
    for (size_t b = 0; b + 1 < bounds.size(); ++b) {
      int count = 0;
      each(bounds[b], [&](Item&) { ++count; });
      if (count > 1)
        each(bounds[b], [&](Item& item) {
          if (item.slot != kNobody) return;
          item.slot = num_partials;
          num_partials += item.num_queries;
        });
    }
    for (size_t b = 0; b + 1 < bounds.size(); ++b) {
      const int32_t first = static_cast<int32_t>(merge_slots.size());
      each(bounds[b], [&](Item& item) {
        if (item.slot != kNobody) merge_slots.push_back(item.slot + bounds[b] - item.query);
      });
      const int32_t count = static_cast<int32_t>(merge_slots.size()) - first;
      if (count) merges.push_back({bounds[b], bounds[b + 1] - bounds[b], first, count});
    }
    query = end;
  }
  std::vector<size_t> by_cost(items.size());
  std::iota(by_cost.begin(), by_cost.end(), 0);
  std::stable_sort(by_cost.begin(), by_cost.end(), [&](size_t a, size_t b) { return cost[a] > cost[b]; });
  std::vector<Item> sorted;
  sorted.reserve(items.size());
  for (size_t i : by_cost) sorted.push_back(items[i]);
  items = std::move(sorted);
}

bool TreePlan::grow(const int64_t* new_slots, size_t num_rows) {
  if (!growth || num_rows != leaf.size()) return false;
  --growth;
  for (size_t row = 0; row < num_rows; ++row) {
    Segment& own = segments[leaf[row]];
    slots[own.offset + own.len] = static_cast<int32_t>(new_slots[row]);
    ++own.len;
    ++own.start;
  }
  return true;
}

bool TreePlan::reserve(const int64_t* new_slots, size_t steps, size_t num_rows) {
  if (static_cast<size_t>(growth) < steps || num_rows != leaf.size()) return false;
  for (size_t step = 0; step < steps; ++step)
    for (size_t row = 0; row < num_rows; ++row) {
      const Segment& own = segments[leaf[row]];
      slots[own.offset + own.len + step] = static_cast<int32_t>(new_slots[step * num_rows + row]);
    }
  return true;
}

}  // namespace tts
