// Building blocks of the kernels: vectors, the two value types, matrix products.
//
// Values are float, or bfloat16 where the processor multiplies pairs of bfloat16 (AVX512-BF16).
// Sums, softmax, statistics and weights are always float. The code is written once, over two types:
//
//   vector   L floats, one register. It uses the vector extension of GCC and Clang, so the same
//            source serves AVX-512, AVX2 and NEON.
//   word     the 32 bits that a multiply-add takes from each operand: one float, or two bfloat16
//            that are neighbours along the summed axis. A word holds G values.
//
// A matrix product C[i, j] = sum over k of A[i, k] B[k, j] reads single words of A, with any two
// strides, and vectors of words of B. B is packed: word (k, j) holds the G values
// B[kG, j] … B[kG + G - 1, j], and PANEL columns are stored together, so a tile reads contiguous
// memory. Each sum runs through k in order, so a row's result has the same bits alone and in a batch.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

#if defined(__AVX512F__)
constexpr int L = 16, ROWS = 8;
#elif defined(__AVX2__)
constexpr int L = 8, ROWS = 4;  // 16 registers: fewer accumulators
#else
constexpr int L = 4, ROWS = 8;
#endif
constexpr int COLUMNS = 2;  // vectors in a row of a tile
constexpr int PANEL = COLUMNS * L;
constexpr float MASKED = -1e30f;  // a masked score; finite, so that arithmetic cannot make it NaN

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ints __attribute__((vector_size(4 * L)));
typedef uint32_t words __attribute__((vector_size(4 * L)));
typedef uint16_t halves __attribute__((vector_size(2 * L)));

template <class V>
V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
vec broadcast(float x) { return vec{} + x; }
vec max_of(vec a, vec b) { return a > b ? a : b; }
vec min_of(vec a, vec b) { return a < b ? a : b; }
ints lanes() {
  ints v;
  for (int i = 0; i < L; i++) v[i] = i;
  return v;
}
float sum(vec v) {
  float total = 0;
  for (int i = 0; i < L; i++) total += v[i];
  return total;
}
float maximum(vec v) {
  float most = v[0];
  for (int i = 1; i < L; i++) most = std::max(most, v[i]);
  return most;
}
#ifdef _OPENMP
int thread() { return omp_get_thread_num(); }
int threads() { return omp_get_max_threads(); }
#else
int thread() { return 0; }
int threads() { return 1; }
#endif
int round_up(int n, int to) { return (n + to - 1) / to * to; }

// --- out of memory

// Run `work` and return 0, or 1 if memory ran out: no exception may reach Python or leave a parallel
// region. Nothing but an allocation throws.
template <class Work>
int out_of_memory(Work work) {
  try {
    work();
    return 0;
  } catch (...) {
    return 1;
  }
}

// The allocations that the threads of a parallel region make for themselves.
struct Allocations {
  std::atomic<bool> failed{false};

  // Allocate, wait for the other threads, and return whether all threads succeeded.
  template <class Work>
  bool succeed(Work allocate) {
    if (out_of_memory(allocate)) failed = true;
#pragma omp barrier
    return !failed;
  }
  // Throw after the region if an allocation failed in it.
  void check() const {
    if (failed) throw std::bad_alloc();
  }
};

// e^x as 2^(x log2 e): the integer part becomes the exponent, a minimax polynomial computes the rest.
// The relative error is 1.6e-7 plus the rounding of x log2 e. The result saturates beyond |x| = 87.
vec exponential(vec x) {
  x = max_of(broadcast(-87.f), min_of(broadcast(87.f), x)) * 1.44269504f;  // this order keeps NaN
  const vec magic = broadcast(12582912.f);  // 1.5 × 2^23: adding it rounds to an integer
  const vec shifted = x + magic, whole = shifted - magic, rest = x - whole;
  vec y = broadcast(1.32647285e-3f);
  y = y * rest + 9.67151299e-3f;
  y = y * rest + 5.55073358e-2f;
  y = y * rest + 2.40222424e-1f;
  y = y * rest + 6.93147004e-1f;
  y = y * rest + 1.f;
  return (vec)((ints)y + (((ints)shifted) << 23));
}

// --- the two value types

