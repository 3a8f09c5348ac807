// The kernel of tree_attention.h for one instruction set. Included by tree_attention_<isa>.cpp, which says how wide a vector is
// (TTS_LANES floats), how large a block of a product stays in registers (TTS_BLOCK_ROWS x TTS_BLOCK_VECTORS), and whether pairs
// of bfloat16 are multiplied (TTS_PAIRS) or made floats first; everything else is arithmetic on the compiler's vectors.
//
// Both products run through one loop over "units": a 32-bit word that holds one float or a pair of bfloat16. Queries and
// probabilities are rows of units; keys are packed [unit of D][key], values [unit of keys][D].
#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "tree_attention.h"
#include "tree_attention_isa.h"
#include "vector_math.h"

namespace tts {
namespace TTS_ISA {
namespace {

constexpr int kLanes = TTS_LANES, kRows = TTS_BLOCK_ROWS, kVectors = TTS_BLOCK_VECTORS;
constexpr int kChunk = 64;  // keys that are packed, scored and summed at a time
constexpr int kBatch = 8 * kRows;  // rows that are scored before any is summed: one after the other, each would wait for its own
constexpr float kSlack = 8;  // powers of 2 by which a score may pass what a row's shares are relative to
constexpr float kInf = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class T>
inline T load(const void* from) {
  T x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
inline void store(void* to, T x) {
  __builtin_memcpy(to, &x, sizeof x);
}

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline Ints lane_numbers() {
  Ints x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

inline float highest(Floats x) {
  for (int step = kLanes / 2; step; step /= 2) x = maximum(x, __builtin_shuffle(x, lane_numbers() ^ step));
  return x[0];
}

inline float total(Floats x) {
  for (int step = kLanes / 2; step; step /= 2) x = x + __builtin_shuffle(x, lane_numbers() ^ step);
  return x[0];
}

// Is any of x above `limit`?
inline bool any_above(Floats x, float limit) {
#if TTS_LANES == 16
  return _mm512_cmp_ps_mask((__m512)x, (__m512)(Floats{} + limit), _CMP_GT_OQ);
#else
  return highest(x) > limit;
#endif
}

inline Floats exp2(Floats x) { return exp2_of_small<Floats, Ints>(x); }

// How a tensor's elements become units. Type: what they are stored as; Share: what probabilities are; kPerWord: elements in 32
// bits as they are stored, which `spread` makes kPerWord / kPerUnit units, a stride apart.
struct Float32 {
  static constexpr int kPerUnit = 1, kPerWord = 1;
  using Type = float;
  using Share = float;
  static Floats multiply_add(Floats sum, Words a, Words b) { return sum + (Floats)a * (Floats)b; }
  template <class W>
  static void spread(W word, uint32_t* to, int) { store(to, word); }
  // Values of up to one unit of keys, D of each, side by side as units.
  static void pack_values(const Type* const* rows, int, int dim, uint32_t* to) { std::memcpy(to, rows[0], 4 * dim); }
  static void put(Share* to, Floats x) { store(to, x); }
  static void put_scalar(Type* to, float x) { *to = x; }
};

#if TTS_PAIRS
struct BFloat16 {
  static constexpr int kPerUnit = 2, kPerWord = 2;
  using Type = uint16_t;
  using Share = uint16_t;
  static Floats multiply_add(Floats sum, Words a, Words b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)a);
  }
  template <class W>
  static void spread(W word, uint32_t* to, int) { store(to, word); }
  static void pack_values(const Type* const* rows, int num_rows, int dim, uint32_t* to) {
    int d = 0;
    if (num_rows == 2)
      for (; d + kLanes <= dim; d += kLanes) {
        const Words low = __builtin_convertvector(load<Halves>(rows[0] + d), Words);
        const Words high = __builtin_convertvector(load<Halves>(rows[1] + d), Words);
        store(to + d, low | (high << 16));
      }
    for (; d < dim; ++d) to[d] = rows[0][d] | (num_rows == 2 ? static_cast<uint32_t>(rows[1][d]) << 16 : 0u);
  }
  // To the nearest, ties to even. No NaN comes here.
  static void put(Share* to, Floats x) {
    const Words bits = (Words)x;
    store(to, __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves));
  }
  static void put_scalar(Type* to, float x) { *to = to_bfloat16(x); }
};
#else
struct BFloat16 : Float32 {  // once they are packed
  static constexpr int kPerWord = 2;
  using Type = uint16_t;
  template <class W>
  static void spread(W word, uint32_t* to, int stride) {
    store(to, word << 16);
    store(to + stride, word & 0xffff0000u);
  }
  static void pack_values(const Type* const* rows, int, int dim, uint32_t* to) {
    const Type* const from = rows[0];
    for (int d = 0; d < dim; ++d) to[d] = uint32_t{from[d]} << 16;
  }
  static void put_scalar(Type* to, float x) { *to = to_bfloat16(x); }
};
#endif

// c [R, C vectors] (+)= a [R, units] b [units, C vectors], everything in registers; strides in units and floats.
template <class E, int R, int C>
inline void block(const uint32_t* a, int lda, const uint32_t* b, int ldb, int units, float* c, int ldc, bool add) {
  Floats sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) sum[r][j] = add ? load<Floats>(c + r * ldc + j * kLanes) : Floats{};
  for (int u = 0; u < units; ++u) {
    Words right[C];
    for (int j = 0; j < C; ++j) right[j] = load<Words>(b + static_cast<int64_t>(u) * ldb + j * kLanes);
    for (int r = 0; r < R; ++r) {
      const Words left = Words{} + a[r * lda + u];
      for (int j = 0; j < C; ++j) sum[r][j] = E::multiply_add(sum[r][j], left, right[j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) store(c + r * ldc + j * kLanes, sum[r][j]);
}

template <class E, int R>
void rows_times(const uint32_t* a, int lda, const uint32_t* b, int ldb, int units, int vectors, float* c, int ldc, bool add) {
  int j = 0;
  for (; j + kVectors <= vectors; j += kVectors)
    block<E, R, kVectors>(a, lda, b + j * kLanes, ldb, units, c + j * kLanes, ldc, add);
  for (; j < vectors; ++j) block<E, R, 1>(a, lda, b + j * kLanes, ldb, units, c + j * kLanes, ldc, add);
}

// c [rows, vectors] (+)= a [rows, units] b [units, vectors] for at most kRows rows. A row's bits do not depend on the others.
template <class E, int R = kRows>
void times(int rows, const uint32_t* a, int lda, const uint32_t* b, int ldb, int units, int vectors, float* c, int ldc, bool add) {
  if (rows == R) return rows_times<E, R>(a, lda, b, ldb, units, vectors, c, ldc, add);
  if constexpr (R > 1) times<E, R - 1>(rows, a, lda, b, ldb, units, vectors, c, ldc, add);
}

// Begins where a cache line does, so that no vector lies in two.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* at, size_t) { ::operator delete(at, kLine); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <class T>
using Buffer = std::vector<T, Aligned<T>>;

template <class E>
class Worker {
 public:
  using T = typename E::Type;

  Worker(const TreePlan& plan, const AttentionCall& call)
      : plan_(plan), call_(call), group_(call.num_heads / call.num_kv_heads), dim_(call.head_dim),
        units_(call.head_dim / E::kPerUnit), width_((call.head_dim + kLanes - 1) / kLanes * kLanes),
        scale_(1.44269504088896341f / __builtin_sqrtf(static_cast<float>(call.head_dim))),
        keys_(static_cast<size_t>(units_) * kChunk), values_(static_cast<size_t>(kChunk / E::kPerUnit) * width_) {}

  // One item of one KV head; its partial results go to `partials` [places, H, D + 2] where it has a slot.
  void run(const Item& item, int kv_head, float* partials) {
    const int rows = item.num_queries * group_;
    kv_head_ = kv_head;
    load_queries(item);
    sums_.assign(static_cast<size_t>(rows) * width_, 0.0f);
    weights_.assign(static_cast<size_t>(rows) * kLanes, 0.0f);
    peaks_.assign(rows, -kInf);
    for (int i = 0; i < item.count; ++i) attend(item, plan_.segments[plan_.item_segments[item.first + i]]);
    for (int row = 0; row < rows; ++row) {
      const int query = row / group_, head = kv_head * group_ + row % group_;
      const float weight = total(load<Floats>(&weights_[static_cast<size_t>(row) * kLanes]));
      const float* sum = &sums_[static_cast<size_t>(row) * width_];
      if (item.slot < 0) {
        write(item.query + query, head, sum, weight);
      } else {
        float* to = partials + (static_cast<int64_t>(item.slot + query) * call_.num_heads + head) * (dim_ + 2);
        std::memcpy(to, sum, 4 * dim_);
        to[dim_] = peaks_[row];
        to[dim_ + 1] = weight;
      }
    }
  }

  // The partial results of one query and head put together, root first.
  void merge(const Merge& merge, int query, int head, const float* partials) {
    sums_.assign(width_, 0.0f);
    float peak = -kInf, weight = 0;
    const auto part = [&](int i) {
      const int64_t place = plan_.merge_slots[merge.first + i] + query;
      return partials + (place * call_.num_heads + head) * (dim_ + 2);
    };
    for (int i = 0; i < merge.count; ++i) peak = std::max(peak, part(i)[dim_]);
    for (int i = 0; i < merge.count; ++i) {
      const float* from = part(i);
      if (from[dim_] == -kInf) continue;
      const float share = exp2(Floats{} + (from[dim_] - peak))[0];
      weight += share * from[dim_ + 1];
      for (int d = 0; d < dim_; ++d) sums_[d] += share * from[d];
    }
    write(merge.query + query, head, sums_.data(), weight);
  }

 private:
  void load_queries(const Item& item) {
    queries_.resize(static_cast<size_t>(item.num_queries) * group_ * units_);
    const int units = group_ * units_;
    for (int i = 0; i < item.num_queries; ++i) {
      const T* from = static_cast<const T*>(call_.q) + plan_.order[item.query + i] * call_.q_stride +
                      static_cast<int64_t>(kv_head_) * group_ * dim_;
      uint32_t* to = &queries_[static_cast<size_t>(i) * units];
      for (int at = 0, end = group_ * dim_; at < end; at += E::kPerWord)
        E::spread(load<uint32_t>(from + at), to + at / E::kPerUnit, 1);
    }
  }

  // One segment for those of the item's queries that see it.
  void attend(const Item& item, const Segment& segment) {
    const int end = std::min(segment.hi, item.query + item.num_queries);
    for (int at = 0; at < segment.len; at += kChunk) {
      const int count = std::min(kChunk, segment.len - at);
      const int begin = std::max(item.query, segment.lo + std::max(0, at - segment.start));
      if (begin >= end) return;
      pack(segment.offset + at, count);
      const int first_row = (begin - item.query) * group_, last_row = (end - item.query) * group_;
      for (int row = first_row; row < last_row; row += kBatch) {
        const int rows = std::min(kBatch, last_row - row);
        int seen[kBatch];
        for (int r = 0; r < rows; ++r) {
          const int query = item.query + (row + r) / group_;
          seen[r] = std::min(count, segment.start + 1 + query - segment.lo - at);
        }
        absorb(row, rows, count, seen);
      }
      while (next_ < end_) call_for_next();
    }
  }

  // Where the key and the value of the plan's i-th slot begin.
  int64_t place(int i) const { return (static_cast<int64_t>(plan_.slots[i]) * call_.num_kv_heads + kv_head_) * dim_; }

  // Calls a key into the nearest cache and its value, which is read later, into the one behind.
  void call_for_next() {
    const int64_t at = place(next_++);
    for (int d = 0; d < dim_; d += 64 / sizeof(T)) {
      __builtin_prefetch(static_cast<const T*>(call_.k) + at + d);
      __builtin_prefetch(static_cast<const T*>(call_.v) + at + d, 0, 2);
    }
  }

  void pack(int first, int count) {
    const T* key_rows[kChunk];
    const T* value_rows[kChunk];
    for (int i = 0; i < count; ++i) {
      key_rows[i] = static_cast<const T*>(call_.k) + place(first + i);
      value_rows[i] = static_cast<const T*>(call_.v) + place(first + i);
    }
    for (int i = count; i % kLanes; ++i) key_rows[i] = key_rows[0];  // nobody sees these
    for (int i = 0; i < count; i += kLanes) {
      constexpr int kWords = kLanes * E::kPerWord;
      int d = 0;
      for (; d + kWords <= dim_; d += kWords) transpose(key_rows + i, d, &keys_[static_cast<size_t>(d / E::kPerUnit) * kChunk + i]);
      for (; d < dim_; d += E::kPerWord) {
        uint32_t* to = &keys_[static_cast<size_t>(d / E::kPerUnit) * kChunk + i];
        for (int lane = 0; lane < kLanes; ++lane) E::spread(load<uint32_t>(key_rows[i + lane] + d), to + lane, kChunk);
      }
    }
    for (int i = 0; i < count; i += E::kPerUnit) {
      uint32_t* to = &values_[static_cast<size_t>(i / E::kPerUnit) * width_];
      E::pack_values(value_rows + i, std::min(E::kPerUnit, count - i), dim_, to);
    }
    next_ = first + kChunk;
    end_ = std::min<int>(next_ + count, plan_.slots.size());
  }

  // kLanes x kLanes words, from rows of keys to rows of units: halves of ever larger squares change places.
  static void transpose(const T* const* rows, int at, uint32_t* to) {
    Words x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = load<Words>(rows[i] + at);
#pragma GCC unroll 4
    for (int bit = 0; bit < __builtin_ctz(kLanes); ++bit) {
      const int step = 1 << bit;
      const Ints lane = lane_numbers(), upper = (lane & step) != 0;  // -1 where true
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (!(i & step)) {
          const Words a = x[i], b = x[i + step];
          x[i] = __builtin_shuffle(a, b, (Words)(lane + (upper & (kLanes - step))));
          x[i + step] = __builtin_shuffle(a, b, (Words)(lane + step + (upper & (kLanes - step))));
        }
    }
    for (int i = 0; i < kLanes; ++i) E::spread(x[i], to + i * (E::kPerWord / E::kPerUnit) * kChunk, kChunk);
  }

  // The packed chunk of `count` keys for rows [row, row + rows), of which row r sees the first seen[r], at least one.
  void absorb(int row, int rows, int count, const int* seen) {
    const int vectors = (count + kLanes - 1) / kLanes, units = (count + E::kPerUnit - 1) / E::kPerUnit;
    const int blocks = (rows + kRows - 1) / kRows, even = (rows + blocks - 1) / blocks;  // rather 4 and 3 rows than 6 and 1
    for (int r = 0; r < rows; r += even)
      times<E>(std::min(even, rows - r), &queries_[static_cast<size_t>(row + r) * units_], units_, keys_.data(), kChunk, units_,
               vectors, scores_ + r * kChunk, kChunk, false);
    for (int r = 0; r < rows; ++r) {
      if (next_ < end_) call_for_next();  // one at a time: no more than some are ever on their way
      weigh(row + r, seen[r], vectors, scores_ + r * kChunk, shares_ + r * kChunk);
    }
    for (int r = 0; r < rows; r += even)
      times<E>(std::min(even, rows - r), reinterpret_cast<const uint32_t*>(shares_ + r * kChunk), kChunk / E::kPerUnit,
               values_.data(), width_, units, width_ / kLanes, &sums_[static_cast<size_t>(row + r) * width_], width_, true);
  }

  // Scores of one row to shares relative to its peak so far; what was summed before is brought to a new peak only where shares
  // would become large.
  void weigh(int row, int seen, int vectors, const float* scores, typename E::Share* shares) {
    Floats x[kChunk / kLanes], top;
    const bool all = seen >= vectors * kLanes;
    for (int j = 0; j < vectors; ++j) {
      x[j] = load<Floats>(scores + j * kLanes);
      if (!all) x[j] = lane_numbers() + j * kLanes < seen ? x[j] : Floats{} - kInf;
      top = j ? maximum(top, x[j]) : x[j];
    }
    Floats weight = load<Floats>(&weights_[static_cast<size_t>(row) * kLanes]);
    float peak = peaks_[row];
    if (any_above(top * scale_, peak + kSlack)) {
      const float before = peak;
      peaks_[row] = peak = scale_ * highest(top);
      const Floats fade = exp2(Floats{} + (before - peak));
      weight *= fade;
      float* sum = &sums_[static_cast<size_t>(row) * width_];
      for (int d = 0; d < width_; d += kLanes) store(sum + d, load<Floats>(sum + d) * fade);
    }
    for (int j = 0; j < vectors; ++j) {
      const Floats share = exp2(x[j] * scale_ - peak);
      weight += share;
      E::put(shares + j * kLanes, share);
    }
    store(&weights_[static_cast<size_t>(row) * kLanes], weight);
  }

  void write(int query, int head, const float* sum, float weight) {
    T* to = static_cast<T*>(call_.out) + (static_cast<int64_t>(plan_.order[query]) * call_.num_heads + head) * dim_;
    weight = weight == 0 ? 1.0f : weight;  // where no key is seen, the sums are 0 too
    for (int d = 0, dim = dim_; d < dim; ++d) E::put_scalar(to + d, sum[d] / weight);
  }

  const TreePlan& plan_;
  const AttentionCall& call_;
  const int group_, dim_, units_, width_;
  const float scale_;  // brings scores to base 2
  int kv_head_ = 0;         // of the item at hand
  int next_ = 0, end_ = 0;  // slots of the plan whose keys are to be called for: those a chunk further on, mostly the next
  Buffer<uint32_t> keys_, values_, queries_;
  Buffer<float> sums_, weights_, peaks_;  // by row: [D] and [kLanes] not yet divided, relative to 2^peak
  alignas(64) float scores_[kBatch * kChunk];
  alignas(64) typename E::Share shares_[kBatch * kChunk];
};

template <class E>
void run_all(const TreePlan& plan, const AttentionCall& call, int num_threads) {
  std::vector<float> partials(static_cast<size_t>(plan.num_partials) * call.num_heads * (call.head_dim + 2));
  const int num_jobs = static_cast<int>(plan.items.size()) * call.num_kv_heads;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Worker<E> worker(plan, call);
#pragma omp for schedule(dynamic)
    for (int job = 0; job < num_jobs; ++job)
      worker.run(plan.items[job / call.num_kv_heads], job % call.num_kv_heads, partials.data());
    for (const Merge& merge : plan.merges) {
#pragma omp for schedule(static) nowait
      for (int i = 0; i < merge.num_queries * call.num_heads; ++i)
        worker.merge(merge, i / call.num_heads, i % call.num_heads, partials.data());
    }
  }
}

}  // namespace

void tree_attention(const TreePlan& plan, const AttentionCall& call, int num_threads) {
  call.element == Element::kFloat32 ? run_all<Float32>(plan, call, num_threads) : run_all<BFloat16>(plan, call, num_threads);
}

}  // namespace TTS_ISA
}  // namespace tts
