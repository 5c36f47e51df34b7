// The layers of a GPT-2, forward and backward, each in one pass that stays in the cache: causal
// attention, linear, feed-forward, LayerNorm, dropout with the residual sum; and Muon's update.
//
// Values are float, or bfloat16 where the processor multiplies pairs of it (AVX512-BF16). Sums,
// softmax, statistics and weights are float always. Everything is written once, over two types:
//
//   vector   L floats, the width of a register. GCC's and Clang's vector extension, so the same
//            text serves AVX-512, AVX2 and NEON.
//   word     the 32 bits that a multiply-add takes from each operand: one float, or a pair of
//            bfloat16 that are neighbours along the axis summed over. G values are a word.
//
// A matrix product C[i, j] = sum over k of A[i, k] B[k, j] takes single words of A, at any two
// strides, and vectors of words of B, which is packed: word (k, j) holds the G values
// B[kG, j] … B[kG + G - 1, j], and PANEL columns lie together, so that a tile reads one stretch.
//
// Plain C functions called through ctypes; chargpt/native.py says what each pointer is.
// Shapes: B sequences, T time, H heads, D head size, C = H × D; n rows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int L = 16, ROWS = 8;
#elif defined(__AVX2__)
constexpr int L = 8, ROWS = 4;  // 16 registers: fewer accumulators
#else
constexpr int L = 4, ROWS = 8;
#endif
constexpr int COLUMNS = 2;       // vectors in a tile's row
constexpr int PANEL = COLUMNS * L;
constexpr int LINE = 64;         // bytes in a line of the cache
constexpr int TOKENS = 128;      // rows of a linear layer in hand
constexpr int QUERIES = 32;      // rows of the attention matrix in hand: its slice stays in cache
constexpr float NOTHING = -1e30f;  // a masked score; finite, so that no arithmetic makes a NaN of it

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
vec spread(float x) { return vec{} + x; }
vec larger(vec a, vec b) { return a > b ? a : b; }
vec smaller(vec a, vec b) { return a < b ? a : b; }
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

// 2^(x log2 e): the whole part goes into the exponent, a minimax polynomial takes the rest. Relative
// error 1.6e-7, and what rounding x log2 e makes of it; it saturates beyond |x| = 87.
vec exponential(vec x) {
  x = larger(spread(-87.f), smaller(spread(87.f), x)) * 1.44269504f;  // in this order NaN stays
  const vec magic = spread(12582912.f);  // 1.5 × 2^23: adding it rounds to a whole number
  const vec shifted = x + magic, whole = shifted - magic, rest = x - whole;
  vec y = spread(1.32647285e-3f);
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
  // The word of G neighbouring floats.
  static uint32_t word(const float* p) {
    uint32_t bits;
    std::memcpy(&bits, p, 4);
    return bits;
  }
  // The words of G rows: as vectors, or `stride` apart in memory.
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
  // To 14 bits, twice what bfloat16 keeps; a division takes as long as the rest of GELU.
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

// --- random numbers: a hash of (key, index), so that forward and backward agree on what fell out

struct Dropout {
  uint32_t key, dropped;  // out of 2^31
  float scale;
  bool on() const { return dropped > 0; }

  Dropout(double p, uint64_t seed, uint32_t stream)
      : key((uint32_t)(seed * 0x9E3779B97F4A7C15ull >> 32) ^ (stream * 0x85EBCA6Bu)),
        dropped((uint32_t)std::min(std::round(p * 2147483648.0), 2147483647.0)),
        scale(1.f / (1.f - (float)p)) {}

  // Scale, or 0, for each of L indices from the first on.
  vec mask(uint32_t first) const {
    words x = (words)lanes() + first;  // lowbias32 (Wellons 2018)
    x = x * 0x9E3779B9u + key;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x = x ^ (x >> 16);
    const ints keep = (ints)(x >> 1) >= (int32_t)dropped;
    return (vec)((ints)spread(scale) & keep);
  }
};

// --- matrix products

// The sums of one tile, R rows by V vectors, go to `done(sums)`.
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

// Rows [0, m) by columns [0, n) of a product over k words, n a multiple of L. B has `depth` ≥ k
// words a column. `done(i, j, sums)` takes the sums of a tile whose corner is (i, j).
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
    rows(std::integral_constant<int, 2>());  // pairs of rows stay together
    rows(std::integral_constant<int, 1>());
  }
}

// Call f(row, column, vector) for each vector of a tile's sums.
template <int R, int V, class F>
inline __attribute__((always_inline)) void each(int i, int j, vec (&sums)[R][V], F f) {
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) f(i + r, j + v * L, sums[r][v]);
}

