// Causal attention of prompt rows on a CPU with AVX-512 VNNI, in INT8 or in BF16.
//
// Keys and values are packed once into blocks of 128 keys. A thread takes some rows of one head and goes
// through the blocks that they see: scores of six rows and up to 64 keys at a time, softmax relative to
// the block's largest score, products with the values, and the sums so far rescaled (online softmax,
// arXiv 2205.14135). What lies above the diagonal is not computed.
//
// INT8: queries and keys are rotated by a Hadamard matrix along the head, which leaves scores as they
// are and spreads outliers (arXiv 2404.00456). Each row has a scale of its own. Probabilities are codes
// from 0 to 255 of the largest in their block. Values have a mean and a scale for each block and channel;
// the mean is subtracted before they are coded, and added to the result times the sum of the codes, so
// it is exact. The first 16 keys, often attention sinks far above all others, are a block of their own,
// whose probabilities and values stay FP32. Sums over a block are INT32, over blocks FP32.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

namespace {

constexpr int BLOCK = 128;  // keys whose probabilities share a scale
constexpr int FIRST = 16;   // in the first block, in INT8
constexpr int TILE = 6;     // rows that are multiplied at once: 6 x 4 accumulators, of 32 registers
constexpr int ROWS = 48;    // of one task
constexpr int MAX_SIZE = 256;
constexpr float MASKED = -1e30f;  // a score that nothing is left of; infinity would make NaN
constexpr float LOG2E = 1.44269504f, LOG2_255 = 7.99435344f;

using bf16 = at::BFloat16;

inline __m512 wide(const bf16* x) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline __m256i narrow(__m512 x) {  // rounds to even; no NaN comes here
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline int32_t four(const void* at) {
  int32_t bytes;
  std::memcpy(&bytes, at, 4);
  return bytes;
}

// 2^x to 8e-5 of it, as precise as 8 bits need; to 3e-6 where probabilities are BF16.
template <bool INT8>
inline __m512 exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 y;
  if (INT8) {
    y = _mm512_set1_ps(0.0550886838f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.242604051f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693276242f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.99992894f));
  } else {
    y = _mm512_set1_ps(0.00956051021f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.0559170392f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.240249811f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693121968f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.999999191f));
  }
  return _mm512_scalef_ps(y, n);
}

// A row times a Hadamard matrix, in blocks of the largest power of two that divides its length.
void rotate(float* x, int size) {
  const int width = size & -size;
  for (int stride = 1; stride < 16; stride *= 2) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i partner = _mm512_xor_si512(lane, _mm512_set1_epi32(stride));
    const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(stride));
    for (int i = 0; i < size; i += 16) {
      const __m512 own = _mm512_loadu_ps(x + i);
      const __m512 other = _mm512_permutexvar_ps(partner, own);
      _mm512_storeu_ps(x + i, _mm512_mask_sub_ps(_mm512_add_ps(own, other), upper, other, own));
    }
  }
  for (int stride = 16; stride < width; stride *= 2)
    for (int i = 0; i < size; i += 2 * stride)
      for (int j = i; j < i + stride; j += 16) {
        const __m512 a = _mm512_loadu_ps(x + j), b = _mm512_loadu_ps(x + j + stride);
        _mm512_storeu_ps(x + j, _mm512_add_ps(a, b));
        _mm512_storeu_ps(x + j + stride, _mm512_sub_ps(a, b));
      }
}

