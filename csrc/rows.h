// The rows of a batch that decode: a record of each, oldest first, and what a tick does to all of them. No tensors, no Python.
// Rows with equal tokens so far may share a lease: they are read once, and part as soon as they differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "kv_tree.h"

namespace tts {

struct Row {
  int64_t lease;
  int64_t newest;  // its last token, not written yet
  uint64_t identity;
  uint32_t key[2];
  int32_t sampling;    // a number that its owner gave
  int32_t path_start;  // tokens on the path before the step
  int32_t length;      // tokens drawn; all but the newest are written
  int32_t room;        // the most that there may be
  int32_t state;       // the step rule's
};

// Why rows leave; one token may do several. As kernels/advance.py has them.
enum Reason : int32_t { kEnded = 1, kClosed = 2, kCut = 4 };

// A step rule on tokens: see StepRule in steps.py.
struct Rule {
  const uint8_t* after;  // [states, vocab], or null
  const bool* eos;       // [vocab]
  int64_t states, vocab;
  int32_t closed;
};

// New tokens of one node or lease.
using Run = std::tuple<int64_t, bool, int32_t, int32_t, std::vector<int64_t>>;  // handle, is_lease, start, path_start, tokens

// Runs column by column, as runner.Segments has them.
struct Columns {
  std::vector<int64_t> handles;
  std::vector<bool> is_lease;
  std::vector<int32_t> starts, counts, path_starts;
  std::vector<int64_t> token_ids;

  explicit Columns(size_t most) {  // so many runs
    handles.reserve(most);
    is_lease.reserve(most);
    starts.reserve(most);
    counts.reserve(most);
    path_starts.reserve(most);
    token_ids.reserve(most);
  }
};

// The logits that rows draw from: behind which of a batch's tokens they are computed, and each row's among them.
struct Reads {
  std::vector<int64_t> tokens, sources;
};

// A row whose lease is another from here on, or that is the first under its lease from here on.
struct Parted {
  int64_t place, lease;
  bool first;
};

// What a token of every row changed.
struct Change {
  std::vector<std::pair<int64_t, int32_t>> left;  // places, as they were, of those that left, and why
  std::vector<Parted> parted;                     // places as they were
  std::vector<Move> copies;                       // blocks whose contents those that parted need too
};

// What next tokens are drawn with, draw by draw.
struct Draws {
  std::vector<int64_t> rows, sources;
  std::vector<uint32_t> keys;  // two of each
  std::vector<uint64_t> identities;
  std::vector<int64_t> positions;

  explicit Draws(size_t most) {
    rows.reserve(most);
    sources.reserve(most);
    keys.reserve(2 * most);
    identities.reserve(most);
    positions.reserve(most);
  }
};

class Rows {
 public:
  explicit Rows(size_t most) : records_(most) {}

  std::vector<Row>& records() noexcept { return records_; }  // the first so many are rows

  void add(size_t place, const Row& row);

  // The runs, and behind them the newest token of each of the first `num_rows`, of those under one lease once. The rows behind
  // those draw from what is read behind the runs `sources`.
  std::pair<Columns, Reads> follow(const std::vector<Run>& runs, const std::vector<int64_t>& sources, size_t num_rows) const;

  // Those of the rows that have this sampling; sources as Reads has them, one for each row.
  Draws draws(int32_t sampling, const int64_t* sources, size_t num_rows) const;

  // Every row takes a token. Those under one lease whose tokens differ now part: one of them keeps it, an equal of it with it, and
  // others fork it; kNone where there is no room for that, or where the row ended and needs none. Those that end leave, and the
  // others move together.
  Change append(const int64_t* tokens, size_t num_rows, const Rule& rule, KVTree& tree);

  // Those of the first `num_rows`, each once, in the order of their first rows.
  std::vector<int64_t> leases(size_t num_rows) const;

 private:
  // For each row the first one under its lease.
  std::vector<int32_t> firsts(size_t num_rows) const;
  // Of rows under one lease those that differ part.
  void part(std::vector<int32_t>& members, const std::vector<int32_t>& why, KVTree& tree, Change& change);

  std::vector<Row> records_;
};

}  // namespace tts
