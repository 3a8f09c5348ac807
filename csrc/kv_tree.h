// The bookkeeping of one model's KV pool: which block belongs to which step of the shared tree. No tensors, no Python.
//
// A block is free, filling (leased to an open step), pinned (a closed step that somebody needs) or idle (a closed step
// kept in case somebody comes back), and the four always add up to the pool. One thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tree_plan.h"

namespace tts {

constexpr int64_t kNone = -1;  // no node: the parent of the top level, and the answer of a search that found nothing

using Tokens = std::vector<int32_t>;
using Blocks = std::vector<int32_t>;

struct Counts {
  int64_t free, filling, pinned, idle;  // blocks
};

struct Move {
  int32_t from, to;  // blocks
};

// B runs of consecutive new tokens, T in all.
struct Places {
  std::vector<int32_t> row_starts;  // [B + 1], tokens of run b are row_starts[b] : row_starts[b + 1]
  std::vector<int32_t> ends, lens;  // [B], up to its last token: of its own node or lease, and of the whole path
  std::vector<int64_t> positions;   // [T], on their paths
  std::vector<int64_t> slots;       // [T]
};

// Records behind handles `index | generation << 32`, never 0: a place is reused, its handle is not. Two pools whose
// first generations differ in parity never accept each other's handles.
template <class T>
class Pool {
 public:
  Pool(const char* noun, int64_t first_generation) : noun_(noun), first_generation_(first_generation) {}

  T& operator[](int64_t handle) noexcept { return slots_[index(handle)].item; }
  const T& operator[](int64_t handle) const noexcept { return slots_[index(handle)].item; }

  bool is_live(int64_t handle) const noexcept {
    const size_t i = index(handle);
    return handle >= 0 && i < slots_.size() && slots_[i].live && slots_[i].generation == handle >> 32;
  }

  int64_t checked(int64_t handle) const {
    if (!is_live(handle))
      throw std::invalid_argument("stale " + std::string(noun_) + " " + std::to_string(handle) +
                                  ": it was given back, evicted or never handed out");
    return handle;
  }

  // The handle that the next `add` will return; after this call `add` and `remove` do not allocate.
  int64_t prepare() {
    if (spare_.empty()) {
      if (slots_.size() == slots_.capacity()) slots_.reserve(2 * slots_.size() + 8);
      spare_.reserve(slots_.capacity());
      slots_.push_back({T(), first_generation_, false});
      spare_.push_back(slots_.size() - 1);
    }
    return handle(spare_.back());
  }

  int64_t add(T item) noexcept {
    const size_t i = spare_.back();
    spare_.pop_back();
    slots_[i].item = std::move(item);
    slots_[i].live = true;
    ++size_;
    return handle(i);
  }

  void remove(int64_t handle) noexcept {
    const size_t i = index(handle);
    slots_[i].item = T();
    slots_[i].live = false;
    slots_[i].generation = (slots_[i].generation + 2) & 0x7fffffff;
    spare_.push_back(i);
    --size_;
  }

  size_t size() const noexcept { return size_; }

  template <class Visit>
  void for_each(Visit visit) const {
    for (size_t i = 0; i < slots_.size(); ++i)
      if (slots_[i].live) visit(handle(i), slots_[i].item);
  }

  template <class Visit>
  void for_each_item(Visit visit) {
    for (Slot& slot : slots_)
      if (slot.live) visit(slot.item);
  }

 private:
  struct Slot {
    T item;
    int64_t generation;
    bool live;
  };

  static size_t index(int64_t handle) noexcept { return static_cast<uint32_t>(handle); }
  int64_t handle(size_t i) const noexcept { return static_cast<int64_t>(i) | slots_[i].generation << 32; }

  const char* noun_;
  int64_t first_generation_;
  std::vector<Slot> slots_;
  std::vector<size_t> spare_;  // capacity >= slots_.size(), so giving a place back cannot fail
  size_t size_ = 0;
};

// Errors a caller can cause are std::invalid_argument, and nothing has changed then.
class KVTree {
 public:
  KVTree(int64_t num_blocks, int64_t block_size);

  // Nodes: closed steps and prompts.
  int64_t find(int64_t parent, const Tokens& tokens);    // kNone if not resident
  int64_t insert(int64_t parent, const Tokens& tokens);  // found or made, held once; kNone if it does not fit now
  void hold(int64_t node);
  void drop(int64_t node);
  void set_computed(int64_t node, int64_t num_tokens);
  void retire(const std::vector<int64_t>& nodes);  // they go before all others; those that are gone are passed over
  int64_t computed(int64_t node) const { return nodes_[nodes_.checked(node)].computed; }
  int64_t num_tokens(int64_t node) const;
  int64_t parent(int64_t node) const { return nodes_[nodes_.checked(node)].parent; }
  int64_t path_len(int64_t node) const { return nodes_[nodes_.checked(node)].path_end; }

