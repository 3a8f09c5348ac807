#include "kv_tree.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace tts {
namespace {

std::string str(int64_t value) { return std::to_string(value); }

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

void refuse_unless_within(int64_t computed, const Tokens& tokens) {
  if (computed < 0 || computed > static_cast<int64_t>(tokens.size()))
    refuse(str(computed) + " computed tokens in a step of " + str(tokens.size()));
}

void refuse_unless_pool(int64_t num_blocks, int64_t block_size) {
  if (num_blocks <= 0 || block_size <= 0)
    refuse("a KV tree needs blocks and slots, got " + str(num_blocks) + " blocks of " + str(block_size) + " slots");
  if (num_blocks > std::numeric_limits<int32_t>::max() / block_size)
    refuse(str(num_blocks) + " blocks of " + str(block_size) + " slots do not fit 32-bit slot numbers");
}

[[noreturn]] void report(const std::string& sentence) {
  throw std::logic_error("the KV tree's books are wrong: " + sentence);
}

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15ull;
  return hash ^ (hash >> 29);
}

uint64_t child_key(int64_t parent, const Tokens& tokens) {
  uint64_t hash = mix(tokens.size(), static_cast<uint64_t>(parent));
  for (int32_t token : tokens) hash = mix(hash, static_cast<uint32_t>(token));
  return hash;
}

// Calls run(first slot, count) for the stretches of consecutive slots that hold tokens [start, end) of `blocks`.
template <class Run>
void for_runs(const Blocks& blocks, int64_t block_size, int64_t start, int64_t end, Run run) {
  int64_t block = start / block_size, offset = start % block_size;
  for (; start < end; ++block, offset = 0) {
    const int64_t count = std::min(block_size - offset, end - start);
    run(blocks[block] * block_size + offset, count);
    start += count;
  }
}

}  // namespace

// Keeps a path from being evicted while room is made under it.
struct KVTree::PinGuard {
  PinGuard(KVTree& tree, int64_t node) : tree(tree), node(node) { tree.pin(node); }
  ~PinGuard() { tree.unpin(node); }
  PinGuard(const PinGuard&) = delete;
  PinGuard& operator=(const PinGuard&) = delete;
  KVTree& tree;
  int64_t node;
};

KVTree::KVTree(int64_t num_blocks, int64_t block_size) : num_blocks_(num_blocks), block_size_(block_size) {
  refuse_unless_pool(num_blocks, block_size);
  free_.reserve(num_blocks);
  for (int64_t block = num_blocks; block-- > 0;) free_.push_back(static_cast<int32_t>(block));
}

// ---- nodes

int64_t KVTree::find(int64_t parent, const Tokens& tokens) {
  if (parent != kNone) nodes_.checked(parent);
  const int64_t node = lookup(parent, tokens, child_key(parent, tokens));
  if (node != kNone) touch(nodes_[node], node);
  return node;
}

int64_t KVTree::insert(int64_t parent, const Tokens& tokens) {
  if (parent != kNone) nodes_.checked(parent);
  const uint64_t key = child_key(parent, tokens);
  int64_t node = lookup(parent, tokens, key);
  if (node == kNone) {
    PinGuard guard(*this, parent);
    const int64_t num_blocks = blocks_for(tokens.size());
    if (!make_room(num_blocks)) return kNone;
    node = place(parent, tokens, key);
    take(nodes_[node].blocks, num_blocks);
    idle_ += num_blocks;
    hold(node);
    return node;
  }
  hold(node);
  return node;
}

void KVTree::hold(int64_t handle) {
  Node& node = nodes_[nodes_.checked(handle)];
  ++node.holds;
  pin(handle);
  touch(node, handle);
}

void KVTree::drop(int64_t handle) {
  Node& node = nodes_[nodes_.checked(handle)];
  if (node.holds == 0) refuse("node " + str(handle) + " is dropped more often than it was held");
  --node.holds;
  touch(node, handle);
  unpin(handle);
}

void KVTree::set_computed(int64_t handle, int64_t num_tokens) {
  Node& node = nodes_[nodes_.checked(handle)];
  if (num_tokens < 0 || num_tokens > static_cast<int64_t>(node.tokens.size()))
    refuse(str(num_tokens) + " computed tokens in a node of " + str(node.tokens.size()));
  node.computed = num_tokens;
}

