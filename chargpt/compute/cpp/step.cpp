// What a training step computes besides the layers: the input embedding, the loss, the norm of the
// gradient, clipping and AdamW.
//
// Python calls the exported C functions through ctypes; chargpt/compute/native.py names each pointer.
// They return 0, or 1 if memory ran out. Tensors may have any size; an embedding's width c is a
// multiple of L.

#include "dropout.h"
#include "products.h"

namespace chargpt {
namespace {

constexpr Index CHUNK = 8192;  // values per chunk of work, about

// Call f(first, last) for chunks of [0, n) that hold about CHUNK values, `size` per item.
template <class F>
void chunks(Index n, Index size, F f) {
  const Index items = std::max<Index>(1, CHUNK / std::max<Index>(1, size));
  parallel((n + items - 1) / items,
           [&](Index chunk, int) { f(chunk * items, std::min(n, (chunk + 1) * items)); });
}

// --- vectors at the end of an array, whose length n is any number

// Return x[j … j + L - 1], with zeros beyond the array.
template <class T>
INLINE vec read(const typename T::Value* x, Index j, Index n) {
  if (j + L <= n) return T::read(x + j);
  typename T::Value part[L] = {};
  if (j < n) std::memcpy(part, x + j, (n - j) * sizeof part[0]);
  return T::read(part);
}
template <class T>
INLINE void write(typename T::Value* x, Index j, Index n, vec values) {
  if (j + L <= n) return T::write(x + j, values);
  typename T::Value part[L];
  T::write(part, values);
  if (j < n) std::memcpy(x + j, part, (n - j) * sizeof part[0]);
}

// --- the input embedding: dropout(tokens[ids[i]] + positions[places[i]]), n rows of c values

void embedding_forward(const Index* ids, const Index* places, const float* tokens,
                       const float* positions, float* out, Index n, Index c, double p,
                       uint64_t seed) {
  const Dropout dropout(p, seed, 0);
  chunks(n, c, [&](Index first, Index last) {
    for (Index i = first; i < last; i++) {
      const float *token = tokens + ids[i] * c, *position = positions + places[i] * c;
      for (Index j = 0; j < c; j += L) {
        const vec x = load<vec>(token + j) + load<vec>(position + j);
        store(out + i * c + j, dropout.apply(x, i * c + j));
      }
    }
  });
}

// The gradient of one of the two tables, rows × c: each row sums the positions that have its id, in
// order. A counting sort finds them.
void embedding_backward(const Index* ids, const float* d_out, float* d_table, Index n, Index rows,
                        Index c, double p, uint64_t seed) {
  const Dropout dropout(p, seed, 0);
  std::vector<Index> starts(rows + 1), sorted(n);
  for (Index i = 0; i < n; i++) starts[ids[i]]++;
  for (Index r = 0, sum = 0; r <= rows; r++) sum += starts[r], starts[r] = sum;
  for (Index i = n; i-- > 0;) sorted[--starts[ids[i]]] = i;
  chunks(rows, (n / rows + 1) * c, [&](Index first, Index last) {
    std::fill(d_table + first * c, d_table + last * c, 0.f);
    for (Index r = first; r < last; r++)
      for (Index s = starts[r]; s < starts[r + 1]; s++) {
        const Index i = sorted[s];
        for (Index j = 0; j < c; j += L) {
          float* at = d_table + r * c + j;
          store(at, load<vec>(at) + dropout.apply(load<vec>(d_out + i * c + j), i * c + j));
        }
      }
  });
}

// --- cross-entropy: the loss of each of n rows of v logits, and its mean


// Return the loss of a row, and with `d_row` write its gradient times `share`. The memory of the row
// can be read up to `end`.
template <class T>
float row_loss(const typename T::Value* row, Index target, float* exps, typename T::Value* d_row,
               float share, Index v, Index end) {
  Lanes most, total;
  for (vec& part : most.part) part = broadcast(-INFINITY);
  for_vectors(v, [&](Index j, int p) {
    const vec x = lanes() < (int32_t)(v - j) ? read<T>(row, j, end) : broadcast(-INFINITY);
    store(exps + j, x);
    most.part[p] = max_of(x, most.part[p]);
  });
  const float top = maximum(most), own = exps[target];
  for_vectors(v, [&](Index j, int p) {
    const vec e = exponential(load<vec>(exps + j) - top);
    store(exps + j, e);
    total.part[p] += e;
  });
  const float norm = sum(total);
  if (d_row) {
    const float scale = share / norm;
    for (Index j = 0; j < v; j += L) {
      const Index at = std::max<Index>(0, std::min(j, v - L));  // the last vector may overlap
      write<T>(d_row, at, v, load<vec>(exps + at) * scale);
    }
    typename T::Value value[L];
    T::write(value, broadcast((exps[target] - norm) * scale));
    d_row[target] = value[0];
  }
  return (float)std::log((double)norm) + (top - own);
}

// d_logits may be null.
template <class T>
void cross_entropy(const typename T::Value* logits, const Index* targets, float* losses, float* mean,
                   typename T::Value* d_logits, Index n, Index v) {
  const Index wide = round_up(v, LANES);
  Array<float> exps(pool::threads() * wide);
  const Index rows = std::max<Index>(1, CHUNK / v);
  parallel((n + rows - 1) / rows, [&](Index chunk, int slot) {
    const Index last = std::min(n, (chunk + 1) * rows);
    for (Index i = chunk * rows; i < last; i++)
      losses[i] = row_loss<T>(logits + i * v, targets[i], exps.data() + slot * wide,
                              d_logits ? d_logits + i * v : nullptr, 1.f / (float)n, v,
                              (last - i) * v);
  });
  double total = 0;
  for (Index i = 0; i < n; i++) total += losses[i];
  *mean = (float)(total / (double)n);
}

// --- lists of tensors, cut into pieces that do not depend on the number of threads

struct Piece {
  Index tensor, first, last;
};

std::vector<Piece> pieces_of(const Index* sizes, Index n) {
  std::vector<Piece> pieces;
  for (Index i = 0; i < n; i++)
    for (Index first = 0; first < sizes[i]; first += CHUNK)
      pieces.push_back({i, first, std::min(sizes[i], first + CHUNK)});
  return pieces;
}

// The Euclidean norm of all values together; NaN or infinite if one of them is.
void norm(const float* const* tensors, const Index* sizes, Index n, float* result) {
  const std::vector<Piece> pieces = pieces_of(sizes, n);
  std::vector<double> squares(pieces.size());
  parallel((Index)pieces.size(), [&](Index chunk, int) {
    const Piece& it = pieces[chunk];
    Lanes total;
    for_vectors(it.last - it.first, [&](Index j, int p) {
      const vec x = read<Float>(tensors[it.tensor], it.first + j, it.last);
      total.part[p] = fma(x, x, total.part[p]);
    });
    squares[chunk] = sum(total);
  });
  double total = 0;
  for (double square : squares) total += square;
  *result = (float)std::sqrt(total);
}

// out = x × factor, which may be the same tensors.
template <class T>
void scale(const typename T::Value* const* x, typename T::Value* const* out, const Index* sizes,
           Index n, float factor) {
  const std::vector<Piece> pieces = pieces_of(sizes, n);
  parallel((Index)pieces.size(), [&](Index chunk, int) {
    const auto [i, first, last] = pieces[chunk];
    for (Index j = first; j < last; j += L)
      write<T>(out[i], j, last, read<T>(x[i], j, last) * factor);
  });
}

// --- AdamW (Loshchilov & Hutter 2019, algorithm 2)

INLINE vec root(vec x) {
#if defined(__AVX512F__)
  return (vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vec)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (vec)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < L; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// Update n tensors; `steps` counts the updates of each.
void adamw(float* const* weights, const float* const* gradients, float* const* means,
           float* const* squares, float* const* steps, const Index* sizes, Index n, double lr,
           double beta1, double beta2, double weight_decay, double eps) {
  const std::vector<Piece> pieces = pieces_of(sizes, n);
  const vec new1 = broadcast((float)(1 - beta1)), new2 = broadcast((float)(1 - beta2));
  const vec old2 = broadcast((float)beta2), least = broadcast((float)eps);
  const vec decay = broadcast((float)(1 - lr * weight_decay));
  parallel((Index)pieces.size(), [&](Index chunk, int) {
    const auto [i, first, last] = pieces[chunk];
    const double step_number = *steps[i] + 1;  // the running means start at 0; correct for it
    const vec rate = broadcast((float)(lr / (1 - std::pow(beta1, step_number))));
    const vec inverse_root = broadcast((float)(1 / std::sqrt(1 - std::pow(beta2, step_number))));
    const float* gradient = gradients[i];
    float *weight = weights[i], *mean = means[i], *square = squares[i];
    for (Index j = first; j < last; j += L) {
      const vec g = read<Float>(gradient, j, last), before = read<Float>(mean, j, last);
      const vec m = fma(g - before, new1, before);
      const vec s = fma(g * new2, g, read<Float>(square, j, last) * old2);
      const vec step = rate * m / fma(root(s), inverse_root, least);
      write<Float>(mean, j, last, m);
      write<Float>(square, j, last, s);
      write<Float>(weight, j, last, fma(read<Float>(weight, j, last), decay, -step));
    }
  });
  for (Index i = 0; i < n; i++) *steps[i] += 1;
}

}  // namespace
}  // namespace chargpt

// --- the exported functions, by value type; `_bf16` only where the processor supports it

using namespace chargpt;

EXPORT int embedding_forward_fp32(const Index* ids, const Index* places, const float* tokens,
                                  const float* positions, float* out, Index n, Index c, double p,
                                  uint64_t seed) {
  return out_of_memory(
      [&] { embedding_forward(ids, places, tokens, positions, out, n, c, p, seed); });
}
EXPORT int embedding_backward_fp32(const Index* ids, const float* d_out, float* d_table, Index n,
                                   Index rows, Index c, double p, uint64_t seed) {
  return out_of_memory([&] { embedding_backward(ids, d_out, d_table, n, rows, c, p, seed); });
}
EXPORT int norm_fp32(const float* const* tensors, const Index* sizes, Index n, float* result) {
  return out_of_memory([&] { norm(tensors, sizes, n, result); });
}
EXPORT int adamw_fp32(float* const* weights, const float* const* gradients, float* const* means,
                      float* const* squares, float* const* steps, const Index* sizes, Index n,
                      double lr, double beta1, double beta2, double weight_decay, double eps) {
  return out_of_memory([&] {
    adamw(weights, gradients, means, squares, steps, sizes, n, lr, beta1, beta2, weight_decay, eps);
  });
}

#define FUNCTIONS(T, suffix)                                                                       \
  EXPORT int cross_entropy_##suffix(const T::Value* logits, const Index* targets, float* losses,   \
                                    float* mean, T::Value* d_logits, Index n, Index v) {           \
    return out_of_memory(                                                                          \
        [&] { cross_entropy<T>(logits, targets, losses, mean, d_logits, n, v); });                 \
  }                                                                                                \
  EXPORT int scale_##suffix(const T::Value* const* x, T::Value* const* out, const Index* sizes,    \
                            Index n, float factor) {                                               \
    return out_of_memory([&] { scale<T>(x, out, sizes, n, factor); });                             \
  }

FUNCTIONS(Float, fp32)
#ifdef CHARGPT_BF16
FUNCTIONS(Bfloat16, bf16)
#endif