// Call f(row, column, vectors, count) for each group of G rows; a lone last row leaves a zero one.
template <class T, int R, int V, class F>
inline __attribute__((always_inline)) void each_group(int i, int j, vec (&sums)[R][V], F f) {
  for (int r = 0; r < R; r += T::G)
    for (int v = 0; v < V; v++) {
      vec group[2] = {sums[r][v], vec{}};
      if (T::G == 2 && r + 1 < R) group[1] = sums[r + 1 < R ? r + 1 : r][v];
      f(i + r, j + v * L, group, std::min(T::G, R - r));
    }
}

// The words of a matrix of `rows` by `columns`, packed for the right side of a product.
struct Packed {
  long depth;
  std::vector<uint32_t> words_;

  template <class T>
  static Packed of(T, int rows, int columns) {
    const long depth = (rows + T::G - 1) / T::G;
    return {depth, std::vector<uint32_t>(depth * round_up(columns, PANEL))};
  }
  uint32_t* at(int group, int column) {
    return words_.data() + column / PANEL * PANEL * depth + group * PANEL + column % PANEL;
  }
  const uint32_t* data() const { return words_.data(); }
};

// Pack x (rows × columns, rows `stride` apart).
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

// Pack the transpose of x (columns × rows, rows of x `stride` apart).
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

// --- attention

// The place of one head of one sequence in (B, T, 3, H, D).
template <class T>
struct Head {
  typedef typename T::Value Value;
  int t, d, wide;  // wide: t rounded up to whole panels
  long row;        // values from a position to the next, in q, k and v
  const Value *q, *k, *v;

  Head(const Value* qkv, long index, int t, int heads, int d)
      : t(t), d(d), wide(round_up(t, PANEL)), row(3l * heads * d) {
    q = qkv + index / heads * t * row + index % heads * d;
    k = q + heads * d;
    v = k + heads * d;
  }

  // Fetch the next head's rows, if it is of this sequence: they are too far apart for the processor
  // to foresee.
  void prefetch_next(long index, int heads) const {
    if (index % heads + 1 == heads) return;
    for (const Value* first : {q, k, v}) prefetch(first + d, row);
  }
  void prefetch(const Value* first, long stride) const {
    for (int i = 0; i < t; i++)
      for (int j = 0; j < d; j += LINE / (int)sizeof(Value))
        __builtin_prefetch(first + i * stride + j);
  }

  // Keys that the positions before `last` see, in whole panels, and in words.
  int seen(int last) const { return std::min(wide, round_up(last, PANEL)); }
  int seen_words(int last) const { return std::min(seen(last), round_up(t, T::G)) / T::G; }

  // out[i][j] = scale × q_i · k_j, i from `first`, for the keys that the last of m rows sees.
  void scores(int first, int m, const Packed& keys, float scale, float* out) const {
    multiply<T>(m, seen(first + m), d / T::G, q + first * row, row / T::G, 1, keys.data(),
                keys.depth, [&](int i, int j, auto& sums) {
                  each(i, j, sums, [&](int i, int j, vec x) { store(out + i * wide + j, x * scale); });
                });
  }
};

vec visible(vec x, int query, int first_key, float other) {
  return lanes() + first_key > query ? spread(other) : x;
}

// Unnormalised softmax of a row of scores, in place; returns (largest, sum).
struct RowSum {
  float top, total;
};
RowSum exponentials(float* scores, int query, int seen) {
  vec most = spread(NOTHING), total = {};
  for (int j = 0; j < seen; j += L) {
    const vec x = visible(load<vec>(scores + j), query, j, NOTHING);
    store(scores + j, x);
    most = larger(most, x);
  }
  const float top = maximum(most);
  for (int j = 0; j < seen; j += L) {
    const vec x = visible(exponential(load<vec>(scores + j) - top), query, j, 0.f);
    total += x;
    store(scores + j, x);
  }
  return {top, sum(total)};
}