// Codes of a rotated row, -127 to 127; returns their scale, and the sum of the codes. The scale of a row
// with NaN or infinity in it is NaN.
float encode(const bf16* x, int size, int8_t* codes, int32_t* sum) {
  alignas(64) float y[MAX_SIZE];
  for (int i = 0; i < size; i += 16) _mm512_store_ps(y + i, wide(x + i));
  rotate(y, size);
  __m512 largest = _mm512_setzero_ps(), zero = largest;  // 0 times a NaN or an infinity is NaN
  for (int i = 0; i < size; i += 16) {
    const __m512 values = _mm512_load_ps(y + i);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
    zero = _mm512_fmadd_ps(values, _mm512_setzero_ps(), zero);
  }
  const float amax = _mm512_reduce_max_ps(largest) + _mm512_reduce_add_ps(zero);
  // Less is zero: times a smaller scale, a masked score would no longer be far below the others.
  const float scale = amax < 1e-20f ? 1.f : amax / 127.f;
  const __m512 inverse = _mm512_set1_ps(1.f / scale);
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < size; i += 16) {
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(y + i), inverse));
    total = _mm512_add_epi32(total, code);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
  }
  *sum = _mm512_reduce_add_epi32(total);
  return scale / std::sqrt(static_cast<float>(size & -size));
}

struct Strides {
  int64_t batch, head, row;
};

Strides strides(const at::Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// How one block of keys and values lies in memory. Keys: groups of 16, each [size / n][16][n], n values
// of 4 bytes together. Values: [128 / n][size][n].
template <bool INT8>
struct Packed {
  using Code = std::conditional_t<INT8, int8_t, bf16>;
  static constexpr int N = 4 / sizeof(Code);
  static constexpr int LEAD = INT8 ? BLOCK - FIRST : 0;  // keys that the first block lacks

  uint8_t* start;
  int size;

  explicit Packed(uint8_t* start, int size) : start(start), size(size) {}
  static int64_t blocks(int64_t keys) { return (keys + LEAD + BLOCK - 1) / BLOCK; }
  static int64_t first_key(int64_t block) { return std::max<int64_t>(block * BLOCK - LEAD, 0); }
  static int most_keys(int64_t block) { return block ? BLOCK : BLOCK - LEAD; }
  static int64_t bytes(int size) {
    return 2 * BLOCK * size * sizeof(Code) + (INT8 ? (BLOCK + 2 * size) * sizeof(float) : 0);
  }
  Code* keys() const { return reinterpret_cast<Code*>(start); }
  Code* values() const { return keys() + BLOCK * size; }
  float* first_values() const { return reinterpret_cast<float*>(values()); }  // [FIRST][size]
  float* key_scales() const { return reinterpret_cast<float*>(values() + BLOCK * size); }
  float* value_scales() const { return key_scales() + BLOCK; }
  float* value_means() const { return value_scales() + size; }
};

// Packs the keys and values of a block; those that it lacks weigh nothing and are zero.
template <bool INT8>
void pack(Packed<INT8> to, bool is_first, const bf16* k, int64_t k_row, const bf16* v, int64_t v_row,
          int count) {
  constexpr int N = Packed<INT8>::N;
  const int size = to.size, columns = size / N;
  float nan = 0.f;  // NaN where a key is: codes cannot be
  alignas(64) int32_t rows[16][MAX_SIZE / 2];
  for (int group = 0; group < BLOCK / 16; ++group) {
    std::memset(rows, 0, sizeof rows);
    for (int i = 0; i < 16; ++i) {
      const int key = group * 16 + i;
      const bool there = key < count;
      if constexpr (INT8) {
        int32_t sum;
        auto* codes = reinterpret_cast<int8_t*>(rows[i]);
        to.key_scales()[key] = there ? encode(k + key * k_row, size, codes, &sum) : 0.f;
        nan += 0.f * to.key_scales()[key];
        for (int j = 0; j < columns; ++j) rows[i][j] ^= 0x80808080;  // plus 128: unsigned
      } else if (there) {
        std::memcpy(rows[i], k + key * k_row, size * sizeof(bf16));
      }
    }
    auto* out = reinterpret_cast<int32_t*>(to.keys()) + group * 16 * columns;
    for (int j = 0; j < columns; ++j)
      for (int i = 0; i < 16; ++i) out[j * 16 + i] = rows[i][j];
  }
  if (INT8 && is_first) {
    std::memset(to.first_values(), 0, FIRST * size * sizeof(float));
    for (int key = 0; key < count; ++key)
      for (int c = 0; c < size; c += 16)
        _mm512_storeu_ps(to.first_values() + key * size + c, wide(v + key * v_row + c));
    return;
  }
  for (int c = 0; c < size; c += 16) {
    __m512 mean = _mm512_setzero_ps(), inverse = mean;
    if constexpr (INT8) {
      for (int key = 0; key < count; ++key) mean = _mm512_add_ps(mean, wide(v + key * v_row + c));
      mean = _mm512_fmadd_ps(mean, _mm512_set1_ps(1.f / std::max(count, 1)), _mm512_set1_ps(nan));
      __m512 largest = _mm512_set1_ps(1e-30f);
      for (int key = 0; key < count; ++key) {
        const __m512 centred = _mm512_sub_ps(wide(v + key * v_row + c), mean);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(centred));
      }
      inverse = _mm512_div_ps(_mm512_set1_ps(127.f), largest);
      _mm512_storeu_ps(to.value_means() + c, mean);
      _mm512_storeu_ps(to.value_scales() + c, _mm512_div_ps(largest, _mm512_set1_ps(127.f)));
    }
    for (int key = 0; key < BLOCK; key += N) {
      __m512i together = _mm512_setzero_si512();
      for (int i = 0; i < N; ++i) {
        if (key + i >= count) continue;
        const bf16* from = v + (key + i) * v_row + c;
        if constexpr (INT8) {
          const __m512 centred = _mm512_sub_ps(wide(from), mean);
          const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(centred, inverse));
          const __m512i byte = _mm512_and_si512(code, _mm512_set1_epi32(255));
          together = _mm512_or_si512(together, _mm512_sll_epi32(byte, _mm_cvtsi32_si128(8 * i)));
        } else {
          const __m512i bits = _mm512_castps_si512(wide(from));
          together = _mm512_or_si512(together, i ? bits : _mm512_srli_epi32(bits, 16));
        }
      }
      auto* out = reinterpret_cast<int32_t*>(to.values()) + key / N * size + c;
      _mm512_storeu_si512(out, together);
    }
  }
}

