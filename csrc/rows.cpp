#include "rows.h"

#include <algorithm>
#include <stdexcept>

namespace tts {
namespace {

void refuse_unless_there(size_t num_rows, const std::vector<Row>& records) {
  if (num_rows > records.size()) throw std::invalid_argument("there are no such rows");
}

}  // namespace

void Rows::add(size_t place, const Row& row) {
  refuse_unless_there(place + 1, records_);
  records_[place] = row;
}

std::pair<Columns, Reads> Rows::follow(const std::vector<Run>& runs, const std::vector<int64_t>& sources, size_t num_rows) const {
  refuse_unless_there(num_rows, records_);
  std::vector<int64_t> read = sources, ends;
  std::sort(read.begin(), read.end());
  read.erase(std::unique(read.begin(), read.end()), read.end());
  if (!read.empty() && (read.front() < 0 || read.back() >= static_cast<int64_t>(runs.size())))
    throw std::invalid_argument("a row draws behind a run that is not there");
  Columns columns(runs.size() + num_rows);
  Reads reads;
  ends.reserve(runs.size() + num_rows);
  reads.tokens.reserve(read.size() + num_rows);
  reads.sources.reserve(num_rows + sources.size());
  const auto add = [&](int64_t handle, bool is_lease, int32_t start, int32_t path_start, const int64_t* tokens, size_t count) {
    columns.handles.push_back(handle);
    columns.is_lease.push_back(is_lease);
    columns.starts.push_back(start);
    columns.counts.push_back(static_cast<int32_t>(count));
    columns.path_starts.push_back(path_start);
    columns.token_ids.insert(columns.token_ids.end(), tokens, tokens + count);
    ends.push_back(static_cast<int64_t>(columns.token_ids.size()) - 1);
  };
  for (const auto& [handle, is_lease, start, path_start, tokens] : runs)
    add(handle, is_lease, start, path_start, tokens.data(), tokens.size());
  for (int64_t run : read) reads.tokens.push_back(ends[run]);
  const std::vector<int32_t> first = firsts(num_rows);
  for (size_t i = 0; i < num_rows; ++i) {
    const Row& row = records_[i];
    if (first[i] < static_cast<int32_t>(i)) {
      reads.sources.push_back(reads.sources[first[i]]);
      continue;
    }
    add(row.lease, true, row.length - 1, row.path_start, &row.newest, 1);
    reads.sources.push_back(static_cast<int64_t>(reads.tokens.size()));
    reads.tokens.push_back(ends.back());
  }
  for (int64_t run : sources) reads.sources.push_back(std::lower_bound(read.begin(), read.end(), run) - read.begin());
  return {std::move(columns), std::move(reads)};
}

Draws Rows::draws(int32_t sampling, const int64_t* sources, size_t num_rows) const {
  refuse_unless_there(num_rows, records_);
  Draws found(num_rows);
  for (size_t i = 0; i < num_rows; ++i) {
    const Row& row = records_[i];
    if (row.sampling != sampling) continue;
    found.rows.push_back(static_cast<int64_t>(i));
    found.sources.push_back(sources[i]);
    found.keys.insert(found.keys.end(), row.key, row.key + 2);
    found.identities.push_back(row.identity);
    found.positions.push_back(int64_t{row.path_start} + row.length);
  }
  return found;
}

Change Rows::append(const int64_t* tokens, size_t num_rows, const Rule& rule, KVTree& tree) {
  refuse_unless_there(num_rows, records_);
  for (size_t i = 0; i < num_rows; ++i)
    if (tokens[i] < 0 || tokens[i] >= rule.vocab || (rule.after && (records_[i].state < 0 || records_[i].state >= rule.states)))
      throw std::invalid_argument("the step rule knows no such token or state");
  const std::vector<int32_t> first = firsts(num_rows);
  std::vector<int32_t> why(num_rows), heads, next(num_rows, -1), last(num_rows);
  for (size_t i = 0; i < num_rows; ++i) {
    Row& row = records_[i];
    row.newest = tokens[i];
    row.state = rule.after ? rule.after[row.state * rule.vocab + tokens[i]] : std::max(row.state - 1, rule.closed);
    ++row.length;
    why[i] = rule.eos[tokens[i]] * kEnded + (row.state == rule.closed) * kClosed + (row.length >= row.room) * kCut;
    const int32_t head = first[i], place = static_cast<int32_t>(i);
    if (head != place) {
      if (next[head] < 0) heads.push_back(head), last[head] = head;
      next[last[head]] = place, last[head] = place;
    }
  }
  Change change;
  std::vector<int32_t> members;
  for (int32_t head : heads) {
    members.clear();
    for (int32_t i = head; i >= 0; i = next[i]) members.push_back(i);
    part(members, why, tree, change);
  }
  size_t stays = 0;
  for (size_t i = 0; i < num_rows; ++i) {
    if (why[i])
      change.left.emplace_back(static_cast<int64_t>(i), why[i]);
    else
      records_[stays++] = records_[i];
  }
  return change;
}

void Rows::part(std::vector<int32_t>& members, const std::vector<int32_t>& why, KVTree& tree, Change& change) {
  const auto alike = [&](int32_t a, int32_t b) { return records_[a].newest == records_[b].newest && why[a] == why[b]; };
  const int64_t lease = records_[members.front()].lease;
  const int32_t foremost = members.front();
  const auto needs_it = std::find_if(members.begin(), members.end(), [&](int32_t i) { return !(why[i] & kEnded); });
  int32_t head = needs_it == members.end() ? members.front() : *needs_it;
  int64_t own = lease;
  for (bool keeps = true; !members.empty(); keeps = false) {
    if (!keeps) {
      head = members.front();
      own = why[head] & kEnded ? kNone : tree.fork(lease, change.copies);
    }
    size_t rest = 0;
    for (int32_t i : members) {
      if (!alike(i, head)) {
        members[rest++] = i;
        continue;
      }
      if (!keeps || (i == head && head != foremost)) change.parted.push_back({i, own, i == head});
      records_[i].lease = own;
    }
    members.resize(rest);
  }
}

std::vector<int64_t> Rows::leases(size_t num_rows) const {
  refuse_unless_there(num_rows, records_);
  const std::vector<int32_t> first = firsts(num_rows);
  std::vector<int64_t> found;
  found.reserve(num_rows);
  for (size_t i = 0; i < num_rows; ++i)
    if (first[i] == static_cast<int32_t>(i)) found.push_back(records_[i].lease);
  return found;
}

std::vector<int32_t> Rows::firsts(size_t num_rows) const {
  size_t size = 1;
  while (size < 2 * num_rows) size *= 2;
  std::vector<int32_t> found(size, -1), first(num_rows);  // found: by the low bits of a lease, or in the next free place
  for (size_t i = 0; i < num_rows; ++i) {
    size_t at = records_[i].lease & (size - 1);
    while (found[at] >= 0 && records_[found[at]].lease != records_[i].lease) at = (at + 1) & (size - 1);
    if (found[at] < 0) found[at] = static_cast<int32_t>(i);
    first[i] = found[at];
  }
  return first;
}

}  // namespace tts