template <class T>
void attention_forward(const typename T::Value* qkv, typename T::Value* out, float* log_sums, int B,
                       int t, int heads, int d, double p, uint64_t seed) {
  typedef typename T::Value Value;
  const float scale = 1.f / std::sqrt((float)d);
#pragma omp parallel
  {
    const int wide = round_up(t, PANEL);
    Packed keys = Packed::of(T(), d, wide), values = Packed::of(T(), t, d);
    std::vector<float> scores((long)QUERIES * wide);
    std::vector<Value> weights((long)QUERIES * wide);
#pragma omp for schedule(dynamic, heads)
    for (long index = 0; index < (long)B * heads; index++) {
      const Head<T> head(qkv, index, t, heads, d);
      head.prefetch_next(index, heads);
      const Dropout dropout(p, seed, (uint32_t)index);
      pack_transposed<T>(head.k, head.row, d, t, keys);
      pack<T>(head.v, head.row, t, d, values);
      Value* y = out + (index / heads * t * heads + index % heads) * d;
      for (int first = 0; first < t; first += QUERIES) {
        const int m = std::min(QUERIES, t - first), seen = head.seen(first + m);
        float norms[QUERIES];
        head.scores(first, m, keys, scale, scores.data());
        for (int i = 0; i < m; i++) {
          float* row = scores.data() + i * wide;
          const RowSum sums = exponentials(row, first + i, seen);
          norms[i] = 1.f / sums.total;
          log_sums[index * t + first + i] = sums.top + std::log(sums.total);
          for (int j = 0; j < seen; j += L) {
            vec x = load<vec>(row + j);
            if (dropout.on()) x *= dropout.mask((uint32_t)((first + i) * wide + j));
            T::write(weights.data() + i * wide + j, x);
          }
        }
        multiply<T>(m, d, head.seen_words(first + m), weights.data(), wide / T::G, 1, values.data(),
                    values.depth, [&](int i, int j, auto& sums) {
                      each(i, j, sums, [&](int i, int j, vec x) {
                        T::write(y + (long)(first + i) * heads * d + j, x * norms[i]);
                      });
                    });
      }
    }
  }
}

// With P the weights, M the dropout mask, O = (P M) V and upstream dO:
//   dV = (P M)ᵀ dO,  dP = (dO Vᵀ) M,  dS = P (dP - rowsum(dO O)) scale,  dQ = dS K,  dK = dSᵀ Q
template <class T>
void attention_backward(const typename T::Value* qkv, const typename T::Value* out,
                        const float* log_sums, const typename T::Value* d_out,
                        typename T::Value* d_qkv, int B, int t, int heads, int d, double p,
                        uint64_t seed) {
  typedef typename T::Value Value;
  const float scale = 1.f / std::sqrt((float)d);
  const long c = (long)heads * d;
#pragma omp parallel
  {
    const int wide = round_up(t, PANEL);
    Packed keys_t = Packed::of(T(), d, wide), values_t = Packed::of(T(), d, wide);
    Packed keys = Packed::of(T(), t, d), queries = Packed::of(T(), t, d);
    Packed d_outs = Packed::of(T(), t, d);
    std::vector<float> scores((long)QUERIES * wide), d_weights(scores.size());
    std::vector<Value> d_scores(scores.size());
    // By key, for the left side of a product over queries: word (i / G, j).
    std::vector<uint32_t> weights_by_key(scores.size() / T::G), d_scores_by_key(scores.size() / T::G);
    std::vector<float> d_k((long)wide * d), d_v((long)wide * d);
#pragma omp for schedule(dynamic, heads)
    for (long index = 0; index < (long)B * heads; index++) {
      const Head<T> head(qkv, index, t, heads, d);
      head.prefetch_next(index, heads);
      const Dropout dropout(p, seed, (uint32_t)index);
      const long place = index / heads * t * c + index % heads * d;
      const Value *dy = d_out + place, *y = out + place;
      if (index % heads + 1 < heads) head.prefetch(dy + d, c), head.prefetch(y + d, c);
      pack_transposed<T>(head.k, head.row, d, t, keys_t);
      pack_transposed<T>(head.v, head.row, d, t, values_t);
      pack<T>(head.k, head.row, t, d, keys);
      pack<T>(head.q, head.row, t, d, queries);
      pack<T>(dy, c, t, d, d_outs);
      std::fill(d_k.begin(), d_k.end(), 0.f);
      std::fill(d_v.begin(), d_v.end(), 0.f);
      Value* d_q = d_qkv + (head.q - qkv);
      for (int first = 0; first < t; first += QUERIES) {
        const int m = std::min(QUERIES, t - first), seen = head.seen(first + m);
        head.scores(first, m, keys_t, scale, scores.data());
        multiply<T>(m, seen, d / T::G, dy + first * c, c / T::G, 1, values_t.data(), values_t.depth,
                    [&](int i, int j, auto& sums) {
                      each(i, j, sums, [&](int i, int j, vec x) {
                        store(d_weights.data() + i * wide + j, x);
                      });
                    });
        for (int i0 = 0; i0 < m; i0 += T::G) {
          float delta[2] = {}, log_sum[2] = {};
          const int here = std::min(T::G, m - i0);
          for (int r = 0; r < here; r++) {
            const long at = first + i0 + r;
            vec total = {};
            for (int j = 0; j < d; j += L)
              total += T::read(dy + at * c + j) * T::read(y + at * c + j);
            delta[r] = sum(total);
            log_sum[r] = log_sums[index * t + at];
          }
          for (int j = 0; j < seen; j += L) {
            vec weight[2] = {}, d_score[2] = {};
            for (int r = 0; r < here; r++) {
              const int i = i0 + r, query = first + i;
              const vec s = load<vec>(scores.data() + i * wide + j);
              const vec w = visible(exponential(s - log_sum[r]), query, j, 0.f);
              vec dw = load<vec>(d_weights.data() + i * wide + j);
              weight[r] = w;
              if (dropout.on()) {
                const vec mask = dropout.mask((uint32_t)(query * wide + j));
                weight[r] *= mask;
                dw *= mask;
              }
              d_score[r] = w * (dw - delta[r]) * scale;
              T::write(d_scores.data() + i * wide + j, d_score[r]);
            }
            store(weights_by_key.data() + (long)(i0 / T::G) * wide + j, T::pack(weight));
            store(d_scores_by_key.data() + (long)(i0 / T::G) * wide + j, T::pack(d_score));
          }
        }
        multiply<T>(m, d, head.seen_words(first + m), d_scores.data(), wide / T::G, 1, keys.data(),
                    keys.depth, [&](int i, int j, auto& sums) {
                      each(i, j, sums, [&](int i, int j, vec x) {
                        T::write(d_q + (first + i) * head.row + j, x);
                      });
                    });
        auto add_by_key = [&](const std::vector<uint32_t>& left, Packed& right, float* out) {
          multiply<T>(std::min(seen, t), d, (m + T::G - 1) / T::G, left.data(), 1, wide,
                      right.at(first / T::G, 0), right.depth, [&](int i, int j, auto& sums) {
                        each(i, j, sums, [&](int i, int j, vec x) {
                          float* at = out + (long)i * d + j;
                          store(at, load<vec>(at) + x);
                        });
                      });
        };
        add_by_key(weights_by_key, d_outs, d_v.data());
        add_by_key(d_scores_by_key, queries, d_k.data());
      }
      for (int i = 0; i < t; i++)
        for (int j = 0; j < d; j += L) {
          T::write(d_q + i * head.row + c + j, load<vec>(d_k.data() + (long)i * d + j));
          T::write(d_q + i * head.row + 2 * c + j, load<vec>(d_v.data() + (long)i * d + j));
        }
    }
  }
}