struct Float {
  typedef float Value;
  static constexpr int G = 1;
  static vec read(const float* p) { return load<vec>(p); }
  static void write(float* p, vec v) { store(p, v); }
  static vec inverse(vec x) { return 1.f / x; }
  static vec dot(vec sums, uint32_t a, words b) {
    float x;
    std::memcpy(&x, &a, 4);
    return sums + x * (vec)b;
  }
  // Return the word of G neighbouring floats.
  static uint32_t word(const float* p) {
    uint32_t bits;
    std::memcpy(&bits, p, 4);
    return bits;
  }
  // Return the words of G rows, given as vectors or as rows `stride` apart in memory.
  static words pack(const vec* rows) { return (words)rows[0]; }
  static words pack(const float* p, int) { return load<words>(p); }
};

#ifdef __AVX512BF16__
struct Bfloat16 {
  typedef uint16_t Value;
  static constexpr int G = 2;
  static vec read(const uint16_t* p) {
    return (vec)(__builtin_convertvector(load<halves>(p), words) << 16);
  }
  static void write(uint16_t* p, vec v) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &rounded, sizeof rounded);
  }
  // Exact to 14 bits (bfloat16 has 8); a division would take as long as the rest of GELU.
  static vec inverse(vec x) { return (vec)_mm512_rcp14_ps((__m512)x); }
  static vec dot(vec sums, uint32_t a, words b) {
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
  }
  static uint32_t word(const float* p) {
    const __m128 pair = _mm_castpd_ps(_mm_load_sd((const double*)p));
    return (uint32_t)_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(pair));
  }
  static words pack(const vec* rows) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
    return interleave(both);
  }
  static words pack(const uint16_t* p, int stride) {
    alignas(64) uint16_t both[32];
    std::memcpy(both, p, 32), std::memcpy(both + 16, p + stride, 32);
    return interleave(_mm512_load_si512(both));
  }
  static words interleave(__m512i both) {
    static const __m512i order = [] {
      alignas(64) uint16_t from[32];
      for (int i = 0; i < 16; i++) from[2 * i] = i, from[2 * i + 1] = 16 + i;
      return _mm512_load_si512(from);
    }();
    return (words)_mm512_permutexvar_epi16(order, both);
  }
};
#endif

// --- matrix products

// Compute one tile, R rows by V vectors, and pass its sums to `done(sums)`.
template <class T, int R, int V, class Done>
inline __attribute__((always_inline)) void tile(int k, const uint32_t* a, long a_row, long a_k,
                                                const uint32_t* b, Done done) {
  vec sums[R][V] = {};
  for (int i = 0; i < k; i++) {
    words right[V];
    for (int v = 0; v < V; v++) right[v] = load<words>(b + i * PANEL + v * L);
    for (int r = 0; r < R; r++) {
      const uint32_t left = a[r * a_row + i * a_k];
      for (int v = 0; v < V; v++) sums[r][v] = T::dot(sums[r][v], left, right[v]);
    }
  }
  done(sums);
}

// Compute rows [0, m) and columns [0, n) of a product over k words; n is a multiple of L. B has
// `depth` ≥ k words per column. `done(i, j, sums)` receives the sums of the tile that starts at (i, j).
template <class T, class Done>
void multiply(int m, int n, int k, const void* a, long a_row, long a_k, const uint32_t* b,
              long depth, Done done) {
  for (int j = 0; j < n; j += PANEL) {
    const uint32_t *left = (const uint32_t*)a, *right = b + j * depth;
    const bool wide = n - j >= PANEL;
    int i = 0;
    auto rows = [&](auto count) {
      constexpr int R = decltype(count)::value;
      for (; i + R <= m; i += R) {
        auto put = [&](auto& sums) { done(i, j, sums); };
        if (wide)
          tile<T, R, COLUMNS>(k, left + i * a_row, a_row, a_k, right, put);
        else
          tile<T, R, 1>(k, left + i * a_row, a_row, a_k, right, put);
      }
    };
    rows(std::integral_constant<int, ROWS>());
    rows(std::integral_constant<int, 2>());  // rows stay in pairs
    rows(std::integral_constant<int, 1>());
  }
}

// Call f(row, column, vector) for each vector of a tile's sums.
template <int R, int V, class F>
inline __attribute__((always_inline)) void for_each(int i, int j, vec (&sums)[R][V], F f) {
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) f(i + r, j + v * L, sums[r][v]);
}