// f(0), ..., f(N - 1), unrolled before arrays are given registers; the compiler's own unrolling is too
// late for that.
template <int N, typename F>
__attribute__((always_inline)) inline void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Codes in four bytes each: sum + u8 * s8 in INT32, or sum + bf16 * bf16 in FP32. Not the intrinsics:
// with them GCC (12) copies the sums from register to register, and some to memory.
template <bool INT8>
inline __m512i multiply_add(__m512i sum, __m512i a, __m512i b) {
  if constexpr (INT8)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  else
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

template <bool INT8>
inline __m512 real(__m512i sum) {
  return INT8 ? _mm512_cvtepi32_ps(sum) : _mm512_castsi512_ps(sum);
}

template <bool INT8>
struct Tile {
  alignas(64) float scores[TILE][BLOCK];
  alignas(64) typename Packed<INT8>::Code p[TILE][BLOCK];
  float weight[TILE];
};

// Scores of six queries and GROUPS x 16 keys, from key `at` of the block.
template <bool INT8, int GROUPS>
__attribute__((noinline)) void score(const typename Packed<INT8>::Code* q, const int32_t* start,
                                     const Packed<INT8>& kv, int at, Tile<INT8>& tile,
                                     __m512* largest) {
  const int columns = kv.size / Packed<INT8>::N;
  const auto* k = reinterpret_cast<const int32_t*>(kv.keys()) + at * columns;
  __m512i sum[TILE][GROUPS];
  each<TILE>([&](auto r) {
    each<GROUPS>([&](auto g) { sum[r][g] = _mm512_set1_epi32(start[r]); });
  });
  for (int j = 0; j < columns; ++j) {
    __m512i key[GROUPS];
    each<GROUPS>([&](auto g) { key[g] = _mm512_loadu_si512(k + (g * columns + j) * 16); });
    each<TILE>([&](auto r) {
      const __m512i query = _mm512_set1_epi32(four(q + r * kv.size + j * Packed<INT8>::N));
      each<GROUPS>([&](auto g) { sum[r][g] = multiply_add<INT8>(sum[r][g], key[g], query); });
    });
  }
  each<GROUPS>([&](auto g) {
    __m512 scale;
    if constexpr (INT8) scale = _mm512_loadu_ps(kv.key_scales() + at + g * 16);
    each<TILE>([&](auto r) {
      __m512 s = real<INT8>(sum[r][g]);
      if constexpr (INT8) s = _mm512_mul_ps(s, scale);
      _mm512_store_ps(tile.scores[r] + at + g * 16, s);
      largest[r] = _mm512_max_ps(largest[r], s);
    });
  });
}

// Six rows of probabilities times the values of `keys` keys and VECTORS x 16 channels, added to `sums`.
template <bool INT8, int VECTORS>
__attribute__((noinline)) void weigh(const Tile<INT8>& tile, const Packed<INT8>& kv, int keys,
                                     int channel, const float* keep, const float* take,
                                     float* sums) {
  constexpr int N = Packed<INT8>::N;
  const auto* v = reinterpret_cast<const int32_t*>(kv.values()) + channel;
  __m512i sum[TILE][VECTORS];
  each<TILE>([&](auto r) {
    each<VECTORS>([&](auto c) { sum[r][c] = _mm512_setzero_si512(); });
  });
  for (int j = 0; j < keys / N; ++j) {
    __m512i value[VECTORS];
    each<VECTORS>([&](auto c) { value[c] = _mm512_loadu_si512(v + j * kv.size + c * 16); });
    each<TILE>([&](auto r) {
      const __m512i p = _mm512_set1_epi32(four(tile.p[r] + j * N));
      each<VECTORS>([&](auto c) { sum[r][c] = multiply_add<INT8>(sum[r][c], p, value[c]); });
    });
  }
  each<VECTORS>([&](auto c) {
    __m512 scale, mean;
    if constexpr (INT8) {
      scale = _mm512_loadu_ps(kv.value_scales() + channel + c * 16);
      mean = _mm512_loadu_ps(kv.value_means() + channel + c * 16);
    }
    each<TILE>([&](auto r) {
      __m512 here = real<INT8>(sum[r][c]);
      if constexpr (INT8)
        here = _mm512_fmadd_ps(here, scale, _mm512_mul_ps(mean, _mm512_set1_ps(tile.weight[r])));
      float* to = sums + r * kv.size + channel + c * 16;
      const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(keep[r]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(here, _mm512_set1_ps(take[r]), before));
    });
  });
}

// Probabilities of a row relative to the largest of the block, and their sum.
template <bool INT8>
inline float probabilities(const float* scores, int keys, float factor, float largest,
                           typename Packed<INT8>::Code* p) {
  const __m512 slope = _mm512_set1_ps(factor);
  const __m512 offset = _mm512_set1_ps((INT8 ? LOG2_255 : 0.f) - largest * factor);
  if constexpr (INT8) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < keys; i += 16) {
      const __m512 x = _mm512_fmadd_ps(_mm512_load_ps(scores + i), slope, offset);
      const __m512i code = _mm512_cvtps_epi32(exp2<true>(x));
      sum = _mm512_add_epi32(sum, code);
      _mm_store_si128(reinterpret_cast<__m128i*>(p + i), _mm512_cvtusepi32_epi8(code));
    }
    return static_cast<float>(_mm512_reduce_add_epi32(sum));
  } else {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < keys; i += 16) {
      const __m512 x = _mm512_fmadd_ps(_mm512_load_ps(scores + i), slope, offset);
      const __m512 y = exp2<false>(x);
      sum = _mm512_add_ps(sum, y);
#ifdef __AVX512BF16__
      _mm256_store_si256(reinterpret_cast<__m256i*>(p + i), (__m256i)_mm512_cvtneps_pbh(y));
#endif
    }
    return _mm512_reduce_add_ps(sum);
  }
}