// --- linear layers: out = x Wᵀ + b, with W (outputs × inputs) and b float

// W packed for products over inputs (forward) or over outputs (backward).
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

// The gradients of a weight and a bias, summed by one thread over the tokens it has in hand.
struct Gradient {
  int outputs, inputs;
  std::vector<float> weight, bias;

  Gradient(int outputs, int inputs)
      : outputs(outputs), inputs(inputs), weight((long)outputs * inputs), bias(outputs) {}

  // weight += upᵀ x, both packed over the same m tokens.
  template <class T>
  void add(int m, const Packed& up, const Packed& x) {
    const int k = (m + T::G - 1) / T::G;
    for (int o = 0; o < outputs; o += PANEL)
      multiply<T>(std::min(PANEL, outputs - o), inputs, k, up.data() + o * up.depth, 1, PANEL,
                  x.data(), x.depth, [&](int i, int j, auto& sums) {
                    each(i, j, sums, [&](int i, int j, vec v) {
                      float* at = weight.data() + (long)(o + i) * inputs + j;
                      store(at, load<vec>(at) + v);
                    });
                  });
  }
  // bias += column sums of up (m × outputs).
  template <class T>
  void add_bias(int m, const typename T::Value* up) {
    for (int j = 0; j < outputs; j += L) {
      vec total = load<vec>(&bias[j]);
      for (int i = 0; i < m; i++) total += T::read(up + (long)i * outputs + j);
      store(&bias[j], total);
    }
  }
};

// The gradients of all threads, added up in the threads' order: the same sums every time.
struct Gradients {
  std::vector<std::unique_ptr<Gradient>> parts;

  Gradients() : parts(threads()) {}
  Gradient& mine(int outputs, int inputs) {
    parts[thread()] = std::make_unique<Gradient>(outputs, inputs);
    return *parts[thread()];
  }
  void add_up(float* weight, float* bias, int outputs, int inputs) const {
#pragma omp parallel for
    for (int o = 0; o < outputs; o++) {
      float* row = weight + (long)o * inputs;
      std::fill(row, row + inputs, 0.f);
      if (bias) bias[o] = 0;
      for (const auto& part : parts) {
        if (!part) continue;
        const float* other = part->weight.data() + (long)o * inputs;
        for (int i = 0; i < inputs; i++) row[i] += other[i];
        if (bias) bias[o] += part->bias[o];
      }
    }
  }
};

