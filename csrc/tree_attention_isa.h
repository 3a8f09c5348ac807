// One kernel per instruction set, each compiled in a file of its own.
#pragma once

#include "tree_attention.h"

namespace tts {
namespace scalar { void tree_attention(const TreePlan& plan, const AttentionCall& call, int num_threads); }
namespace avx2 { void tree_attention(const TreePlan& plan, const AttentionCall& call, int num_threads); }
namespace avx512_bf16 { void tree_attention(const TreePlan& plan, const AttentionCall& call, int num_threads); }
namespace avx512 { void tree_attention(const TreePlan& plan, const AttentionCall& call, int num_threads); }
}  // namespace tts
