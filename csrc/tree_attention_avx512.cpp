// x86 with AVX-512. What the standard library brings is compiled before the target changes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "tree_attention_isa.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define TTS_ISA avx512
#define TTS_LANES 16
#define TTS_BLOCK_ROWS 6
#define TTS_BLOCK_VECTORS 4
#define TTS_PAIRS 0
#include "tree_attention_kernel.h"
#endif
