#include "products.h"

#include <type_traits>

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Compute one row over P panels of B: more sums to hide the latency, more streams of memory.
template <class T, int P>
void one_row(Index k, const uint32_t* a, const uint32_t* b, Index depth, float* out, bool add) {
  vec sums[P][COLUMNS];
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int v = 0; v < COLUMNS; v++)
      sums[p][v] = add ? load<vec>(out + p * PANEL + v * L) : vec{};
  for (Index i = 0; i < k; i++)
    UNROLL for (int p = 0; p < P; p++)
      UNROLL for (int v = 0; v < COLUMNS; v++)
        sums[p][v] = dot(T(), sums[p][v], a[i], load<words>(b + (p * depth + i) * PANEL + v * L));
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int v = 0; v < COLUMNS; v++) store(out + p * PANEL + v * L, sums[p][v]);
}

template <class T, bool BY_ROW>
void multiply_by(Index m, Index n, Index k, const uint32_t* a, Index stride_a, const uint32_t* b,
                 Index depth, float* out, Index stride, bool add) {
  for (Index first = 0; first < k; first += DEPTH) {
    const Index here = std::min<Index>(DEPTH, k - first);
    const uint32_t* left = a + first * (BY_ROW ? 1 : stride_a);
    Index j = 0;
    for (constexpr int P = 4; m == 1 && BY_ROW && n - j >= P * PANEL; j += P * PANEL)
      one_row<T, P>(here, left, b + j * depth + first * PANEL, depth, out + j, add || first > 0);
    for (; j < n; j += PANEL) {
      const auto run = n - j < PANEL ? tiles<T, PARTS, BY_ROW> : tiles<T, COLUMNS, BY_ROW>;
      run(m, here, left, stride_a, b + j * depth + first * PANEL, out + j, stride, add || first > 0);
    }
  }
}

#ifdef __AMX_BF16__

// --- AMX (Intel, from 2023): a tile register holds 16 rows of 16 words

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};  // in a row
  uint8_t rows[16] = {};
};

// Compute N tiles of `rows` rows: registers 0 … 5 hold the sums, N rows by two columns of tiles; 6
// holds a tile of A, 7 one of B. `width` is the words of k in these two, `steps` how many follow.
template <int N>
void amx_tiles(Index rows, Index n, Index width, Index steps, const uint32_t* a, Index stride_a,
               const uint32_t* b, Index depth, float* out, Index stride, bool add) {
  TileConfig config;
  for (int c = 0; c < 6; c++) config.rows[c] = (uint8_t)rows, config.bytes[c] = 64;
  config.rows[6] = (uint8_t)rows, config.bytes[6] = (uint16_t)(4 * width);
  config.rows[7] = (uint8_t)width, config.bytes[7] = 64;
  _tile_loadconfig(&config);
#define EACH_ROW(first, second, third, DO) \
  DO(first, 0);                            \
  if (N > 1) DO(second, 1);                \
  if (N > 2) DO(third, 2)
#define ZERO(c, r) _tile_zero(c)
#define LOAD(c, r) _tile_loadd(c, to + r * 16 * stride, 4 * stride)
#define STORE(c, r) _tile_stored(c, to + r * 16 * stride, 4 * stride)
#define MULTIPLY(c, r)                                                    \
  do {                                                                    \
    _tile_loadd(6, a + r * 16 * stride_a + s * width, 4 * stride_a);      \
    _tile_dpbf16ps(c, 6, 7);                                              \
  } while (0)
  for (Index j = 0; j < n; j += PANEL) {
    const bool wide = n - j >= PANEL;
    float* to = out + j;
    if (add) {
      EACH_ROW(0, 2, 4, LOAD);
    } else {
      EACH_ROW(0, 2, 4, ZERO);
    }
    to += 16;
    if (add && wide) {
      EACH_ROW(1, 3, 5, LOAD);
    } else {
      EACH_ROW(1, 3, 5, ZERO);
    }
    for (Index s = 0; s < steps; s++) {
      const uint32_t* panel = b + j * depth + s * width * PANEL;
      _tile_loadd(7, panel, 4 * PANEL);
      EACH_ROW(0, 2, 4, MULTIPLY);
      if (!wide) continue;
      _tile_loadd(7, panel + 16, 4 * PANEL);
      EACH_ROW(1, 3, 5, MULTIPLY);
    }
    if (wide) {
      EACH_ROW(1, 3, 5, STORE);
    }
    to -= 16;
    EACH_ROW(0, 2, 4, STORE);
  }
#undef EACH_ROW
#undef ZERO
#undef LOAD
#undef STORE
#undef MULTIPLY
}

// Linux gives the tile registers on request. Without them, the vectors do the work.
bool may_use_amx() {
#ifdef __linux__
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl(2)
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return allowed;
#else
  return false;
#endif
}

void amx_multiply(Index m, Index n, Index k, const uint32_t* a, Index stride_a, const uint32_t* b,
                  Index depth, float* out, Index stride, bool add) {
  auto pass = [&](auto tiles, Index first, Index rows) {
    auto run = [&](Index from, Index width, Index steps, bool add) {
      amx_tiles<decltype(tiles)::value>(rows, n, width, steps, a + first * stride_a + from, stride_a,
                                        b + from * PANEL, depth, out + first * stride, stride, add);
    };
    const Index whole = k / 16 * 16;
    if (whole) run(0, 16, whole / 16, add);
    if (k > whole) run(whole, k - whole, 1, add || whole);
  };
  Index i = 0;
  for (; m - i >= 48; i += 48) pass(std::integral_constant<int, 3>(), i, 16);
  if (m - i >= 32) pass(std::integral_constant<int, 2>(), i, 16), i += 32;
  if (m - i >= 16) pass(std::integral_constant<int, 1>(), i, 16), i += 16;
  if (m > i) pass(std::integral_constant<int, 1>(), i, m - i);
  _tile_release();
}

// A's words are neighbours along the rows, but AMX wants them along k: transpose A in parts.
void amx_multiply_transposed(Index m, Index n, Index k, const uint32_t* a, Index stride_a,
                             const uint32_t* b, Index depth, float* out, Index stride, bool add) {
  alignas(64) uint32_t left[BLOCK * DEPTH];
  for (Index i = 0; i < m; i += BLOCK)
    for (Index first = 0; first < k; first += DEPTH) {
      const Index rows = std::min<Index>(BLOCK, m - i), here = std::min<Index>(DEPTH, k - first);
      for (Index r = 0; r < rows; r += L)
        for (Index w = 0; w < here; w += L) {
          words square[L] = {};
          for (Index s = 0; s < std::min<Index>(L, here - w); s++)
            square[s] = load<words>(a + (first + w + s) * stride_a + i + r);
          transpose(square);
          for (int s = 0; s < L; s++) store(left + (r + s) * DEPTH + w, square[s]);
        }
      amx_multiply(rows, n, here, left, DEPTH, b + first * PANEL, depth, out + i * stride, stride,
                   add || first > 0);
    }
}
#endif

}  // namespace

template <class T>
void multiply(Index m, Index n, Index k, Left a, const uint32_t* b, Index depth, float* out,
              Index stride, bool add) {
#ifdef __AMX_BF16__
  if (T::G == 2 && may_use_amx())
    return a.step == 1 ? amx_multiply(m, n, k, a.at, a.row, b, depth, out, stride, add)
                       : amx_multiply_transposed(m, n, k, a.at, a.step, b, depth, out, stride, add);
#endif
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