// Call f(row, column, vectors, count) for each group of G rows; zeros complete an odd last group.
template <class T, int R, int V, class F>
inline __attribute__((always_inline)) void for_each_group(int i, int j, vec (&sums)[R][V], F f) {
  for (int r = 0; r < R; r += T::G)
    for (int v = 0; v < V; v++) {
      vec group[2] = {sums[r][v], vec{}};
      if (T::G == 2 && r + 1 < R) group[1] = sums[r + 1 < R ? r + 1 : r][v];
      f(i + r, j + v * L, group, std::min(T::G, R - r));
    }
}

// A matrix of `rows` by `columns`, packed as the right factor of a product.
struct Packed {
  long depth = 0;
  std::vector<uint32_t> data_;

  template <class T>
  static Packed of(T, int rows, int columns) {
    const long depth = (rows + T::G - 1) / T::G;
    return {depth, std::vector<uint32_t>(depth * round_up(columns, PANEL))};
  }
  uint32_t* at(int group, int column) {
    return data_.data() + column / PANEL * PANEL * depth + group * PANEL + column % PANEL;
  }
  const uint32_t* data() const { return data_.data(); }
};

// Pack x (rows × columns, its rows `stride` apart).
template <class T>
void pack(const typename T::Value* x, long stride, int rows, int columns, Packed& out) {
  for (int j = 0; j < columns; j += L)
    for (int i = 0; i < rows; i += T::G) {
      words packed;
      if (i + T::G <= rows) {
        packed = T::pack(x + i * stride + j, (int)stride);
      } else {  // an odd last row is paired with zeros
        vec group[2] = {T::read(x + i * stride + j), vec{}};
        packed = T::pack(group);
      }
      store(out.at(i / T::G, j), packed);
    }
}

// Pack the transpose of x (columns × rows, its rows `stride` apart).
template <class T>
void pack_transposed(const typename T::Value* x, long stride, int rows, int columns, Packed& out) {
  for (int first = 0; first < columns; first += L) {
    const int here = std::min(L, columns - first);
    for (int w = 0; w < rows / T::G; w++) {
      uint32_t column[L] = {};
      for (int i = 0; i < here; i++)
        std::memcpy(&column[i], x + (first + i) * stride + w * T::G, 4);
      std::memcpy(out.at(w, first), column, sizeof column);
    }
  }
}

// --- shared by several layers

vec visible(vec x, int query, int first_key, float other) {
  return lanes() + first_key > query ? broadcast(other) : x;
}

// Replace a row of scores by its unnormalised softmax; return the largest score and the sum.
struct RowSum {
  float top, total;
};
RowSum exponentials(float* scores, int query, int seen) {
  vec most = broadcast(MASKED), total = {};
  for (int j = 0; j < seen; j += L) {
    const vec x = visible(load<vec>(scores + j), query, j, MASKED);
    store(scores + j, x);
    most = max_of(most, x);
  }
  const float top = maximum(most);
  for (int j = 0; j < seen; j += L) {
    const vec x = visible(exponential(load<vec>(scores + j) - top), query, j, 0.f);
    total += x;
    store(scores + j, x);
  }
  return {top, sum(total)};
}

// Pack W for products over inputs (forward pass) or over outputs (backward pass).
template <class T>
Packed pack_weight(const float* w, int outputs, int inputs, bool over_inputs) {
  Packed out = over_inputs ? Packed::of(T(), inputs, outputs) : Packed::of(T(), outputs, inputs);
  if (over_inputs) {
#pragma omp parallel for
    for (int o = 0; o < outputs; o++)
      for (int i = 0; i < inputs; i += T::G) *out.at(i / T::G, o) = T::word(w + o * (long)inputs + i);
  } else {
#pragma omp parallel for
    for (int o = 0; o < outputs; o += T::G)
      for (int i = 0; i < inputs; i += L) {
        vec group[2];
        for (int g = 0; g < T::G; g++) group[g] = load<vec>(w + (o + g) * (long)inputs + i);
        store(out.at(o / T::G, i), T::pack(group));
      }
  }
  return out;
}

// GELU in its tanh form is x sigmoid(2u) with u = sqrt(2 / π) (x + 0.044715 x³).
constexpr float TWICE_ROOT = 1.5957691216f, CUBIC = 0.044715f;

template <class T>
vec sigmoid_2u(vec x) {
  return T::inverse(1.f + exponential(x * (-TWICE_ROOT - TWICE_ROOT * CUBIC * x * x)));
}

}  // namespace