// The same of a first block in INT8, in FP32 and in place; the largest is 255, as among codes.
inline float first_probabilities(float* scores, float factor, float largest) {
  const __m512 offset = _mm512_set1_ps(LOG2_255 - largest * factor);
  const __m512 x = _mm512_fmadd_ps(_mm512_load_ps(scores), _mm512_set1_ps(factor), offset);
  const __m512 y = exp2<false>(x);
  _mm512_store_ps(scores, y);
  return _mm512_reduce_add_ps(y);
}

// Six rows of them times the values, which are FP32, too.
template <int VECTORS>
__attribute__((noinline)) void weigh_first(const float* p, const Packed<true>& kv, int channel,
                                           const float* keep, const float* take, float* sums) {
  __m512 sum[TILE][VECTORS];
  each<TILE>([&](auto r) {
    each<VECTORS>([&](auto c) { sum[r][c] = _mm512_setzero_ps(); });
  });
  for (int j = 0; j < FIRST; ++j) {
    __m512 value[VECTORS];
    each<VECTORS>([&](auto c) {
      value[c] = _mm512_loadu_ps(kv.first_values() + j * kv.size + channel + c * 16);
    });
    each<TILE>([&](auto r) {
      const __m512 weight = _mm512_set1_ps(p[r * BLOCK + j]);
      each<VECTORS>([&](auto c) { sum[r][c] = _mm512_fmadd_ps(weight, value[c], sum[r][c]); });
    });
  }
  each<TILE>([&](auto r) {
    each<VECTORS>([&](auto c) {
      float* to = sums + r * kv.size + channel + c * 16;
      const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(keep[r]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(sum[r][c], _mm512_set1_ps(take[r]), before));
    });
  });
}