int64_t KVTree::num_tokens(int64_t node) const {
  return static_cast<int64_t>(nodes_[nodes_.checked(node)].tokens.size());
}

int64_t KVTree::lookup(int64_t parent, const Tokens& tokens, uint64_t key) const {
  const auto [first, last] = index_.equal_range(key);
  for (auto entry = first; entry != last; ++entry) {
    const Node& node = nodes_[entry->second];
    if (node.parent == parent && node.tokens == tokens) return entry->second;
  }
  return kNone;
}

// A new node with room for its blocks and none taken; the caller attaches them (idle) and holds it. Its parent is
// pinned. All that can fail is done before anything changes.
int64_t KVTree::place(int64_t parent, const Tokens& tokens, uint64_t key) {
  Evictable cut;
  cut.emplace();
  Node node;
  node.parent = parent;
  node.tokens = tokens;
  node.blocks.reserve(blocks_for(tokens.size()));
  node.key = key;
  node.path_end = static_cast<int64_t>(tokens.size()) + (parent == kNone ? 0 : nodes_[parent].path_end);
  node.ticket = cut.extract(cut.begin());
  index_.emplace(key, nodes_.prepare());
  if (parent != kNone) ++nodes_[parent].children;
  return nodes_.add(std::move(node));
}

// ---- leases

int64_t KVTree::lease(int64_t parent) {
  Lease lease;
  lease.parent = nodes_.checked(parent);
  leases_.prepare();
  pin(parent);
  touch(nodes_[parent], parent);
  return leases_.add(std::move(lease));
}

bool KVTree::extend(int64_t lease, int64_t num_tokens) { return extend_many(&lease, 1, num_tokens) == 1; }

size_t KVTree::extend_many(const int64_t* leases, size_t num_leases, int64_t num_tokens) {
  if (num_tokens < 0) refuse("a lease cannot grow by " + str(num_tokens) + " tokens");
  for (size_t i = 0; i < num_leases; ++i) leases_.checked(leases[i]);
  // More than all of the pool, as it may be of one that shrank, finds no room; how much more makes no difference.
  num_tokens = std::min(num_tokens, num_blocks_ * block_size_ + 1);
  for (size_t i = 0; i < num_leases; ++i)
    if (!extend_checked(leases_[leases[i]], num_tokens)) return i;
  return num_leases;
}

bool KVTree::extend_checked(Lease& lease, int64_t num_tokens) {
  const int64_t more = blocks_for(lease.num_tokens + num_tokens) - static_cast<int64_t>(lease.blocks.size());
  if (more > 0) {
    lease.blocks.reserve(lease.blocks.size() + more);
    if (!make_room(more)) return false;
    take(lease.blocks, more);
    filling_ += more;
  }
  lease.num_tokens += num_tokens;
  return true;
}

int64_t KVTree::seal(int64_t handle, const Tokens& tokens, int64_t computed) {
  Lease& lease = leases_[leases_.checked(handle)];
  const int64_t num_tokens = static_cast<int64_t>(tokens.size());
  if (num_tokens > lease.num_tokens)
    refuse("a lease with room for " + str(lease.num_tokens) + " tokens cannot be sealed with " + str(num_tokens));
  refuse_unless_within(computed, tokens);
  const uint64_t key = child_key(lease.parent, tokens);
  int64_t node = lookup(lease.parent, tokens, key);
  if (node == kNone) {
    node = place(lease.parent, tokens, key);
    const int64_t keep = blocks_for(tokens.size());
    nodes_[node].computed = computed;
    nodes_[node].blocks.assign(lease.blocks.begin(), lease.blocks.begin() + keep);  // into reserved room
    filling_ -= keep;
    idle_ += keep;
    lease.blocks.erase(lease.blocks.begin(), lease.blocks.begin() + keep);
  }
  hold(node);
  release(handle);
  return node;
}

