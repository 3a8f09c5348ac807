// x86 with AVX2 and FMA. What the standard library brings is compiled before the target changes, for any machine.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "tree_attention_isa.h"

#pragma GCC target("avx2,fma")
#define TTS_ISA avx2
#define TTS_LANES 8
#define TTS_BLOCK_ROWS 4
#define TTS_BLOCK_VECTORS 2
#define TTS_PAIRS 0
#include "tree_attention_kernel.h"
#endif