template <class T>
void linear_forward(const typename T::Value* x, const float* w, const float* b,
                    typename T::Value* out, long n, int inputs, int outputs) {
  const Packed weight = pack_weight<T>(w, outputs, inputs, true);
#pragma omp parallel for
  for (long first = 0; first < n; first += TOKENS) {
    const int m = (int)std::min((long)TOKENS, n - first);
    multiply<T>(m, outputs, inputs / T::G, x + first * inputs, inputs / T::G, 1, weight.data(),
                weight.depth, [&](int i, int j, auto& sums) {
                  each(i, j, sums, [&](int i, int j, vec v) {
                    if (b) v += load<vec>(b + j);
                    T::write(out + (first + i) * outputs + j, v);
                  });
                });
  }
}

template <class T>
void linear_backward(const typename T::Value* x, const float* w, const typename T::Value* d_out,
                     typename T::Value* d_x, float* d_w, float* d_b, long n, int inputs,
                     int outputs) {
  const Packed weight = pack_weight<T>(w, outputs, inputs, false);
  Gradients gradients;
#pragma omp parallel
  {
    Gradient& gradient = gradients.mine(outputs, inputs);
    Packed xs = Packed::of(T(), TOKENS, inputs), ups = Packed::of(T(), TOKENS, outputs);
#pragma omp for
    for (long first = 0; first < n; first += TOKENS) {
      const int m = (int)std::min((long)TOKENS, n - first);
      const typename T::Value *here = x + first * inputs, *up = d_out + first * outputs;
      pack<T>(here, inputs, m, inputs, xs);
      pack<T>(up, outputs, m, outputs, ups);
      gradient.add<T>(m, ups, xs);
      if (d_b) gradient.add_bias<T>(m, up);
      multiply<T>(m, inputs, outputs / T::G, up, outputs / T::G, 1, weight.data(), weight.depth,
                  [&](int i, int j, auto& sums) {
                    each(i, j, sums, [&](int i, int j, vec v) {
                      T::write(d_x + (first + i) * inputs + j, v);
                    });
                  });
    }
  }
  gradients.add_up(d_w, d_b, outputs, inputs);
}

// --- feed-forward: out = GELU(x W1ᵀ + b1) W2ᵀ + b2, hidden size f

// GELU in the tanh form: x sigmoid(2u) with u = sqrt(2 / π) (x + 0.044715 x³).
constexpr float TWICE_ROOT = 1.5957691216f, CUBIC = 0.044715f;

template <class T>
vec sigmoid_2u(vec x) {
  return T::inverse(1.f + exponential(x * (-TWICE_ROOT - TWICE_ROOT * CUBIC * x * x)));
}

// `before` (n × f) keeps what GELU is taken of, for the backward pass.
template <class T>
void feed_forward_forward(const typename T::Value* x, const float* w1, const float* b1,
                          const float* w2, const float* b2, typename T::Value* before,
                          typename T::Value* out, long n, int c, int f) {
  const Packed expand = pack_weight<T>(w1, f, c, true), project = pack_weight<T>(w2, c, f, true);
#pragma omp parallel
  {
    std::vector<typename T::Value> hidden((long)TOKENS * f);
#pragma omp for
    for (long first = 0; first < n; first += TOKENS) {
      const int m = (int)std::min((long)TOKENS, n - first);
      multiply<T>(m, f, c / T::G, x + first * c, c / T::G, 1, expand.data(), expand.depth,
                  [&](int i, int j, auto& sums) {
                    each(i, j, sums, [&](int i, int j, vec v) {
                      if (b1) v += load<vec>(b1 + j);
                      T::write(before + (first + i) * f + j, v);
                      T::write(hidden.data() + (long)i * f + j, v * sigmoid_2u<T>(v));
                    });
                  });
      multiply<T>(m, c, f / T::G, hidden.data(), f / T::G, 1, project.data(), project.depth,
                  [&](int i, int j, auto& sums) {
                    each(i, j, sums, [&](int i, int j, vec v) {
                      if (b2) v += load<vec>(b2 + j);
                      T::write(out + (first + i) * c + j, v);
                    });
                  });
    }
  }
}