template <bool INT8>
struct Workspace {
  using Code = typename Packed<INT8>::Code;
  alignas(64) float sums[ROWS * MAX_SIZE];
  alignas(64) Code q[ROWS * MAX_SIZE];
  int32_t start[ROWS];
  float factor[ROWS], top[ROWS], total[ROWS];
  Tile<INT8> tile;
};

// The rows of one task. The first of them sees `end` keys, each further row one more.
template <bool INT8>
void attend_rows(Workspace<INT8>& w, const bf16* q, int64_t q_row, int rows, uint8_t* packed,
                 int size, int64_t end, float scale, bf16* out, int64_t out_row) {
  std::memset(w.q, 0, sizeof(w.q[0]) * ROWS * size);
  std::fill_n(w.sums, ROWS * size, 0.f);
  for (int r = 0; r < ROWS; ++r) {
    w.start[r] = 0;
    w.factor[r] = scale * LOG2E;
    w.top[r] = MASKED;
    w.total[r] = 0.f;
    if (r >= rows) continue;
    if constexpr (INT8) {
      int32_t sum;
      w.factor[r] *= encode(q + r * q_row, size, w.q + r * size, &sum);
      w.start[r] = -128 * sum;
    } else {
      std::memcpy(w.q + r * size, q + r * q_row, size * sizeof(bf16));
    }
  }
  Tile<INT8>& tile = w.tile;
  const int64_t bytes = Packed<INT8>::bytes(size);
  for (int64_t block = 0; Packed<INT8>::first_key(block) < end + rows - 1; ++block) {
    const int64_t first_key = Packed<INT8>::first_key(block), most = Packed<INT8>::most_keys(block);
    const Packed<INT8> kv(packed + block * bytes, size);
    for (int first = 0; first < rows; first += TILE) {
      const int64_t visible = end + std::min(first + TILE, rows) - 1 - first_key;
      if (visible <= 0) continue;
      const int keys = (static_cast<int>(std::min(visible, most)) + 15) / 16 * 16;
      const auto* query = w.q + first * size;
      __m512 largest[TILE];
      for (auto& one : largest) one = _mm512_set1_ps(MASKED);
      const int32_t* start = w.start + first;
      int at = 0;
      for (; at + 64 <= keys; at += 64) score<INT8, 4>(query, start, kv, at, tile, largest);
      if (keys - at == 48) score<INT8, 3>(query, start, kv, at, tile, largest);
      if (keys - at == 32) score<INT8, 2>(query, start, kv, at, tile, largest);
      if (keys - at == 16) score<INT8, 1>(query, start, kv, at, tile, largest);

      float keep[TILE], take[TILE];
      for (int r = 0; r < TILE; ++r) {
        const int64_t sees = end + first + r - first_key;
        if (sees < keys) {
          largest[r] = _mm512_set1_ps(MASKED);
          for (int i = 0; i < keys; i += 16) {
            __m512 s = _mm512_load_ps(tile.scores[r] + i);
            const int lanes = static_cast<int>(std::clamp<int64_t>(sees - i, 0, 16));
            const auto seen = static_cast<__mmask16>((1u << lanes) - 1);
            s = _mm512_mask_mov_ps(_mm512_set1_ps(MASKED), seen, s);
            _mm512_store_ps(tile.scores[r] + i, s);
            largest[r] = _mm512_max_ps(largest[r], s);
          }
        }
        const int row = first + r;
        const float top = _mm512_reduce_max_ps(largest[r]);
        if (sees <= 0) {
          std::memset(tile.p[r], 0, sizeof tile.p[r]);
          keep[r] = 1.f;
          take[r] = tile.weight[r] = 0.f;
          continue;
        }
        const float factor = w.factor[row], highest = std::max(w.top[row], top);
        tile.weight[r] =
            INT8 && block == 0
                ? first_probabilities(tile.scores[r], factor, top)
                : probabilities<INT8>(tile.scores[r], keys, factor, top, tile.p[r]);
        keep[r] = std::exp2((w.top[row] - highest) * factor);
        take[r] = std::exp2((top - highest) * factor);
        w.top[row] = highest;
        w.total[row] = w.total[row] * keep[r] + tile.weight[r] * take[r];
      }
      float* sums = w.sums + first * size;
      int channel = 0;
      if constexpr (INT8) {
        if (block == 0) {
          for (; channel + 64 <= size; channel += 64)
            weigh_first<4>(tile.scores[0], kv, channel, keep, take, sums);
          for (; channel < size; channel += 32)
            weigh_first<2>(tile.scores[0], kv, channel, keep, take, sums);
          continue;
        }
      }
      for (; channel + 64 <= size; channel += 64)
        weigh<INT8, 4>(tile, kv, keys, channel, keep, take, sums);
      for (; channel < size; channel += 32)
        weigh<INT8, 2>(tile, kv, keys, channel, keep, take, sums);
    }
  }
  for (int r = 0; r < rows; ++r) {
    const __m512 norm = _mm512_set1_ps(w.total[r] > 0 ? 1.f / w.total[r] : 0.f);
    for (int c = 0; c < size; c += 16) {
      const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(w.sums + r * size + c), norm);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * out_row + c), narrow(y));
    }
  }
}

