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
  Columns columns;
  Reads reads;
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
  for (size_t i = 0; i < num_rows; ++i) {
    const Row& row = records_[i];
    add(row.lease, true, row.length - 1, row.path_start, &row.newest, 1);
    reads.sources.push_back(static_cast<int64_t>(reads.tokens.size()));
    reads.tokens.push_back(ends.back());
  }
  for (int64_t run : sources) reads.sources.push_back(std::lower_bound(read.begin(), read.end(), run) - read.begin());
  return {std::move(columns), std::move(reads)};
}

Draws Rows::draws(int32_t sampling, const int64_t* sources, size_t num_rows) const {
  refuse_unless_there(num_rows, records_);
  Draws found;
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

std::vector<std::pair<int64_t, int32_t>> Rows::append(const int64_t* tokens, size_t num_rows, const Rule& rule) {
  refuse_unless_there(num_rows, records_);
  for (size_t i = 0; i < num_rows; ++i)
    if (tokens[i] < 0 || tokens[i] >= rule.vocab || (rule.after && (records_[i].state < 0 || records_[i].state >= rule.states)))
      throw std::invalid_argument("the step rule knows no such token or state");
  std::vector<std::pair<int64_t, int32_t>> left;
  size_t next = 0;
  for (size_t i = 0; i < num_rows; ++i) {
    Row row = records_[i];
    row.newest = tokens[i];
    row.state = rule.after ? rule.after[row.state * rule.vocab + tokens[i]] : std::max(row.state - 1, rule.closed);
    ++row.length;
    const int32_t why = rule.eos[tokens[i]] * kEnded + (row.state == rule.closed) * kClosed + (row.length >= row.room) * kCut;
    if (why)
      left.emplace_back(static_cast<int64_t>(i), why);
    else
      records_[next++] = row;
  }
  return left;
}

}  // namespace tts
