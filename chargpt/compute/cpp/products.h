// Matrix products C[i, j] = sum over k of A[i, k] B[k, j], in tiles that fit the registers.
//
// Values are float, or bfloat16 where the processor multiplies pairs of bfloat16. Sums, softmax,
// statistics and weights are always float. A *word* is the 32 bits that a multiply-add takes from
// each operand: one float, or two bfloat16 that are neighbours along the summed axis. It holds G
// values.
//
// A is read in single words, with any two strides. B is packed: word (k, j) holds the G values
// B[kG, j] … B[kG + G - 1, j], and PANEL columns are stored together, so a tile reads contiguous
// memory. Each sum is one chain of multiply-adds through k in order. So its bits depend neither on
// the tiles nor on the other rows, and a sum can stop in memory and continue.

#pragma once

#include <memory>
#include <new>
#include <vector>

#include "pool.h"
#include "vectors.h"

namespace chargpt {

#if defined(__AVX512F__)
constexpr int ROWS = 8, COLUMNS = 2;  // of a tile, in rows and vectors: 16 sums hide the latency
#elif defined(__AVX2__)
constexpr int ROWS = 6, COLUMNS = 2;  // 16 registers: 12 sums, 2 of B, 1 of A
#else
constexpr int ROWS = 6, COLUMNS = 4;  // NEON, 32 registers: 24 sums, 4 of B, 1 of A
#endif
constexpr int PANEL = COLUMNS * L;
constexpr int BLOCK = 48;    // rows per chunk of work: whole tiles for each ROWS
constexpr int DEPTH = 256;   // words of a sum at a time: a panel of B stays in the first cache

// --- memory

// Run `work` and return 0, or 1 if memory ran out: no exception may reach Python.
template <class Work>
int out_of_memory(Work work) {
  try {
    work();
    return 0;
  } catch (...) {
    return 1;
  }
}

// An array that starts at a cache line, so that no vector crosses two; its values are undefined.
template <class Value>
class Array {
 public:
  Array() = default;
  explicit Array(Index n) : size_(n), p_((Value*)::operator new(std::max<Index>(n, 1) * sizeof(Value), LINE)) {}
  Value* data() const { return p_.get(); }
  Index size() const { return size_; }
  Value& operator[](Index i) const { return p_.get()[i]; }

 private:
  static constexpr std::align_val_t LINE{64};
  struct Free {
    void operator()(Value* p) const { ::operator delete(p, LINE); }
  };
  Index size_ = 0;
  std::unique_ptr<Value, Free> p_;
};

// --- the two value types

struct Float {
  typedef float Value;
  static constexpr int G = 1;
  static INLINE vec read(const float* p) { return load<vec>(p); }
  static INLINE void write(float* p, vec v) { store(p, v); }
  static INLINE vec inverse(vec x) { return reciprocal<3>(x); }
  // Return the word of G neighbouring floats.
  static INLINE uint32_t word(const float* p) {
    uint32_t bits;
    std::memcpy(&bits, p, 4);
    return bits;
  }
  // Return the words of G rows, given as vectors or as rows `stride` apart in memory.
  static INLINE words pack(const vec* rows) { return (words)rows[0]; }
  static INLINE words pack(const float* p, Index) { return load<words>(p); }
  // Return row g of a vector of words.
  static INLINE vec unpack(words w, int) { return (vec)w; }
};

// Defined where the processor multiplies pairs of bfloat16.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define CHARGPT_BF16
#endif

#ifdef CHARGPT_BF16
struct Bfloat16 {
  typedef uint16_t Value;
  static constexpr int G = 2;
  static INLINE vec read(const uint16_t* p) {
    return (vec)(__builtin_convertvector(load<halves>(p), words) << 16);
  }
  static INLINE void write(uint16_t* p, vec v) { store(p, rounded(v)); }
  static INLINE vec inverse(vec x) { return reciprocal<2>(x); }  // bfloat16 has 8 bits
  static INLINE vec unpack(words w, int g) { return (vec)(g ? w & 0xFFFF0000u : w << 16); }
#ifdef __AVX512BF16__
  static INLINE halves rounded(vec v) { return (halves)_mm512_cvtneps_pbh((__m512)v); }
  static INLINE uint32_t word(const float* p) {
    const __m128 pair = _mm_castpd_ps(_mm_load_sd((const double*)p));
    return (uint32_t)_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(pair));
  }
  static INLINE words pack(const vec* rows) {
    return interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]));
  }
  static INLINE words pack(const uint16_t* p, Index stride) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)p);
    const __m256i second = _mm256_loadu_si256((const __m256i*)(p + stride));
    return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
  }
  static INLINE words interleave(__m512i both) {
    const __m512i order = _mm512_set_epi32(
        0x1F000F, 0x1E000E, 0x1D000D, 0x1C000C, 0x1B000B, 0x1A000A, 0x190009, 0x180008, 0x170007,
        0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    return (words)((__m512i)_mm512_permutexvar_epi16(order, both));
  }
#else
  static INLINE halves rounded(vec v) { return (halves)vcvt_bf16_f32((float32x4_t)v); }
  static INLINE uint32_t word(const float* p) {
    const float32x2_t pair = vld1_f32(p);
    return vget_lane_u32(vreinterpret_u32_bf16(vcvt_bf16_f32(vcombine_f32(pair, pair))), 0);
  }
  static INLINE words pack(const vec* rows) { return interleave(rounded(rows[0]), rounded(rows[1])); }
  static INLINE words pack(const uint16_t* p, Index stride) {
    return interleave(load<halves>(p), load<halves>(p + stride));
  }
  static INLINE words interleave(halves first, halves second) {
    const uint16x4_t low = vzip1_u16((uint16x4_t)first, (uint16x4_t)second);
    return (words)vcombine_u16(low, vzip2_u16((uint16x4_t)first, (uint16x4_t)second));
  }
#endif
};
#endif

