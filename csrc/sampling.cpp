#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

// One function for several instruction sets, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__)
#include <immintrin.h>
#define TTS_X86 1
#define TTS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TTS_CLONES
#endif

namespace tts {
namespace {

constexpr int kCounters = 16, kTokens = 4 * kCounters;  // generated at a time
constexpr float kMostNoise = 22.875f;  // a Gumbel number from 32 random bits is at most -log(2^-33) = 22.874
constexpr uint32_t kMultipliers[2] = {0xD2511F53, 0xCD9E8D57}, kWeyl[2] = {0x9E3779B9, 0xBB67AE85};

// Sixteen lanes, in as many registers as the instruction set at hand takes for them.
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

struct Stream {
  uint32_t key[2], position, identity[2];
};

// Philox4x32-10 at kCounters counters from `first` on; the words of a counter side by side.
void philox_anywhere(const Stream& stream, uint32_t first, uint32_t words[kTokens]) {
  for (uint32_t i = 0; i < kCounters; ++i) {
    const auto found = philox({first + i, stream.position, stream.identity[0], stream.identity[1]}, {stream.key[0], stream.key[1]});
    std::copy_n(found.data(), 4, words + 4 * i);
  }
}

#if TTS_X86
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own header
// The same with a counter in each 64-bit lane: the upper halves hold what the next product ignores.
__attribute__((target("avx512f"))) void philox_avx512(const Stream& stream, uint32_t first, uint32_t words[kTokens]) {
  const __m512i m0 = _mm512_set1_epi64(kMultipliers[0]), m1 = _mm512_set1_epi64(kMultipliers[1]);
  for (uint32_t half = 0; half < kCounters; half += 8) {
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(first + half), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    __m512i c1 = _mm512_set1_epi64(stream.position), c2 = _mm512_set1_epi64(stream.identity[0]);
    __m512i c3 = _mm512_set1_epi64(stream.identity[1]);
    uint32_t k0 = stream.key[0], k1 = stream.key[1];
    for (int round = 0; round < 10; ++round, k0 += kWeyl[0], k1 += kWeyl[1]) {
      const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);  // all three xored
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
      c1 = p1;
      c3 = p0;
    }
    const __m512i a = _mm512_mask_shuffle_epi32(c0, 0xaaaa, c1, _MM_PERM_CCAA);  // words 0 and 1 of each counter
    const __m512i b = _mm512_mask_shuffle_epi32(c2, 0xaaaa, c3, _MM_PERM_CCAA);
    const __m512i even = _mm512_unpacklo_epi64(a, b), odd = _mm512_unpackhi_epi64(a, b);  // counters 0 2 4 6 and 1 3 5 7
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(words + 4 * half, _mm512_permutex2var_epi64(even, low, odd));
    _mm512_storeu_si512(words + 4 * half + 16, _mm512_permutex2var_epi64(even, high, odd));
  }
}

#pragma GCC diagnostic pop

const auto philox_here = __builtin_cpu_supports("avx512f") ? philox_avx512 : philox_anywhere;
#else
const auto philox_here = philox_anywhere;
#endif

float gumbel(uint32_t word) {
  const double uniform = (word + 0.5) * 0x1p-32;
  return static_cast<float>(-std::log(-std::log(uniform)));
}

// NaN where there is one.
TTS_CLONES float highest(const float* x, int count) {
  Floats tops = Floats{} - std::numeric_limits<float>::infinity();
  Ints unordered = {};
  const auto look = [&](Floats here) {
    tops = here > tops ? here : tops;
    unordered |= here != here;
  };
  int i = 0;
  for (Floats here; i + 16 <= count; i += 16) {
    __builtin_memcpy(&here, x + i, sizeof here);
    look(here);
  }
  Floats tail = Floats{} - std::numeric_limits<float>::infinity();
  __builtin_memcpy(&tail, x + i, (count - i) * sizeof(float));
  look(tail);
  float top = tops[0];
  int32_t any = unordered[0];
  for (int lane = 1; lane < 16; ++lane) {
    top = std::max(top, tops[lane]);
    any |= unordered[lane];
  }
  return any ? std::numeric_limits<float>::quiet_NaN() : top;
}

// Which of the first `count` of kTokens tokens from `x` on could reach `best` with their random words; how many. Noise is at
// most -log(1 - u), and that at most log 2 for each time that 1 - u was halved; the exponent of a float counts those.
TTS_CLONES int contenders(const float* x, float temperature, const uint32_t words[kTokens], float best, int count, uint8_t* chosen) {
  int32_t could[kTokens];
  Ints any = {};
  for (int i = 0; i < kTokens; i += 16) {
    Floats logits;
    Words word;
    __builtin_memcpy(&logits, x + i, sizeof logits);
    __builtin_memcpy(&word, words + i, sizeof word);
    const Floats rest = __builtin_convertvector((Ints)((~word >> 8) | 1u), Floats);  // of 2^24
    const Ints halvings = 24 + 127 - ((Ints)rest >> 23);
    const Ints all = halvings + ((halvings == 24) & 9);  // 9: what the shift dropped
    const Ints here = ~(logits / temperature + __builtin_convertvector(all, Floats) * 0.6932f < best);
    __builtin_memcpy(could + i, &here, sizeof here);
    any |= here;
  }
  int64_t some[8];
  __builtin_memcpy(some, &any, sizeof some);
  if (!(some[0] | some[1] | some[2] | some[3] | some[4] | some[5] | some[6] | some[7])) return 0;
  int found = 0;
  for (int i = 0; i < count; ++i)
    if (could[i]) chosen[found++] = static_cast<uint8_t>(i);
  return found;
}

int64_t draw(const SamplingCall& call, const float* logits, const Stream& stream) {
  const int vocab = call.vocab_size;
  const float most = highest(logits, vocab);
  if (!std::isfinite(most)) return -1;
  const int top = static_cast<int>(std::find(logits, logits + vocab, most) - logits);
  uint32_t words[kTokens];
  const auto total = [&](int token, int first) { return logits[token] / call.temperature + gumbel(words[token - first]); };
  const int home = top / kTokens * kTokens;
  philox_here(stream, static_cast<uint32_t>(home / 4), words);
  int64_t winner = top;
  float best = total(top, home);
  uint8_t chosen[kTokens];
  float tail[kTokens] = {};
  const auto contend = [&](int first) {  // with the words at hand
    const int count = std::min(kTokens, vocab - first);
    const float* x = logits + first;
    if (count < kTokens) x = std::copy_n(x, count, tail) - count;
    const int found = contenders(x, call.temperature, words, best, count, chosen);
    for (int i = 0; i < found; ++i) {
      const int token = first + chosen[i];
      if (token == top) continue;  // is counted
      const float score = total(token, first);
      if (score > best || (score == best && token < winner)) {
        best = score;
        winner = token;
      }
    }
  };
  contend(home);
  for (int first = 0; first < vocab; first += kTokens) {
    if (first == home || highest(logits + first, std::min(kTokens, vocab - first)) / call.temperature + kMostNoise < best) continue;
    philox_here(stream, static_cast<uint32_t>(first / 4), words);
    contend(first);
  }
  return winner;
}

}  // namespace

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  auto [c0, c1, c2, c3] = counter;
  for (int round = 0; round < 10; ++round, key[0] += kWeyl[0], key[1] += kWeyl[1]) {
    const uint64_t p0 = uint64_t{kMultipliers[0]} * c0, p1 = uint64_t{kMultipliers[1]} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key[0];
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key[1];
    c3 = static_cast<uint32_t>(p0);
  }
  return {c0, c1, c2, c3};
}

void sample(const SamplingCall& call, const int64_t* rows, const uint32_t* keys, const uint64_t* identities,
            const int64_t* positions, size_t count, int64_t* tokens, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static)
  for (size_t i = 0; i < count; ++i) {
    const Stream stream{{keys[2 * i], keys[2 * i + 1]},
                        static_cast<uint32_t>(positions[i]),
                        {static_cast<uint32_t>(identities[i]), static_cast<uint32_t>(identities[i] >> 32)}};
    tokens[i] = draw(call, call.logits + rows[i] * call.vocab_size, stream);
  }
}

}  // namespace tts