template <bool INT8>
void run(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& out,
         at::IntArrayRef first, at::IntArrayRef last, at::IntArrayRef padding, float scale) {
  const int64_t batch = q.size(0), heads = q.size(1), q_rows = q.size(2), kv_heads = k.size(1);
  const int64_t keys = k.size(2), group = heads / kv_heads, context = keys - q_rows;
  const int size = static_cast<int>(q.size(3));
  const Strides qs = strides(q), ks = strides(k), vs = strides(v), os = strides(out);
  const auto *q_data = q.const_data_ptr<bf16>(), *k_data = k.const_data_ptr<bf16>(),
             *v_data = v.const_data_ptr<bf16>();
  auto* out_data = out.mutable_data_ptr<bf16>();

  const int64_t blocks = Packed<INT8>::blocks(keys), bytes = Packed<INT8>::bytes(size);
  at::Tensor packed = at::empty({batch * kv_heads * blocks * bytes + 64}, at::kByte);
  auto* start = packed.mutable_data_ptr<uint8_t>();
  start += (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64;

  at::parallel_for(0, batch * kv_heads * blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t block = i % blocks, head = i / blocks % kv_heads, b = i / blocks / kv_heads;
      // The first key is the first that anybody sees.
      const int64_t at = padding[b] + Packed<INT8>::first_key(block);
      const int64_t count = std::min<int64_t>(context + last[b] - at, Packed<INT8>::most_keys(block));
      if (count <= 0) continue;
      pack<INT8>(Packed<INT8>(start + i * bytes, size), block == 0,
                 k_data + b * ks.batch + head * ks.head + at * ks.row, ks.row,
                 v_data + b * vs.batch + head * vs.head + at * vs.row, vs.row,
                 static_cast<int>(count));
    }
  });

  // Long tasks first. The heads of a group follow each other, since they share their keys.
  const int64_t tasks = (q_rows + ROWS - 1) / ROWS;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t from, int64_t to) {
    auto w = std::make_unique<Workspace<INT8>>();
    for (int64_t i; (i = next++) < tasks * batch * heads;) {
      const int64_t head = i % heads, b = i / heads % batch, task = tasks - 1 - i / heads / batch;
      const int64_t low = std::max(first[b], task * ROWS), high = std::min(last[b], (task + 1) * ROWS);
      if (low >= high) continue;
      const int64_t kv = b * kv_heads + head / group;
      attend_rows<INT8>(*w, q_data + b * qs.batch + head * qs.head + low * qs.row, qs.row,
                        static_cast<int>(high - low), start + kv * blocks * bytes, size,
                        context + low + 1 - padding[b], scale,
                        out_data + b * os.batch + head * os.head + low * os.row, os.row);
    }
  });
}

