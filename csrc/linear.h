// Rows times a matrix of float32 or bfloat16, in float32. Where a processor has no faster product of bfloat16 pairs, that is half
// as fast again as theirs, and reads half of what float32 weights would be. A row's bits depend on that row alone.
#pragma once

#include <cstdint>

#include "cpu_ops.h"

namespace tts {

// Whether `linear` runs on this processor at all.
bool multiplies_floats();

// Whether this processor multiplies pairs of bfloat16 faster than floats.
bool multiplies_pairs();

// Entries of the packed form of a matrix [rows, columns]: panels of so many rows, the last filled up with zeros.
int64_t packed_entries(int64_t rows, int64_t columns);

// weight [rows, columns] as `linear` reads it: panel by panel, a column of a panel side by side.
void pack(const void* weight, void* packed, Element element, int64_t rows, int64_t columns, int num_threads);

struct LinearCall {
  const void* x;  // [T, columns]
  Element x_element;
  const void* packed;  // of [rows, columns]
  Element packed_element;
  const void* more;        // nothing, or [T, rows], or [rows] where more_stride is 0; of x's element
  int64_t more_stride;
  void* out;  // [T, rows]
  Element out_element;
  int64_t num_tokens, rows, columns;
};

// out = x W^T + more, rounded once. Only where `multiplies_floats`.
void linear(const LinearCall& call, int num_threads);

}  // namespace tts