template <class T>
void feed_forward_backward(const typename T::Value* x, const float* w1, const float* w2,
                           const typename T::Value* before, const typename T::Value* d_out,
                           typename T::Value* d_x, float* d_w1, float* d_b1, float* d_w2,
                           float* d_b2, long n, int c, int f) {
  const Packed expand = pack_weight<T>(w1, f, c, false), project = pack_weight<T>(w2, c, f, false);
  Gradients firsts, seconds;
#pragma omp parallel
  {
    Gradient &first_layer = firsts.mine(f, c), &second_layer = seconds.mine(c, f);
    Packed xs = Packed::of(T(), TOKENS, c), ups = Packed::of(T(), TOKENS, c);
    Packed hiddens = Packed::of(T(), TOKENS, f), d_hiddens = Packed::of(T(), TOKENS, f);
    std::vector<typename T::Value> d_hidden((long)TOKENS * f);
#pragma omp for
    for (long first = 0; first < n; first += TOKENS) {
      const int m = (int)std::min((long)TOKENS, n - first);
      const typename T::Value *here = x + first * c, *up = d_out + first * c;
      pack<T>(here, c, m, c, xs);
      pack<T>(up, c, m, c, ups);
      multiply<T>(m, f, c / T::G, up, c / T::G, 1, project.data(), project.depth,
                  [&](int i, int j, auto& sums) {
                    each_group<T>(i, j, sums, [&](int i, int j, vec* group, int count) {
                      vec hidden[2] = {};
                      for (int r = 0; r < count; r++) {
                        const vec v = T::read(before + (first + i + r) * f + j), s = sigmoid_2u<T>(v);
                        hidden[r] = v * s;
                        group[r] *= s + hidden[r] * (1.f - s) * TWICE_ROOT * (1.f + 3 * CUBIC * v * v);
                        T::write(d_hidden.data() + (long)(i + r) * f + j, group[r]);
                      }
                      store(hiddens.at(i / T::G, j), T::pack(hidden));
                      store(d_hiddens.at(i / T::G, j), T::pack(group));
                    });
                  });
      second_layer.add<T>(m, ups, hiddens);
      first_layer.add<T>(m, d_hiddens, xs);
      if (d_b1) first_layer.add_bias<T>(m, d_hidden.data());
      if (d_b2) second_layer.add_bias<T>(m, up);
      multiply<T>(m, c, f / T::G, d_hidden.data(), f / T::G, 1, expand.data(), expand.depth,
                  [&](int i, int j, auto& sums) {
                    each(i, j, sums,
                         [&](int i, int j, vec v) { T::write(d_x + (first + i) * c + j, v); });
                  });
    }
  }
  firsts.add_up(d_w1, d_b1, f, c);
  seconds.add_up(d_w2, d_b2, c, f);
}

// --- Muon

// The iteration x -> a x + b (x xᵀ) x + c (x xᵀ)² x, in place.
template <class T>
struct Orthogonalizer {
  typedef typename T::Value Value;
  int rows, columns;
  Packed transposed, gram, right;
  std::vector<Value> products, polynomial;

  Orthogonalizer(int rows, int columns)
      : rows(rows),
        columns(columns),
        transposed(Packed::of(T(), columns, rows)),
        gram(Packed::of(T(), rows, rows)),
        right(Packed::of(T(), rows, columns)),
        products((long)rows * rows),
        polynomial(products.size()) {}

  void step(Value* x, float a, float b, float c) {
    pack_transposed<T>(x, columns, columns, rows, transposed);
    multiply<T>(rows, rows, columns / T::G, x, columns / T::G, 1, transposed.data(),
                transposed.depth, [&](int i, int j, auto& sums) {
                  each(i, j, sums, [&](int i, int j, vec v) {
                    T::write(products.data() + (long)i * rows + j, v);
                  });
                });
    pack<T>(products.data(), rows, rows, rows, gram);
    multiply<T>(rows, rows, rows / T::G, products.data(), rows / T::G, 1, gram.data(), gram.depth,
                [&](int i, int j, auto& sums) {
                  each(i, j, sums, [&](int i, int j, vec v) {
                    const long at = (long)i * rows + j;
                    T::write(polynomial.data() + at, T::read(products.data() + at) * b + v * c);
                  });
                });
    pack<T>(x, columns, rows, columns, right);
    multiply<T>(rows, columns, rows / T::G, polynomial.data(), rows / T::G, 1, right.data(),
                right.depth, [&](int i, int j, auto& sums) {
                  each(i, j, sums, [&](int i, int j, vec v) {
                    Value* at = x + (long)i * columns + j;
                    T::write(at, T::read(at) * a + v);
                  });
                });
  }
};

void transpose(const float* x, int rows, int columns, float* out) {
  for (int i = 0; i < rows; i += L)
    for (int j = 0; j < columns; j++)
      for (int r = i; r < i + L; r++) out[(long)j * rows + r] = x[(long)r * columns + j];
}