void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor out,
            at::IntArrayRef first, at::IntArrayRef last, at::IntArrayRef padding, double scale,
            bool int8) {
  for (const at::Tensor* x : {&q, &k, &v, const_cast<const at::Tensor*>(&out)})
    TORCH_CHECK(x->dim() == 4 && x->scalar_type() == at::kBFloat16 && x->stride(3) == 1,
                "expected BF16 tensors of four dimensions, the last one dense");
  const int64_t size = q.size(3), batch = q.size(0);
  TORCH_CHECK(size % 32 == 0 && size > 0 && size <= MAX_SIZE && k.size(3) == size &&
                  k.sizes() == v.sizes() && out.sizes() == q.sizes() && k.size(0) == batch &&
                  q.size(1) % k.size(1) == 0 && k.size(2) >= q.size(2) && scale > 0,
              "queries ", q.sizes(), ", keys ", k.sizes(), ", values ", v.sizes(), ", result ",
              out.sizes(), ", scale ", scale, " do not go together");
  TORCH_CHECK(first.size() == size_t(batch) && last.size() == size_t(batch) &&
                  padding.size() == size_t(batch),
              "expected rows and padding of each of ", batch, " sequences");
  for (int64_t b = 0; b < batch; ++b)
    TORCH_CHECK(0 <= first[b] && last[b] <= q.size(2) && 0 <= padding[b] &&
                    (first[b] >= last[b] || padding[b] <= k.size(2) - q.size(2) + first[b]),
                "rows ", first[b], " to ", last[b], " and padding ", padding[b], " do not fit");
  if (int8) {
    run<true>(q, k, v, out, first, last, padding, static_cast<float>(scale));
    return;
  }
#ifdef __AVX512BF16__
  run<false>(q, k, v, out, first, last, padding, static_cast<float>(scale));
#else
  TORCH_CHECK(false, "this processor has no AVX-512 BF16");
#endif
}

}  // namespace

TORCH_LIBRARY(mixquant_cpu, library) {
  library.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) out, int[] first, int[] last, int[] padding, "
      "float scale, bool int8) -> ()",
      attend);
}