int64_t KVTree::keep(int64_t handle, const Tokens& tokens, int64_t computed) {
  refuse_unless_within(computed, tokens);
  const int64_t lacking = static_cast<int64_t>(tokens.size()) - leases_[leases_.checked(handle)].num_tokens;
  if (lacking > 0 && !extend(handle, lacking)) {
    release(handle);
    return kNone;
  }
  const int64_t node = seal(handle, tokens, computed);
  drop(node);
  return node;
}

int64_t KVTree::fork(int64_t handle, std::vector<Move>& copies) {
  const int64_t parent = leases_[leases_.checked(handle)].parent, num_tokens = leases_[handle].num_tokens;
  const int64_t forked = lease(parent);
  if (!extend(forked, num_tokens)) {
    release(forked);
    return kNone;
  }
  const Blocks &from = leases_[handle].blocks, &to = leases_[forked].blocks;
  for (size_t i = 0; i < to.size(); ++i) copies.push_back({from[i], to[i]});
  return forked;
}

void KVTree::release(int64_t handle) {
  Lease& lease = leases_[leases_.checked(handle)];
  filling_ -= static_cast<int64_t>(lease.blocks.size());
  give_back(lease.blocks);
  unpin(lease.parent);
  leases_.remove(handle);
}

// ---- room

Counts KVTree::counts() const noexcept {
  return {static_cast<int64_t>(free_.size()), filling_, pinned_, idle_};
}

int64_t KVTree::evict(int64_t num_blocks) {
  int64_t freed = 0;
  while (freed < num_blocks && !evictable_.empty()) freed += evict_oldest();
  return freed;
}

int64_t KVTree::blocks_for(int64_t num_tokens) const noexcept { return (num_tokens + block_size_ - 1) / block_size_; }

bool KVTree::has_room(int64_t num_blocks) noexcept {
  const bool has = available() >= num_blocks;
  refused_ += !has;
  return has;
}

// Everything idle can be evicted, for no descendant of an idle node is pinned: what cannot succeed evicts nothing.
bool KVTree::make_room(int64_t num_blocks) noexcept {
  if (!has_room(num_blocks)) return false;
  while (static_cast<int64_t>(free_.size()) < num_blocks) evicted_ += evict_oldest();
  return true;
}

// A smaller pool keeps what fits of the idle nodes, and the blocks beyond its end are moved into free ones below it.
std::optional<std::vector<Move>> KVTree::resize(int64_t num_blocks) {
  refuse_unless_pool(num_blocks, block_size_);
  if (filling_ + pinned_ > num_blocks) return std::nullopt;
  std::vector<Move> moves;
  moves.reserve(std::max<int64_t>(num_blocks_ - num_blocks, 0));
  free_.reserve(num_blocks);
  while (num_blocks_ - static_cast<int64_t>(free_.size()) > num_blocks) evicted_ += evict_oldest();
  free_.erase(std::remove_if(free_.begin(), free_.end(), [&](int32_t block) { return block >= num_blocks; }), free_.end());
  const auto move = [&](Blocks& blocks) {
    for (int32_t& block : blocks)
      if (block >= num_blocks) {
        moves.push_back({block, free_.back()});
        block = free_.back();
        free_.pop_back();
      }
  };
  nodes_.for_each_item([&](Node& node) { move(node.blocks); });
  leases_.for_each_item([&](Lease& lease) { move(lease.blocks); });
  if (num_blocks > num_blocks_) {  // under the others: low numbers are taken first
    Blocks more(num_blocks - num_blocks_);
    std::iota(more.rbegin(), more.rend(), static_cast<int32_t>(num_blocks_));
    free_.insert(free_.begin(), more.begin(), more.end());
  }
  num_blocks_ = num_blocks;
  return moves;
}

int64_t KVTree::extent() const {
  std::vector<bool> is_free(num_blocks_, false);
  for (int32_t block : free_) is_free[block] = true;
  int64_t extent = num_blocks_;
  while (extent > 0 && is_free[extent - 1]) --extent;
  return extent;
}

void KVTree::take(Blocks& blocks, int64_t num_blocks) noexcept {
  for (; num_blocks > 0; --num_blocks) {
    blocks.push_back(free_.back());
    free_.pop_back();
  }
}

void KVTree::give_back(const Blocks& blocks) noexcept { free_.insert(free_.end(), blocks.rbegin(), blocks.rend()); }