// --- products

// The left factor: word (i, k) is at[i * row + k * step].
struct Left {
  const uint32_t* at;
  Index row, step;

  Left from(Index i, Index k = 0) const { return {at + i * row + k * step, row, step}; }
};
template <class T>
Left rows_of(const typename T::Value* x, Index stride) {
  return {(const uint32_t*)x, stride / T::G, 1};
}

// A matrix of `rows` by `columns`, packed as the right factor of a product; columns are padded.
struct Packed {
  Index depth = 0;
  Array<uint32_t> array;

  Packed() = default;
  Packed(Index depth, Index columns) : depth(depth), array(depth * round_up(columns, PANEL)) {}
  template <class T>
  static Packed of(T, Index rows, Index columns) {
    return Packed((rows + T::G - 1) / T::G, columns);
  }
  // The word of a group of G rows and a column.
  uint32_t* at(Index group, Index column) const {
    return array.data() + column / PANEL * PANEL * depth + group * PANEL + column % PANEL;
  }
  // The transpose as a left factor, from a panel's first column on: its rows are these columns.
  Left panel(Index column) const { return {at(0, column), 1, PANEL}; }
};

// out[i, j] = sum over k words, or with `add` that sum continued from out[i, j], for rows [0, m) and
// columns [0, n). n is a multiple of LANES. `b` points to a panel of B with `depth` words a column.
template <class T>
void multiply(Index m, Index n, Index k, Left a, const uint32_t* b, Index depth, float* out,
              Index stride, bool add = false);

// Call f(g) for the rows i + g < m of a group of G rows: the last group may be odd.
template <class T, class F>
INLINE void for_group(Index i, Index m, F f) {
  f(0);
  if (T::G == 2 && i + 1 < m) f(T::G - 1);
}

// Pack x (rows × columns, its rows `stride` apart); zeros complete an odd last row.
template <class T>
void pack(const typename T::Value* x, Index stride, Index rows, Index columns, const Packed& out,
          Index first_group = 0) {
  for (Index i = 0; i < rows; i += T::G)
    for (Index j = 0; j < columns; j += L) {
      words packed;
      if (i + T::G <= rows) {
        packed = T::pack(x + i * stride + j, stride);
      } else {
        const vec group[2] = {T::read(x + i * stride + j), vec{}};
        packed = T::pack(group);
      }
      store(out.at(first_group + i / T::G, j), packed);
    }
}

// Pack the transpose of x (columns × rows, its rows `stride` apart); zeros complete the last panel.
template <class T>
void pack_transposed(const typename T::Value* x, Index stride, Index rows, Index columns,
                     const Packed& out) {
  for (Index first = 0; first < round_up(columns, PANEL); first += L) {
    const Index here = std::min<Index>(L, columns - first), depth = rows / T::G;
    for (Index w = 0; w < depth; w += L) {  // rows are multiples of LANES: half of L may be left
      const Index count = std::min<Index>(L, depth - w);
      words square[L] = {};
      const typename T::Value* corner = x + first * stride + w * T::G;
      if (here == L && count == L) {
        UNROLL for (int i = 0; i < L; i++) square[i] = load<words>(corner + i * stride);
      } else {
        for (Index i = 0; i < here; i++) std::memcpy(&square[i], corner + i * stride, count * 4);
      }
      transpose(square);
      uint32_t* to = out.at(w, first);
      for (Index i = 0; i < count; i++) store(to + i * PANEL, square[i]);
    }
  }
}

// Pack W (outputs × inputs) for products over inputs (forward pass) or over outputs (backward pass).
template <class T>
Packed pack_weight(const float* w, Index outputs, Index inputs, bool over_inputs);

}  // namespace chargpt
