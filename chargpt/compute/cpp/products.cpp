#include "products.h"

#include <type_traits>

namespace chargpt {
namespace {

INLINE vec dot(Float, vec sums, uint32_t a, words b) {
  float x;
  std::memcpy(&x, &a, 4);
  return fma((vec)b, x, sums);
}
#if defined(__AVX512BF16__)
INLINE vec dot(Bfloat16, vec sums, uint32_t a, words b) {
  return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#elif defined(CHARGPT_BF16)
INLINE vec dot(Bfloat16, vec sums, uint32_t a, words b) {
  return (vec)vbfdotq_f32((float32x4_t)sums, vreinterpretq_bf16_u32(vdupq_n_u32(a)),
                          vreinterpretq_bf16_u32((uint32x4_t)b));
}
#endif

// Compute a tile of R rows by V vectors. A's words are neighbours along k (BY_ROW) or along the rows.
template <class T, int R, int V, bool BY_ROW>
INLINE void tile(Index k, const uint32_t* a, Index stride_a, const uint32_t* b, float* out,
                 Index stride, bool add) {
  vec sums[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++)
      sums[r][v] = add ? load<vec>(out + r * stride + v * L) : vec{};
  for (Index i = 0; i < k; i++) {
    words right[V];
    UNROLL for (int v = 0; v < V; v++) right[v] = load<words>(b + i * PANEL + v * L);
    UNROLL for (int r = 0; r < R; r++) {
      const uint32_t word = BY_ROW ? a[r * stride_a + i] : a[i * stride_a + r];
      UNROLL for (int v = 0; v < V; v++) sums[r][v] = dot(T(), sums[r][v], word, right[v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) store(out + r * stride + v * L, sums[r][v]);
}

// Compute m rows: tiles of ROWS, then one of the rest.
template <class T, int V, bool BY_ROW>
void tiles(Index m, Index k, const uint32_t* a, Index stride_a, const uint32_t* b, float* out,
           Index stride, bool add) {
  const Index next = BY_ROW ? stride_a : 1;
  auto rest = [&](auto rows) {
    tile<T, decltype(rows)::value, V, BY_ROW>(k, a, stride_a, b, out, stride, add);
  };
  for (; m >= ROWS; m -= ROWS, a += ROWS * next, out += ROWS * stride)
    rest(std::integral_constant<int, ROWS>());
  switch (m) {
    case 1: return rest(std::integral_constant<int, 1>());
    case 2: return rest(std::integral_constant<int, 2>());
    case 3: return rest(std::integral_constant<int, 3>());
    case 4: return rest(std::integral_constant<int, 4>());
    case 5: return rest(std::integral_constant<int, 5>());
    case 6: return rest(std::integral_constant<int, 6>());
    case 7: return rest(std::integral_constant<int, 7>());
  }
}

template <class T, bool BY_ROW>
void multiply_by(Index m, Index n, Index k, const uint32_t* a, Index stride_a, const uint32_t* b,
                 Index depth, float* out, Index stride, bool add) {
  for (Index first = 0; first < k; first += DEPTH) {
    const Index here = std::min<Index>(DEPTH, k - first);
    const uint32_t* left = a + first * (BY_ROW ? 1 : stride_a);
    for (Index j = 0; j < n; j += PANEL) {
      const auto run = n - j < PANEL ? tiles<T, PARTS, BY_ROW> : tiles<T, COLUMNS, BY_ROW>;
      run(m, here, left, stride_a, b + j * depth + first * PANEL, out + j, stride, add || first > 0);
    }
  }
}

}  // namespace

template <class T>
void multiply(Index m, Index n, Index k, Left a, const uint32_t* b, Index depth, float* out,
              Index stride, bool add) {
  if (a.step == 1)
    multiply_by<T, true>(m, n, k, a.at, a.row, b, depth, out, stride, add);
  else
    multiply_by<T, false>(m, n, k, a.at, a.step, b, depth, out, stride, add);
}

template <class T>
Packed pack_weight(const float* w, Index outputs, Index inputs, bool over_inputs) {
  Packed out = over_inputs ? Packed::of(T(), inputs, outputs) : Packed::of(T(), outputs, inputs);
  if (over_inputs) {
    parallel(round_up(outputs, PANEL) / PANEL, [&](Index panel, int) {
      for (Index o = panel * PANEL; o < (panel + 1) * PANEL; o++)
        for (Index i = 0; i < inputs; i += T::G)
          *out.at(i / T::G, o) = o < outputs ? T::word(w + o * inputs + i) : 0;
    });
  } else {
    parallel(out.depth, [&](Index group, int) {
      for (Index i = 0; i < inputs; i += L) {
        vec rows[2] = {};
        for (Index g = 0; g < std::min<Index>(T::G, outputs - group * T::G); g++)
          rows[g] = load<vec>(w + (group * T::G + g) * inputs + i);
        store(out.at(group, i), T::pack(rows));
      }
    });
  }
  return out;
}

#define INSTANTIATE(T)                                                                     \
  template void multiply<T>(Index, Index, Index, Left, const uint32_t*, Index, float*, Index, \
                            bool);                                                         \
  template Packed pack_weight<T>(const float*, Index, Index, bool);
INSTANTIATE(Float)
#ifdef CHARGPT_BF16
INSTANTIATE(Bfloat16)
#endif

}  // namespace chargpt
