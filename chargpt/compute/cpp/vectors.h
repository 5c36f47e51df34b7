// Vectors of floats, and sums whose bits do not depend on their width.
//
// The code uses the vector extension of GCC and Clang, so one source serves AVX-512, AVX2, NEON and
// plain processors. Three rules make the results in float the same bits everywhere:
//
//   1. A multiply-add is `fma`, which rounds once. The compiler forms no others (-ffp-contract=off).
//   2. A sum across a row has LANES = 16 lanes, whatever a register holds: element j goes to lane
//      j % 16, and `sum` adds the lanes in one fixed order.
//   3. exp, 1 / x and GELU are polynomials and Newton steps from here, not library functions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace chargpt {

typedef int64_t Index;

#if defined(__AVX512F__)
constexpr int L = 16;  // floats in a register
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
constexpr int LANES = 16;         // of a sum; row widths are multiples of it
constexpr int PARTS = LANES / L;  // registers for the lanes of a sum

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ints __attribute__((vector_size(4 * L)));
typedef uint32_t words __attribute__((vector_size(4 * L)));
typedef uint16_t halves __attribute__((vector_size(2 * L)));

template <class V>
INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
INLINE vec broadcast(float x) { return x - vec{}; }  // x + 0 would turn -0 into 0
INLINE vec max_of(vec a, vec b) { return a > b ? a : b; }
INLINE vec min_of(vec a, vec b) { return a < b ? a : b; }
INLINE ints lanes() {
  ints v;
  for (int i = 0; i < L; i++) v[i] = i;
  return v;
}
// Ask for m rows of n values: the processor does not predict strides this large.
template <class Value>
INLINE void prefetch(const Value* x, Index stride, Index m, Index n) {
  constexpr Index LINE = 64 / sizeof(Value);
  for (Index i = 0; i < m; i++)
    for (Index j = 0; j < n; j += LINE) __builtin_prefetch(x + i * stride + j);
}
constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

// Return a b + c, rounded once.
#if defined(__AVX512F__)
INLINE vec fma(vec a, vec b, vec c) {
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__AVX2__)
INLINE vec fma(vec a, vec b, vec c) {
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#elif defined(__ARM_NEON)
INLINE vec fma(vec a, vec b, vec c) {
  return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#elif defined(__FP_FAST_FMAF)
INLINE vec fma(vec a, vec b, vec c) {
  vec v;
  for (int i = 0; i < L; i++) v[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return v;
}
#else
// Without the instruction: the product is exact in double. The sum is rounded to odd, so that the
// second rounding, to float, gives the right bits (Boldo & Melquiond 2008).
INLINE vec fma(vec a, vec b, vec c) {
  typedef double doubles __attribute__((vector_size(8 * L)));
  typedef int64_t longs __attribute__((vector_size(8 * L)));
  const doubles product = __builtin_convertvector(a, doubles) * __builtin_convertvector(b, doubles);
  const doubles addend = __builtin_convertvector(c, doubles), total = product + addend;
  const doubles part = total - product, error = (product - (total - part)) + (addend - part);
  const longs inexact = (error < 0) | (error > 0);  // false for NaN
  const longs bits = (longs)total, even_and_inexact = inexact & ((bits & 1) == 0);
  const longs away = ((error > 0) ^ (total < 0)) & 2;  // 2 or 0: the odd neighbour is above or below
  return __builtin_convertvector((doubles)(bits + (even_and_inexact & (away - 1))), vec);
}
#endif
INLINE vec fma(vec a, float b, vec c) { return fma(a, broadcast(b), c); }

// --- sums

// The lanes of a sum: part[p] holds lanes pL … pL + L - 1.
struct Lanes {
  vec part[PARTS] = {};
};

// Call f(j, p) for each register of n values: j is its first value, p its part of the lanes.
template <class F>
INLINE void for_vectors(Index n, F f) {
  for (Index j = 0; j < n; j += LANES)
    UNROLL for (int p = 0; p < PARTS; p++) f(j + p * L, p);
}

// Return the sum of 16 lanes: halves are added until one value is left.
INLINE float sum(const Lanes& x) {
  typedef float quarter __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  const __m512 all = (__m512)x.part[0];
  const __m256 half = _mm256_add_ps(
      _mm512_castps512_ps256(all),
      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
  const quarter four = (quarter)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 half = (__m256)(x.part[0] + x.part[1]);
  const quarter four = (quarter)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
  const quarter four = (x.part[0] + x.part[2]) + (x.part[1] + x.part[3]);
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}
INLINE float maximum(const Lanes& x) {
  float all[LANES];
  for (int p = 0; p < PARTS; p++) store(all + p * L, x.part[p]);
  UNROLL for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) all[i] = all[i] > all[i + half] ? all[i] : all[i + half];
  return all[0];
}

// --- transposing

#if defined(__AVX512F__)
// Transpose L × L values of 32 bits: pairs, then pairs of pairs, then quarters of the registers.
INLINE void transpose(words (&rows)[L]) {
  __m512i a[16], b[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    const __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xDD);
    const __m512i low2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xDD);
    rows[i] = (words)_mm512_shuffle_i32x4(low, low2, 0x88);
    rows[i + 4] = (words)_mm512_shuffle_i32x4(high, high2, 0x88);
    rows[i + 8] = (words)_mm512_shuffle_i32x4(low, low2, 0xDD);
    rows[i + 12] = (words)_mm512_shuffle_i32x4(high, high2, 0xDD);
  }
}
#elif defined(__AVX2__)
INLINE void transpose(words (&rows)[L]) {
  __m256i a[8], b[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    rows[i] = (words)_mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    rows[i + 4] = (words)_mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}
#else
INLINE void transpose(words (&rows)[L]) {
  words columns[L];
  for (int i = 0; i < L; i++)
    for (int j = 0; j < L; j++) columns[j][i] = rows[i][j];
  for (int i = 0; i < L; i++) rows[i] = columns[i];
}
#endif

// --- functions

// e^x as 2^(x log2 e): the integer part becomes the exponent, a minimax polynomial computes the rest.
// The relative error is 1.6e-7. The result saturates beyond |x| = 87.
INLINE vec exponential(vec x) {
  x = max_of(broadcast(-87.f), min_of(broadcast(87.f), x));  // this order keeps NaN
  const vec magic = broadcast(12582912.f);  // 1.5 × 2^23: adding it rounds to an integer
  const vec log2e = broadcast(1.44269504f);
  const vec shifted = fma(x, log2e, magic), whole = shifted - magic, rest = fma(x, log2e, -whole);
  vec y = broadcast(1.32647285e-3f);
  y = fma(y, rest, broadcast(9.67151299e-3f));
  y = fma(y, rest, broadcast(5.55073358e-2f));
  y = fma(y, rest, broadcast(2.40222424e-1f));
  y = fma(y, rest, broadcast(6.93147004e-1f));
  y = fma(y, rest, broadcast(1.f));
  return (vec)((ints)y + (((ints)shifted) << 23));
}

// 1 / x for normal x > 0: a guess from the exponent with an error below 13 %, which each of STEPS
// Newton steps squares. It takes a quarter of the time of a division.
template <int STEPS>
INLINE vec reciprocal(vec x) {
  vec y = (vec)(0x7EF127EA - (ints)x);
  UNROLL for (int i = 0; i < STEPS; i++) y = fma(fma(-x, y, broadcast(1.f)), y, y);
  return y;
}

}  // namespace chargpt
