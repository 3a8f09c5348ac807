// Arithmetic on the compiler's vectors, inlined into whatever instruction set its caller is compiled for.
#pragma once

#include <cstdint>

namespace tts {

// 2^x for x < 127, to 2e-7 relative; 0 for x below -125 and for NaN. Floats, Ints: vectors of as many float and int32_t.
template <class Floats, class Ints>
__attribute__((always_inline)) inline Floats exp2_of_small(Floats x) {
  const Floats shift = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which then are the lowest bits
  const Floats shifted = x + shift, f = x - (shifted - shift);
  Floats y = Floats{} + 1.3276472e-3f;  // fitted in |f| <= 1/2 for the least relative error, exact at 0
  y = y * f + 9.6755414e-3f;
  y = y * f + 5.5507133e-2f;
  y = y * f + 2.4022120e-1f;
  y = y * f + 6.9314697e-1f;
  y = y * f + 1.0f;
  return (Floats)(x > -125.0f ? (Ints)y + ((Ints)shifted << 23) : Ints{});
}

// To the nearest bfloat16, ties to even, as the upper half of a word; NaN stays one.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace tts
