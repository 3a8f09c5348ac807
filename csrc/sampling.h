// The next token of many rows by Gumbel noise from counters: argmax of logit / T + Gumbel(Philox(key; token, position, identity)).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace tts {

// Philox4x32-10 at one counter.
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

struct SamplingCall {
  const float* logits;  // [rows, vocab_size], contiguous; -inf rules a token out
  int32_t vocab_size;
  float temperature;  // > 0
};

// For each of `count` draws: a row of logits, two key words, an identity and a position; the token drawn, or -1 from a row that has
// NaN, +inf or nothing finite. The argmax of the definition in sampling.py, ties to the lowest token, whatever the number of threads.
void sample(const SamplingCall& call, const int64_t* rows, const uint32_t* keys, const uint64_t* identities,
            const int64_t* positions, size_t count, int64_t* tokens, int num_threads);

}  // namespace tts