// One update of n matrices, each a momentum, an orthogonalisation of its sum with the gradient, a
// decay and a step. `shapes` holds rows and columns of each, `scales` the length of each step.
template <class T>
void muon(float* const* weights, const float* const* gradients, float* const* momenta,
          const int* shapes, const float* scales, int n, float momentum, float decay,
          const float* steps, int n_steps) {
#pragma omp parallel for schedule(dynamic)
  for (int index = 0; index < n; index++) {
    const int rows = shapes[2 * index], columns = shapes[2 * index + 1];
    const int low = std::min(rows, columns), high = std::max(rows, columns);
    const bool tall = rows > columns;
    const long size = (long)rows * columns;
    const float* gradient = gradients[index];
    std::vector<float> update(size), turned(tall ? size : 0);
    std::vector<typename T::Value> x(size);
    vec squares = {};
    for (long i = 0; i < size; i += L) {
      float* memory = momenta[index] + i;
      const vec g = load<vec>(gradient + i), old = load<vec>(memory);
      const vec now = old + (g - old) * (1 - momentum), ahead = g + (now - g) * momentum;
      store(memory, now);
      store(&update[i], ahead);
      squares += ahead * ahead;
    }
    const float inverse_norm = 1.f / std::max(std::sqrt(sum(squares)), 1e-7f);
    if (tall) transpose(update.data(), rows, columns, turned.data());
    const float* wide = tall ? turned.data() : update.data();
    for (long i = 0; i < size; i += L) T::write(&x[i], load<vec>(wide + i) * inverse_norm);
    Orthogonalizer<T> orthogonalizer(low, high);
    for (const float* step = steps; step < steps + 3 * n_steps; step += 3)
      orthogonalizer.step(x.data(), step[0], step[1], step[2]);
    for (long i = 0; i < size; i += L) store(&update[i], T::read(&x[i]));
    if (tall) transpose(update.data(), columns, rows, turned.data());
    const float* direction = tall ? turned.data() : update.data();
    for (long i = 0; i < size; i += L) {
      float* at = weights[index] + i;
      store(at, load<vec>(at) * decay - load<vec>(direction + i) * scales[index]);
    }
  }
}

// --- LayerNorm: float in, T out

template <class T>
void layer_norm_forward(const float* x, const float* gain, const float* bias,
                        typename T::Value* out, float* means, float* inverse_stds, long n, int c,
                        float eps) {
#pragma omp parallel for
  for (long i = 0; i < n; i++) {
    const float* row = x + i * c;
    vec total = {}, squares = {};
    for (int j = 0; j < c; j += L) total += load<vec>(row + j);
    const float mean = sum(total) / c;
    for (int j = 0; j < c; j += L) {
      const vec centred = load<vec>(row + j) - mean;
      squares += centred * centred;
    }
    const float inverse_std = 1.f / std::sqrt(sum(squares) / c + eps);
    means[i] = mean;
    inverse_stds[i] = inverse_std;
    for (int j = 0; j < c; j += L) {
      vec y = (load<vec>(row + j) - mean) * inverse_std * load<vec>(gain + j);
      if (bias) y += load<vec>(bias + j);
      T::write(out + i * c + j, y);
    }
  }
}

// With z the normalised x and g = upstream × gain: dx = (g - mean(g) - z mean(g z)) / std.
template <class T>
void layer_norm_backward(const float* x, const float* gain, const float* means,
                         const float* inverse_stds, const typename T::Value* d_out, float* d_x,
                         float* d_gain, float* d_bias, long n, int c) {
  Gradients gradients;
#pragma omp parallel
  {
    Gradient& gradient = gradients.mine(c, 1);  // a gain is a weight of one input
    std::vector<float>&gains = gradient.weight, &biases = gradient.bias;
#pragma omp for
    for (long i = 0; i < n; i++) {
      const float *row = x + i * c, mean = means[i], inverse_std = inverse_stds[i];
      const typename T::Value* dy = d_out + i * c;
      vec total = {}, along = {};
      for (int j = 0; j < c; j += L) {
        const vec z = (load<vec>(row + j) - mean) * inverse_std, up = T::read(dy + j);
        const vec g = up * load<vec>(gain + j);
        total += g;
        along += g * z;
        store(&gains[j], load<vec>(&gains[j]) + up * z);
        store(&biases[j], load<vec>(&biases[j]) + up);
      }
      const float mean_g = sum(total) / c, mean_gz = sum(along) / c;
      for (int j = 0; j < c; j += L) {
        const vec z = (load<vec>(row + j) - mean) * inverse_std;
        const vec g = T::read(dy + j) * load<vec>(gain + j);
        store(d_x + i * c + j, (g - mean_g - z * mean_gz) * inverse_std);
      }
    }
  }
  gradients.add_up(d_gain, d_bias, c, 1);
}

// --- residual sum: float x plus dropout of T

template <class T>
void residual_forward(const float* x, const typename T::Value* update, float* out, long n, double p,
                      uint64_t seed) {
  const Dropout dropout(p, seed, 0);
#pragma omp parallel for
  for (long i = 0; i < n / L; i++) {
    vec u = T::read(update + i * L);
    if (dropout.on()) u *= dropout.mask((uint32_t)(i * L));
    store(out + i * L, load<vec>(x + i * L) + u);
  }
}

