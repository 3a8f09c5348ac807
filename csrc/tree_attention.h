// Attention over a shared tree on the CPU: softmax(q k / sqrt(D)) v for the queries of a TreePlan, shared keys read once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu_ops.h"
#include "tree_plan.h"

namespace tts {

struct AttentionCall {
  const void* q;        // [T, H, D], tokens q_stride elements apart
  const void* k;        // [slots, K, D]
  const void* v;
  void* out;            // [T, H, D], contiguous
  int64_t q_stride;
  int32_t num_heads, num_kv_heads, head_dim;  // head_dim even, at most 256
  Element element;  // of queries, keys, values and output alike
};

// The names of the kernels that this machine can run, the fastest first; "scalar" is always the last.
const std::vector<std::string>& instruction_sets();

// Fixed order of additions whatever the number of threads; a query that sees no key gets 0.
void tree_attention(const TreePlan& plan, const AttentionCall& call, const std::string& instruction_set, int num_threads);

// Copies rows of `bytes` bytes, `stride` bytes apart, to rows `slots` of a table of such rows.
void store_rows(const void* rows, int64_t stride, void* table, int64_t bytes, const int64_t* slots, size_t num_rows);

}  // namespace tts