int64_t KVTree::evict_oldest() noexcept {
  const int64_t handle = evictable_.begin()->second;
  Node& node = nodes_[handle];
  const int64_t num_blocks = static_cast<int64_t>(node.blocks.size());
  evictable_.erase(evictable_.begin());
  auto entry = index_.equal_range(node.key).first;
  while (entry->second != handle) ++entry;
  index_.erase(entry);
  give_back(node.blocks);
  idle_ -= num_blocks;
  if (const int64_t above = node.parent; above != kNone) {
    Node& parent = nodes_[above];
    --parent.children;
    if (parent.children == 0 && parent.pins == 0) enlist(parent, above);
  }
  nodes_.remove(handle);
  return num_blocks;
}

// ---- pins: a node passes one pin to its parent for as long as it has any itself

void KVTree::pin(int64_t handle) noexcept {
  while (handle != kNone) {
    Node& node = nodes_[handle];
    if (node.pins++ > 0) return;
    const int64_t num_blocks = static_cast<int64_t>(node.blocks.size());
    idle_ -= num_blocks;
    pinned_ += num_blocks;
    delist(node, handle);
    handle = node.parent;
  }
}

void KVTree::unpin(int64_t handle) noexcept {
  while (handle != kNone) {
    Node& node = nodes_[handle];
    if (--node.pins > 0) return;
    const int64_t num_blocks = static_cast<int64_t>(node.blocks.size());
    pinned_ -= num_blocks;
    idle_ += num_blocks;
    if (node.children == 0) enlist(node, handle);
    handle = node.parent;
  }
}

void KVTree::touch(Node& node, int64_t handle) noexcept { use_at(node, handle, ++clock_); }

void KVTree::use_at(Node& node, int64_t handle, int64_t time) noexcept {
  const bool listed = node.ticket.empty();
  if (listed) delist(node, handle);
  node.last_use = time;
  if (listed) enlist(node, handle);
}

void KVTree::retire(const std::vector<int64_t>& nodes) {
  for (int64_t handle : nodes)
    if (nodes_.is_live(handle)) use_at(nodes_[handle], handle, 0);
}

void KVTree::enlist(Node& node, int64_t handle) noexcept {
  node.ticket.value() = {node.last_use, handle};
  evictable_.insert(std::move(node.ticket));
}

void KVTree::delist(Node& node, int64_t handle) noexcept {
  if (node.ticket.empty()) node.ticket = evictable_.extract({node.last_use, handle});
}

// ---- slots

void KVTree::context_slots(const int64_t* handles, const bool* is_lease, const int32_t* lens, size_t num_rows,
                           int32_t* out, size_t width) const {
  for (size_t b = 0; b < num_rows; ++b) {
    int32_t* row = out + b * width;
    const int64_t len = lens[b];
    const auto put = [&](const Blocks& blocks, int64_t path_start, int64_t path_end) {
      if (path_start >= len) return;
      int32_t* at = row + path_start;
      for_runs(blocks, block_size_, 0, std::min(path_end, len) - path_start, [&](int64_t slot, int64_t count) {
        for (int64_t i = 0; i < count; ++i) at[i] = static_cast<int32_t>(slot + i);
        at += count;
      });
    };
    const Lease* open = is_lease[b] ? &leases_[leases_.checked(handles[b])] : nullptr;
    int64_t node = open ? open->parent : nodes_.checked(handles[b]);
    const int64_t last_end = nodes_[node].path_end, end = open ? last_end + open->num_tokens : last_end;
    if (len < 0 || len > end || len > static_cast<int64_t>(width))
      refuse("row " + str(b) + " asks for " + str(len) + " slots; its path has " + str(end) + " and the output " +
             str(width) + " a row");
    if (open) put(open->blocks, last_end, end);
    for (int64_t path_end = last_end; node != kNone; node = nodes_[node].parent) {
      const int64_t path_start = path_end - static_cast<int64_t>(nodes_[node].tokens.size());
      put(nodes_[node].blocks, path_start, path_end);
      path_end = path_start;
    }
    std::fill(row + len, row + width, 0);
  }
}