template <class T>
void residual_backward(const float* d_out, typename T::Value* d_update, long n, double p,
                       uint64_t seed) {
  const Dropout dropout(p, seed, 0);
#pragma omp parallel for
  for (long i = 0; i < n / L; i++) {
    vec u = load<vec>(d_out + i * L);
    if (dropout.on()) u *= dropout.mask((uint32_t)(i * L));
    T::write(d_update + i * L, u);
  }
}

}  // namespace

// --- what ctypes sees: every function twice, `_bf16` only where the processor has it

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int chargpt_lanes() { return L; }

#define FUNCTIONS(T, suffix)                                                                       \
  EXPORT void attention_forward_##suffix(const T::Value* qkv, T::Value* out, float* log_sums,     \
                                         int B, int t, int heads, int d, double p,                \
                                         uint64_t seed) {                                         \
    attention_forward<T>(qkv, out, log_sums, B, t, heads, d, p, seed);                             \
  }                                                                                                \
  EXPORT void attention_backward_##suffix(                                                         \
      const T::Value* qkv, const T::Value* out, const float* log_sums, const T::Value* d_out,      \
      T::Value* d_qkv, int B, int t, int heads, int d, double p, uint64_t seed) {                  \
    attention_backward<T>(qkv, out, log_sums, d_out, d_qkv, B, t, heads, d, p, seed);              \
  }                                                                                                \
  EXPORT void layer_norm_forward_##suffix(const float* x, const float* gain, const float* bias,   \
                                          T::Value* out, float* means, float* inverse_stds,        \
                                          long n, int c, float eps) {                              \
    layer_norm_forward<T>(x, gain, bias, out, means, inverse_stds, n, c, eps);                     \
  }                                                                                                \
  EXPORT void layer_norm_backward_##suffix(const float* x, const float* gain, const float* means, \
                                           const float* inverse_stds, const T::Value* d_out,       \
                                           float* d_x, float* d_gain, float* d_bias, long n,       \
                                           int c) {                                                \
    layer_norm_backward<T>(x, gain, means, inverse_stds, d_out, d_x, d_gain, d_bias, n, c);        \
  }                                                                                                \
  EXPORT void linear_forward_##suffix(const T::Value* x, const float* w, const float* b,          \
                                      T::Value* out, long n, int inputs, int outputs) {            \
    linear_forward<T>(x, w, b, out, n, inputs, outputs);                                           \
  }                                                                                                \
  EXPORT void linear_backward_##suffix(const T::Value* x, const float* w, const T::Value* d_out,  \
                                       T::Value* d_x, float* d_w, float* d_b, long n, int inputs,  \
                                       int outputs) {                                              \
    linear_backward<T>(x, w, d_out, d_x, d_w, d_b, n, inputs, outputs);                            \
  }                                                                                                \
  EXPORT void feed_forward_forward_##suffix(const T::Value* x, const float* w1, const float* b1,  \
                                            const float* w2, const float* b2, T::Value* before,    \
                                            T::Value* out, long n, int c, int f) {                 \
    feed_forward_forward<T>(x, w1, b1, w2, b2, before, out, n, c, f);                              \
  }                                                                                                \
  EXPORT void feed_forward_backward_##suffix(                                                      \
      const T::Value* x, const float* w1, const float* w2, const T::Value* before,                 \
      const T::Value* d_out, T::Value* d_x, float* d_w1, float* d_b1, float* d_w2, float* d_b2,    \
      long n, int c, int f) {                                                                      \
    feed_forward_backward<T>(x, w1, w2, before, d_out, d_x, d_w1, d_b1, d_w2, d_b2, n, c, f);      \
  }                                                                                                \
  EXPORT void muon_##suffix(float* const* weights, const float* const* gradients,                 \
                            float* const* momenta, const int* shapes, const float* scales, int n,  \
                            float momentum, float decay, const float* steps, int n_steps) {        \
    muon<T>(weights, gradients, momenta, shapes, scales, n, momentum, decay, steps, n_steps);      \
  }                                                                                                \
  EXPORT void residual_forward_##suffix(const float* x, const T::Value* update, float* out,       \
                                        long n, double p, uint64_t seed) {                         \
    residual_forward<T>(x, update, out, n, p, seed);                                               \
  }                                                                                                \
  EXPORT void residual_backward_##suffix(const float* d_out, T::Value* d_update, long n, double p, \
                                         uint64_t seed) {                                          \
    residual_backward<T>(d_out, d_update, n, p, seed);                                             \
  }

FUNCTIONS(Float, fp32)
#ifdef __AVX512BF16__
FUNCTIONS(Bfloat16, bf16)
#endif
