// Arithmetic on the compiler's vectors, inlined into whatever instruction set its caller is compiled for.
#pragma once

#include <cstdint>

namespace tts {

// 2^x for x <= 0, to 2e-7 relative; 2^-126 for all that is smaller. Floats, Ints: vectors of as many float and int32_t.
template <class Floats, class Ints>
__attribute__((always_inline)) inline Floats exp2_of_negative(Floats x) {
  const Floats shift = Floats{} + 12582912.0f, least = Floats{} - 126.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = x > least ? x : least;
  const Floats whole = (x + shift) - shift, f = x - whole;
  Floats y = Floats{} + 1.5403530e-4f;  // ln(2)^k / k!, k = 6 ... 0
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  return (Floats)((Ints)y + (__builtin_convertvector(whole, Ints) << 23));
}

// To the nearest bfloat16, ties to even, as the upper half of a word; NaN stays one.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace tts
