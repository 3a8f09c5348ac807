// Who sees which key: the paths of a batch as flat int32 arrays for an attention kernel. No tensors, no Python.
//
// The batch's new tokens are its queries, numbered depth first over the tree of nodes that they stand on, a node's own
// before its descendants'. Every node then is seen by one interval of queries, and the mask of any tree is two comparisons.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tts {

// The distinct nodes that a batch's rows stand on, parents before children.
struct Forest {
  std::vector<int32_t> parent;  // [N], -1 at the top
  std::vector<int32_t> first;   // [N], where its slots begin
  std::vector<int32_t> len;     // [N], tokens of it that are written, the batch's new ones among them
  std::vector<int32_t> node;    // [B], whose new tokens each row holds; no node has two rows
  std::vector<int32_t> slots;   // of all nodes
};

// Keys slots[offset : offset + len]. Query i sees key j when lo + max(0, j - start) <= i < hi.
struct Segment {
  int32_t offset, len, lo, hi, start;
};

// Queries [query, query + num_queries) over the segments that item_segments[first : first + count] name, in path order.
// slot: the first of num_queries places for partial results, -1 where the item is all there is and writes the output.
struct Item {
  int32_t query, num_queries, first, count, slot;
};

// Queries whose partial results, of the items whose slots are merge_slots[first : first + count], are put together in that order.
struct Merge {
  int32_t query, num_queries, first, count;
};

struct PlanOptions {
  int32_t max_queries;  // of one item
  int32_t split;        // tokens of depth after which a path goes on in another item, so that long ones are shared out
  int32_t reserve;      // tokens by which rows of one query can grow before a new plan is needed
  bool compress;        // chains of nodes become one segment; then how keys group depends on what else is in the batch
  // How many keys one more tile of queries is worth: tiles then end where least is read by two of them. 0: tiles are filled up.
  int32_t tile = 0;
  // Keys that one query alone of its tile sees, its tail, are items of their own, of neighbouring tails of at most so many queries
  // and, where they are more than one, `split` keys; and a row then grows past a multiple of `split`. 0: a tile's items hold all.
  int32_t tail_queries = 0;
  // Tails of fewer keys a query stay with what its tile shares: more is computed that nobody sees, but nothing is to be merged.
  int32_t tail = 0;
};

struct TreePlan {
  std::vector<int32_t> order;  // [T], the batch's token behind each query
  std::vector<int32_t> slots;
  std::vector<Segment> segments;
  std::vector<Item> items;  // the costliest first
  std::vector<int32_t> item_segments;
  std::vector<Merge> merges;
  std::vector<int32_t> merge_slots;
  int32_t num_partials = 0;

  // starts [B]: tokens of each row's node before its first query; row_starts [B + 1]: row b's queries, none where it is not read.
  // std::invalid_argument where the arrays contradict each other.
  TreePlan(const Forest& forest, const int32_t* starts, const int32_t* row_starts, size_t num_rows, const PlanOptions& options);

  // Every row moves on by one token, row b's at new_slots[b]: what a new plan would say, save for the order of items.
  // False, and nothing has changed, where a new plan is needed.
  bool grow(const int64_t* new_slots, size_t num_rows);

  // new_slots [steps, B]: where the tokens will be by which each row moves on next; no length changes. A device that counts the
  // steps itself then needs nothing more. False, and nothing has changed, where rows cannot grow so far.
  bool reserve(const int64_t* new_slots, size_t steps, size_t num_rows);

  std::vector<int32_t> leaf;  // [B], the segment of each row that grows; empty where some row cannot
  int32_t growth = 0;         // tokens left to grow
};

}  // namespace tts
