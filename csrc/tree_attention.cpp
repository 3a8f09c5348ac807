#include "tree_attention.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "tree_attention_isa.h"

namespace tts {

const std::vector<std::string>& instruction_sets() {
  static const std::vector<std::string> found = [] {
    std::vector<std::string> names;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) names.push_back("avx512");
    // AMD multiplies a pair in the time of one float, Intel in that of two.
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
      names.insert(__builtin_cpu_is("amd") ? names.begin() : names.end(), "avx512_bf16");
    if (avx2) names.push_back("avx2");
#endif
    names.push_back("scalar");
    return names;
  }();
  return found;
}

void tree_attention(const TreePlan& plan, const AttentionCall& call, const std::string& instruction_set, int num_threads) {
  const auto& able = instruction_sets();
  if (std::find(able.begin(), able.end(), instruction_set) == able.end())
    throw std::invalid_argument("this machine has no instruction set '" + instruction_set + "'");
#if defined(__x86_64__)
  if (instruction_set == "avx512_bf16") return avx512_bf16::tree_attention(plan, call, num_threads);
  if (instruction_set == "avx512") return avx512::tree_attention(plan, call, num_threads);
  if (instruction_set == "avx2") return avx2::tree_attention(plan, call, num_threads);
#endif
  scalar::tree_attention(plan, call, num_threads);
}

void store_rows(const void* rows, int64_t stride, void* table, int64_t bytes, const int64_t* slots, size_t num_rows) {
  for (size_t i = 0; i < num_rows; ++i)
    std::memcpy(static_cast<char*>(table) + slots[i] * bytes, static_cast<const char*>(rows) + static_cast<int64_t>(i) * stride, bytes);
}

}  // namespace tts