  // Leases: open steps of one row each.
  int64_t lease(int64_t parent);
  bool extend(int64_t lease, int64_t num_tokens);
  size_t extend_many(const int64_t* leases, size_t num_leases, int64_t num_tokens);  // how many leading ones it reached
  int64_t seal(int64_t lease, const Tokens& tokens, int64_t computed);
  int64_t keep(int64_t lease, const Tokens& tokens, int64_t computed);  // sealed, held by nobody; kNone, released, if it does not fit
  int64_t fork(int64_t lease, std::vector<Move>& copies);  // another step that began alike; kNone, nothing changed, if it does not fit
  void release(int64_t lease);
  int64_t lease_start(int64_t lease) const { return nodes_[leases_[leases_.checked(lease)].parent].path_end; }

  // Room.
  int64_t evict(int64_t num_blocks);  // blocks freed: at least num_blocks unless everything idle is gone
  int64_t evict_all() { return evict(num_blocks_); }
  bool has_room(int64_t num_blocks) noexcept;
  std::optional<std::vector<Move>> resize(int64_t num_blocks);  // nothing, and nothing has changed, if it does not fit now
  int64_t extent() const;                                       // blocks up to the last one in use
  int64_t evicted() const noexcept { return evicted_; }
  int64_t refused() const noexcept { return refused_; }
  Counts counts() const noexcept;
  int64_t available() const noexcept { return static_cast<int64_t>(free_.size()) + idle_; }
  int64_t needed() const noexcept { return filling_ + pinned_; }
  void check() const;  // recounts everything; std::logic_error with a sentence if the books are wrong

  // Slots (block * block_size + offset) of whole batches, into the caller's buffers.
  void context_slots(const int64_t* handles, const bool* is_lease, const int32_t* lens, size_t num_rows, int32_t* out,
                     size_t width) const;
  void write_slots(const int64_t* handles, const bool* is_lease, const int32_t* starts, const int32_t* counts,
                   size_t num_rows, int64_t* out, size_t num_out) const;

  // Where the new tokens of a batch stand.
  Places lay_out(const int64_t* handles, const bool* is_lease, const int32_t* starts, const int32_t* counts,
                 const int32_t* path_starts, size_t num_rows) const;

  // The nodes under a batch's rows; row b's own one, or lease, with its first ends[b] tokens.
  Forest forest(const int64_t* handles, const bool* is_lease, const int32_t* ends, size_t num_rows) const;

  int64_t num_blocks() const noexcept { return num_blocks_; }
  int64_t block_size() const noexcept { return block_size_; }

 private:
  using Evictable = std::set<std::pair<int64_t, int64_t>>;  // (last use, node), oldest first

  struct alignas(64) Node {  // what `forest` reads of each comes first, in one line of the cache
    int64_t parent = kNone;
    Tokens tokens;
    Blocks blocks;
    mutable int32_t visited = -1;  // its place in the forest that is being listed
    uint64_t key = 0;      // where the index files it
    int64_t computed = 0;  // leading tokens whose K and V are written
    int64_t path_end = 0;  // tokens from the top of the path to the end of this node
    int64_t last_use = 0;
    int64_t holds = 0;     // by callers
    int64_t pins = 0;      // holds + leases under it + pinned children: pinned while > 0
    int64_t children = 0;  // resident ones
    Evictable::node_type ticket;  // its entry of evictable_, kept here while not entered: listing never allocates
  };

  struct Lease {
    int64_t parent = kNone;
    Blocks blocks;
    int64_t num_tokens = 0;
  };

  struct PinGuard;

  int64_t blocks_for(int64_t num_tokens) const noexcept;
  int64_t lookup(int64_t parent, const Tokens& tokens, uint64_t key) const;
  int64_t place(int64_t parent, const Tokens& tokens, uint64_t key);
  bool make_room(int64_t num_blocks) noexcept;
  void take(Blocks& blocks, int64_t num_blocks) noexcept;
  void give_back(const Blocks& blocks) noexcept;
  bool extend_checked(Lease& lease, int64_t num_tokens);
  void pin(int64_t node) noexcept;
  void unpin(int64_t node) noexcept;
  void touch(Node& node, int64_t handle) noexcept;
  void use_at(Node& node, int64_t handle, int64_t time) noexcept;
  void enlist(Node& node, int64_t handle) noexcept;
  void delist(Node& node, int64_t handle) noexcept;
  int64_t evict_oldest() noexcept;

  int64_t num_blocks_, block_size_;
  Pool<Node> nodes_{"node", 2};
  Pool<Lease> leases_{"lease", 1};
  std::unordered_multimap<uint64_t, int64_t> index_;  // hash of (parent, tokens) -> node
  Evictable evictable_;                               // unpinned nodes without resident children
  Blocks free_;                                       // a stack; its capacity is the pool
  int64_t filling_ = 0, pinned_ = 0, idle_ = 0;       // blocks
  int64_t clock_ = 0;
  int64_t evicted_ = 0, refused_ = 0;  // blocks of idle nodes given up for others; times that there was no room
};

}  // namespace tts