Forest KVTree::forest(const int64_t* handles, const bool* is_lease, const int32_t* ends, size_t num_rows) const {
  Forest found;
  std::vector<const Blocks*> blocks;
  std::vector<int64_t> nodes, above;
  found.node.reserve(num_rows);
  const auto add = [&](int32_t parent, int64_t len, const Blocks& its_blocks) {
    found.parent.push_back(parent);
    found.len.push_back(static_cast<int32_t>(len));
    blocks.push_back(&its_blocks);
    return static_cast<int32_t>(blocks.size()) - 1;
  };
  const auto visit = [&](int64_t node) {  // the node and whatever of its path is new
    for (; node != kNone && nodes_[node].visited < 0; node = nodes_[node].parent) above.push_back(node);
    int32_t place = node == kNone ? -1 : nodes_[node].visited;
    for (; !above.empty(); above.pop_back()) {
      const Node& next = nodes_[above.back()];
      place = next.visited = add(place, static_cast<int64_t>(next.tokens.size()), next.blocks);
      nodes.push_back(above.back());
    }
    return place;
  };
  for (size_t b = 0; b < num_rows; ++b)  // before anything is marked
    is_lease[b] ? leases_.checked(handles[b]) : nodes_.checked(handles[b]);
  for (size_t b = 0; b < num_rows; ++b) {
    const Lease* open = is_lease[b] ? &leases_[handles[b]] : nullptr;
    const int32_t place = visit(open ? open->parent : handles[b]);
    found.node.push_back(open ? add(place, open->num_tokens, open->blocks) : place);
  }
  for (int64_t node : nodes) nodes_[node].visited = -1;
  for (size_t b = 0; b < num_rows; ++b) {
    int32_t& len = found.len[found.node[b]];
    if (ends[b] < 0 || ends[b] > len)
      refuse("row " + str(b) + " asks for " + str(ends[b]) + " of the " + str(len) + " tokens of its step");
    len = ends[b];
  }
  found.slots.resize(std::accumulate(found.len.begin(), found.len.end(), size_t{0}));
  int32_t* at = found.slots.data();
  found.first.reserve(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    found.first.push_back(static_cast<int32_t>(at - found.slots.data()));
    for_runs(*blocks[i], block_size_, 0, found.len[i], [&](int64_t slot, int64_t count) {
      for (int64_t k = 0; k < count; ++k) *at++ = static_cast<int32_t>(slot + k);
    });
  }
  return found;
}

void KVTree::write_slots(const int64_t* handles, const bool* is_lease, const int32_t* starts, const int32_t* counts,
                         size_t num_rows, int64_t* out, size_t num_out) const {
  const int64_t* const out_end = out + num_out;
  for (size_t b = 0; b < num_rows; ++b) {
    const Lease* open = is_lease[b] ? &leases_[leases_.checked(handles[b])] : nullptr;
    const Node* closed = open ? nullptr : &nodes_[nodes_.checked(handles[b])];
    const int64_t start = starts[b], count = counts[b];
    const int64_t own = open ? open->num_tokens : static_cast<int64_t>(closed->tokens.size());
    if (start < 0 || count < 0 || start + count > own || count > out_end - out)
      refuse("row " + str(b) + " asks for tokens " + str(start) + " to " + str(start + count) + " of " + str(own) +
             " and the output has " + str(out_end - out) + " places left");
    for_runs(open ? open->blocks : closed->blocks, block_size_, start, start + count, [&](int64_t slot, int64_t run) {
      for (int64_t i = 0; i < run; ++i) *out++ = slot + i;
    });
  }
  if (out != out_end) refuse("the output has " + str(out_end - out) + " places more than the rows have tokens");
}

Places KVTree::lay_out(const int64_t* handles, const bool* is_lease, const int32_t* starts, const int32_t* counts,
                       const int32_t* path_starts, size_t num_rows) const {
  Places places;
  places.row_starts.reserve(num_rows + 1);
  places.ends.reserve(num_rows);
  places.lens.reserve(num_rows);
  places.positions.reserve(num_rows);
  places.row_starts.push_back(0);
  for (size_t b = 0; b < num_rows; ++b) {
    places.row_starts.push_back(places.row_starts.back() + counts[b]);
    places.ends.push_back(starts[b] + counts[b]);
    places.lens.push_back(path_starts[b] + places.ends.back());
    for (int32_t i = counts[b]; i > 0; --i) places.positions.push_back(places.lens.back() - i);
  }
  places.slots.resize(places.positions.size());
  write_slots(handles, is_lease, starts, counts, num_rows, places.slots.data(), places.slots.size());
  return places;
}

