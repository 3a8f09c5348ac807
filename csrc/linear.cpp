#include "linear.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "vector_math.h"

#if defined(__x86_64__) && defined(__gnu_linux__)
#include <cpuid.h>
#include <immintrin.h>
#define TTS_AVX512 __attribute__((target("avx512f,avx512bw")))
#endif

namespace tts {
namespace {

constexpr int64_t kLanes = 16, kPanel = 2 * kLanes;  // rows of the matrix that are multiplied side by side
constexpr int kTile = 14;                            // rows of x: 28 sums, two vectors of weights and one of x fill the registers
constexpr int64_t kAhead = 32;                       // columns of weights that are asked for before they are needed
constexpr int64_t kBlock = 1 << 18;                  // floats of x that stay in a core's second cache while panels pass by

float widened(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

float value(const void* data, Element element, int64_t i) {
  return element == Element::kFloat32 ? static_cast<const float*>(data)[i] : widened(static_cast<const uint16_t*>(data)[i]);
}

}  // namespace

int64_t packed_entries(int64_t rows, int64_t columns) { return (rows + kPanel - 1) / kPanel * kPanel * columns; }

namespace {

template <class W>
void pack_as(const W* weight, W* packed, int64_t rows, int64_t columns, int num_threads) {
  const int64_t panels = (rows + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t column = 0; column < columns; ++column) {
      W* to = packed + (panel * columns + column) * kPanel;
      for (int64_t i = 0; i < kPanel; ++i) {
        // Of bfloat16 a word holds row i in its lower half and row i + kLanes in its upper one: one instruction makes either a float.
        const int64_t row = panel * kPanel + (sizeof(W) == 2 ? i % 2 * kLanes + i / 2 : i);
        to[i] = row < rows ? weight[row * columns + column] : W{};
      }
    }
}

}  // namespace

void pack(const void* weight, void* packed, Element element, int64_t rows, int64_t columns, int num_threads) {
  if (element == Element::kFloat32)
    pack_as(static_cast<const float*>(weight), static_cast<float*>(packed), rows, columns, num_threads);
  else
    pack_as(static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(packed), rows, columns, num_threads);
}

#if defined(TTS_AVX512)

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

TTS_AVX512 inline void widen(const uint16_t* column, Floats& first, Floats& second) {
  Words words;
  std::memcpy(&words, column, sizeof words);
  first = (Floats)(words << 16), second = (Floats)(words & 0xffff0000u);
}

TTS_AVX512 inline void widen(const float* column, Floats& first, Floats& second) {
  std::memcpy(&first, column, sizeof first);
  std::memcpy(&second, column + kLanes, sizeof second);
}

// sums [R, kPanel] = x [columns, R], transposed, times a panel.
template <int R, class W>
TTS_AVX512 void tile(const float* x, const W* panel, int64_t columns, float* sums) {
  Floats low[R] = {}, high[R] = {};
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t i = 0; i < kPanel; i += 64 / sizeof(W)) __builtin_prefetch(panel + (column + kAhead) * kPanel + i);
    Floats first, second;
    widen(panel + column * kPanel, first, second);
    for (int r = 0; r < R; ++r) {
      const Floats left = (Floats)_mm512_set1_ps(x[column * R + r]);  // broadcast by the load, not by a port that multiplies
      low[r] += left * first;
      high[r] += left * second;
    }
  }
  for (int r = 0; r < R; ++r) {
    std::memcpy(sums + r * kPanel, &low[r], sizeof(Floats));
    std::memcpy(sums + r * kPanel + kLanes, &high[r], sizeof(Floats));
  }
}

template <class W, int R = kTile>
void times(int rows, const float* x, const W* panel, int64_t columns, float* sums) {
  if (rows == R) return tile<R>(x, panel, columns, sums);
  if constexpr (R > 1) times<W, R - 1>(rows, x, panel, columns, sums);
}

TTS_AVX512 void finish(const LinearCall& call, int64_t token, int64_t row, int64_t count, float* sums) {
  if (call.more != nullptr)
    for (int64_t i = 0; i < count; ++i) sums[i] += value(call.more, call.x_element, token * call.more_stride + row + i);
  const int64_t at = token * call.rows + row;
  if (call.out_element == Element::kFloat32) {
    std::copy_n(sums, count, static_cast<float*>(call.out) + at);
  } else {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(call.out)[at + i] = to_bfloat16(sums[i]);
  }
}

}  // namespace

bool multiplies_floats() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }

bool multiplies_pairs() {
  // AMD's pairs take the time of one float, Intel's that of two unless they are multiplied in AMX's tiles.
  unsigned a, b, c, d;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  return tiles || (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16"));
}

namespace {

template <class W>
void multiply(const LinearCall& call, const W* packed, int num_threads) {
  const int64_t columns = call.columns, panels = (call.rows + kPanel - 1) / kPanel;
  const int64_t most = std::max<int64_t>(1, kBlock / (columns * kTile)) * kTile;  // rows of x at a time
  const std::unique_ptr<float[]> x(new float[std::min(call.num_tokens, most) * columns]);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  for (int64_t first = 0; first < call.num_tokens; first += most) {
    const int64_t count = std::min(most, call.num_tokens - first);
    const int64_t tiles = (count + kTile - 1) / kTile, even = (count + tiles - 1) / tiles;  // rather 10 and 10 rows than 14 and 6
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t rows = std::min(even, count - i * even);
      float* to = x.get() + i * even * columns;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t column = 0; column < columns; ++column)
          to[column * rows + r] = value(call.x, call.x_element, (first + i * even + r) * columns + column);
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t panel = 0; panel < panels; ++panel) {
      alignas(64) float sums[kTile * kPanel];
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t rows = std::min(even, count - i * even);
        times(static_cast<int>(rows), x.get() + i * even * columns, packed + panel * kPanel * columns, columns, sums);
        for (int64_t r = 0; r < rows; ++r)
          finish(call, first + i * even + r, panel * kPanel, std::min(kPanel, call.rows - panel * kPanel), sums + r * kPanel);
      }
    }
  }
}

}  // namespace

void linear(const LinearCall& call, int num_threads) {
  if (call.packed_element == Element::kFloat32)
    multiply(call, static_cast<const float*>(call.packed), num_threads);
  else
    multiply(call, static_cast<const uint16_t*>(call.packed), num_threads);
}

#else

bool multiplies_floats() { return false; }

bool multiplies_pairs() { return false; }

void linear(const LinearCall&, int) {}

#endif

}  // namespace tts
