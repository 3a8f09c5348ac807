#include "cpu_ops.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector_math.h"

// One function for several instruction sets, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define TTS_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define TTS_CLONES
#endif

namespace tts {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

constexpr int64_t kWorthThreads = 1 << 16;  // elements from which a second thread pays
constexpr float kLeastPeak = 1e-30f;         // below it a row counts as zeros: 127 divided by its peak must be finite

// Rows as floats, whatever they are stored as.
class Rows {
 public:
  Rows(const void* data, Element element) : data_(data), element_(element) {}

  const float* at(int64_t first, int64_t count, std::vector<float>& room) const {
    if (element_ == Element::kFloat32) return static_cast<const float*>(data_) + first;
    const uint16_t* from = static_cast<const uint16_t*>(data_) + first;
    room.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = uint32_t{from[i]} << 16;
      __builtin_memcpy(&room[i], &bits, 4);
    }
    return room.data();
  }

 private:
  const void* data_;
  Element element_;
};

TTS_CLONES void narrow(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(x[i]);
}

void put(const float* x, int64_t count, void* out, int64_t first, Element element) {
  if (element == Element::kFloat32)
    std::copy_n(x, count, static_cast<float*>(out) + first);
  else
    narrow(x, count, static_cast<uint16_t*>(out) + first);
}

float rounded(float x, Element element) {
  if (element == Element::kFloat32) return x;
  const uint32_t bits = uint32_t{to_bfloat16(x)} << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

TTS_CLONES float sum_of_squares(const float* x, int64_t count) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    Floats here;
    __builtin_memcpy(&here, x + i, sizeof here);
    sums += here * here;
  }
  float sum = 0;
  for (; i < count; ++i) sum += x[i] * x[i];
  for (int lane = 0; lane < 16; ++lane) sum += sums[lane];
  return sum;
}

TTS_CLONES void scale(const float* x, float factor, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor;
}

TTS_CLONES void multiply(const float* x, const float* y, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * y[i];
}

TTS_CLONES void turn(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cos[i] - x[half + i] * sin[i];
    out[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
  }
}

TTS_CLONES void silu_times(const float* gate, const float* up, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t lanes = std::min<int64_t>(16, count - i);
    Floats g = {}, u = {};
    __builtin_memcpy(&g, gate + i, lanes * sizeof(float));
    __builtin_memcpy(&u, up + i, lanes * sizeof(float));
    const Floats size = g < 0.0f ? g : -g;
    const Floats power = exp2_of_small<Floats, Ints>(size * 1.44269504088896341f);  // e^-|g|
    const Floats result = g * u * (g < 0.0f ? power : Floats{} + 1.0f) / (1.0f + power);
    __builtin_memcpy(out + i, &result, lanes * sizeof(float));
  }
}

// The largest |x|; NaN where any is not finite.
TTS_CLONES float peak_of(const float* x, int64_t count) {
  Floats tops = {}, zeros = {};
  for (int64_t i = 0; i < count; i += 16) {
    Floats here = {};
    __builtin_memcpy(&here, x + i, std::min<int64_t>(16, count - i) * sizeof(float));
    const Floats size = here < 0.0f ? -here : here;
    tops = size > tops ? size : tops;
    zeros += here * 0.0f;
  }
  float top = 0, zero = 0;
  for (int lane = 0; lane < 16; ++lane) top = std::max(top, tops[lane]), zero += zeros[lane];
  return top + zero;
}

TTS_CLONES void to_bytes(const float* x, float factor, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(static_cast<int32_t>(x[i] * factor + 128.5f));
}

TTS_CLONES void scale_and_add(const float* x, float factor, const float* more, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor + more[i];
}

}  // namespace

void rms_norm(const void* x, int64_t x_stride, int64_t group, const void* weights, int64_t weight_rows, float epsilon, void* out,
              int64_t rows, int64_t width, Element element, int num_threads) {
  const Rows from(x, element), by(weights, element);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && rows * width > kWorthThreads)
  {
    std::vector<float> room, weight_room, result(width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const float* here = from.at(row / group * x_stride + row % group * width, width, room);
      const float factor = 1.0f / std::sqrt(sum_of_squares(here, width) / static_cast<float>(width) + epsilon);
      scale(here, factor, width, result.data());
      if (element == Element::kBFloat16)
        for (float& value : result) value = rounded(value, element);
      multiply(result.data(), by.at(row % weight_rows * width, width, weight_room), width, result.data());
      put(result.data(), width, out, row * width, element);
    }
  }
}

void rotate(const void* x, int64_t x_stride, const float* cos, const float* sin, void* out, int64_t tokens, int64_t heads,
            int64_t width, Element element, int num_threads) {
  const Rows from(x, element);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && tokens * heads * width > kWorthThreads)
  {
    std::vector<float> room, result(width);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; ++token)
      for (int64_t head = 0; head < heads; ++head) {
        const float* here = from.at(token * x_stride + head * width, width, room);
        turn(here, cos + token * (width / 2), sin + token * (width / 2), width / 2, result.data());
        put(result.data(), width, out, (token * heads + head) * width, element);
      }
  }
}

void quantise_rows(const void* x, uint8_t* out, float* scales, int64_t rows, int64_t width, Element element, int num_threads) {
  const Rows from(x, element);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && rows * width > kWorthThreads)
  {
    std::vector<float> room;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const float* here = from.at(row * width, width, room);
      const float peak = peak_of(here, width);
      scales[row] = peak / 127.0f;
      if (peak >= kLeastPeak)
        to_bytes(here, 127.0f / peak, width, out + row * width);
      else  // all zeros, or not finite, which the scale tells
        std::fill_n(out + row * width, width, uint8_t{128});
    }
  }
}

void scale_rows(const float* x, const float* scales, const void* more, int64_t more_stride, Element more_element, void* out,
                int64_t rows, int64_t width, Element element, int num_threads) {
  const Rows added(more, more_element);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && rows * width > kWorthThreads)
  {
    std::vector<float> room, result(width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const float* here = x + row * width;
      if (more)
        scale_and_add(here, scales[row], added.at(row * more_stride, width, room), width, result.data());
      else
        scale(here, scales[row], width, result.data());
      put(result.data(), width, out, row * width, element);
    }
  }
}

void swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, Element element, int num_threads) {
  const Rows from(gate_up, element);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && rows * width > kWorthThreads)
  {
    std::vector<float> room, result(width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const float* both = from.at(2 * row * width, 2 * width, room);
      silu_times(both, both + width, width, result.data());
      put(result.data(), width, out, row * width, element);
    }
  }
}

}  // namespace tts