// ---- the audit

void KVTree::check() const {
  std::vector<bool> seen(num_blocks_, false);
  const auto claim = [&](const Blocks& blocks, const char* noun, int64_t handle) {
    for (int32_t block : blocks) {
      if (block < 0 || block >= num_blocks_) report(std::string(noun) + " " + str(handle) + " has a block " + str(block));
      if (seen[block]) report("block " + str(block) + " of " + noun + " " + str(handle) + " has two owners");
      seen[block] = true;
    }
    return static_cast<int64_t>(blocks.size());
  };
  const auto check_size = [&](const Blocks& blocks, int64_t num_tokens, const char* noun, int64_t handle) {
    if (static_cast<int64_t>(blocks.size()) != blocks_for(num_tokens))
      report(std::string(noun) + " " + str(handle) + " has " + str(blocks.size()) + " blocks for " + str(num_tokens) +
             " tokens");
  };

  std::unordered_map<int64_t, std::pair<int64_t, int64_t>> below;  // node -> (resident children, pins from below)
  Counts sums = {claim(free_, "free list", 0), 0, 0, 0};
  leases_.for_each([&](int64_t handle, const Lease& lease) {
    sums.filling += claim(lease.blocks, "lease", handle);
    check_size(lease.blocks, lease.num_tokens, "lease", handle);
    ++below[nodes_.checked(lease.parent)].second;
  });
  nodes_.for_each([&](int64_t, const Node& node) {
    if (node.parent == kNone) return;
    auto& [children, pins] = below[nodes_.checked(node.parent)];
    ++children;
    pins += node.pins > 0;
  });

  size_t num_evictable = 0;
  nodes_.for_each([&](int64_t handle, const Node& node) {
    const int64_t num_tokens = static_cast<int64_t>(node.tokens.size());
    (node.pins > 0 ? sums.pinned : sums.idle) += claim(node.blocks, "node", handle);
    check_size(node.blocks, num_tokens, "node", handle);
    if (node.computed < 0 || node.computed > num_tokens)
      report("node " + str(handle) + " has " + str(node.computed) + " of " + str(num_tokens) + " tokens computed");
    if (node.path_end != num_tokens + (node.parent == kNone ? 0 : nodes_[node.parent].path_end))
      report("node " + str(handle) + " of " + str(num_tokens) + " tokens ends its path at " + str(node.path_end));
    const auto [children, pins] = below[handle];
    if (node.holds < 0 || node.children != children || node.pins != node.holds + pins)
      report("node " + str(handle) + " counts " + str(node.children) + " children and " + str(node.pins) +
             " pins, found " + str(children) + " and " + str(node.holds + pins));
    if (lookup(node.parent, node.tokens, node.key) != handle)
      report("node " + str(handle) + " is not found by its tokens");
    const bool listed = evictable_.count({node.last_use, handle}) == 1;
    if (listed != (node.pins == 0 && children == 0) || listed != node.ticket.empty())
      report("node " + str(handle) + (listed ? " is" : " is not") + " listed for eviction");
    num_evictable += listed;
  });
  if (index_.size() != nodes_.size() || evictable_.size() != num_evictable)
    report(str(nodes_.size()) + " nodes, " + str(index_.size()) + " indexed, " + str(evictable_.size()) +
           " listed of " + str(num_evictable) + " evictable");

  const Counts now = counts();
  if (now.free != sums.free || now.filling != sums.filling || now.pinned != sums.pinned || now.idle != sums.idle ||
      now.free + now.filling + now.pinned + now.idle != num_blocks_)
    report("counted " + str(now.free) + " free + " + str(now.filling) + " filling + " + str(now.pinned) +
           " pinned + " + str(now.idle) + " idle of " + str(num_blocks_) + " blocks, found " + str(sums.free) + " + " +
           str(sums.filling) + " + " + str(sums.pinned) + " + " + str(sums.idle));
}

}  // namespace tts
