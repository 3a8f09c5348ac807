// For any machine: vectors as wide as the baseline has them.
#define TTS_ISA scalar
#define TTS_LANES 4
#define TTS_BLOCK_ROWS 4
#define TTS_BLOCK_VECTORS 2
#define TTS_PAIRS 0
#include "tree_attention_kernel.h"
