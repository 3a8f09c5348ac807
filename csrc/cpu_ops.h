// What stands between the matrix products of a decoder, one row at a time: a row's bits depend on that row alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tts {

enum class Element { kFloat32, kBFloat16 };

// out [rows, width] = x / rms(x) rounded to the element, times weights [weight_rows, width], row i's being i % weight_rows. Rows
// of x come in groups of `group`, groups x_stride elements apart.
void rms_norm(const void* x, int64_t x_stride, int64_t group, const void* weights, int64_t weight_rows, float epsilon, void* out,
              int64_t rows, int64_t width, Element element, int num_threads);

// Rotary positions: out [tokens, heads, width] from x, tokens x_stride elements apart; cos, sin [tokens, width / 2].
void rotate(const void* x, int64_t x_stride, const float* cos, const float* sin, void* out, int64_t tokens, int64_t heads,
            int64_t width, Element element, int num_threads);

// Rows of bytes: x [rows, width] is (out - 128) * scales [rows], as near as 255 steps of a row's own size allow. The scale of a row
// with anything that is not finite is NaN.
void quantise_rows(const void* x, uint8_t* out, float* scales, int64_t rows, int64_t width, Element element, int num_threads);

// out [rows, width] = x * scales [rows] + more, rounded once; row i of `more`, which may be null, begins at i * more_stride.
void scale_rows(const float* x, const float* scales, const void* more, int64_t more_stride, Element more_element, void* out,
                int64_t rows, int64_t width, Element element, int num_threads);

// SwiGLU: out [rows, width] = silu(gate) * up, gate_up [rows, 2 width] holding gate then up.
void swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, Element element, int num_threads);

}  // namespace tts
