// Causal self-attention, forward and backward, one head at a time and without a T × T matrix.
//
// Shapes: B batch, T time, H heads, D head size, C = H × D. Python calls the exported functions
// through chargpt/compute/native.py; they return 0, or 1 if memory ran out.

#include "dropout.h"
#include "products.h"
#include "softmax.h"

namespace chargpt {
namespace {

constexpr Index QUERIES = 48;  // rows of the attention matrix per block, which fits the cache

// One head of one sequence in (B, T, 3, H, D).
template <class T>
struct Head {
  typedef typename T::Value Value;
  Index t, d, row;  // row: distance between two positions, in values
  const Value *q, *k, *v;

  Head(const Value* qkv, Index index, Index t, Index heads, Index d) : t(t), d(d), row(3 * heads * d) {
    q = qkv + index / heads * t * row + index % heads * d;
    k = q + heads * d;
    v = k + heads * d;
  }

  // Prefetch the next head of this sequence.
  void prefetch_next(Index index, Index heads) const {
    if (index % heads + 1 == heads) return;
    for (const Value* first : {q, k, v}) prefetch(first + d, row, t, d);
  }
};

// Words of a sum over the keys that the positions before `last` see.
template <class T>
Index words_of(Index last) {
  return (last + T::G - 1) / T::G;
}

// Write m rows of a product, times a factor each, to rows of T.
template <class T>
void write_rows(Index m, Index d, const float* rows, const float* factors, typename T::Value* out,
                Index stride) {
  for (Index i = 0; i < m; i++)
    for (Index j = 0; j < d; j += L) {
      const vec x = load<vec>(rows + i * d + j);
      T::write(out + i * stride + j, factors ? x * factors[i] : x);
    }
}

// The working memory of one thread in the forward pass. `scores` and `weights` have rows of `wide`.
template <class T>
struct Forward {
  Packed keys, values;
  Array<float> scores, product;
  Array<typename T::Value> weights;

  Forward(Index t, Index d, Index wide)
      : keys(Packed::of(T(), d, t)),
        values(Packed::of(T(), t, d)),
        scores(QUERIES * wide),
        product(QUERIES * d),
        weights(QUERIES * wide) {}
};

template <class Scratch, class... Sizes>
std::vector<Scratch> one_per_thread(Sizes... sizes) {
  std::vector<Scratch> all;
  for (int i = 0; i < pool::threads(); i++) all.emplace_back(sizes...);
  return all;
}

// `sums` (B, H, T, 2) keeps the largest score of each row and 1 / the sum, for the backward pass.
template <class T>
void attention_forward(const typename T::Value* qkv, typename T::Value* out, float* sums, Index B,
                       Index t, Index heads, Index d, double p, uint64_t seed) {
  typedef typename T::Value Value;
  const float scale = 1.f / std::sqrt((float)d);
  const Index wide = round_up(t, LANES);
  const auto scratch = one_per_thread<Forward<T>>(t, d, wide);
  parallel(B * heads, [&](Index index, int slot) {
    const Forward<T>& my = scratch[slot];
    const Head<T> head(qkv, index, t, heads, d);
    head.prefetch_next(index, heads);
    const Dropout dropout(p, seed, (uint32_t)index);
    pack_transposed<T>(head.k, head.row, d, t, my.keys);
    pack<T>(head.v, head.row, t, d, my.values);
    Value* y = out + (index / heads * t * heads + index % heads) * d;
    for (Index first = 0; first < t; first += QUERIES) {
      const Index m = std::min(QUERIES, t - first), last = first + m, seen = round_up(last, LANES);
      float norms[QUERIES];
      multiply<T>(m, seen, d / T::G, rows_of<T>(head.q + first * head.row, head.row),
                  my.keys.array.data(), my.keys.depth, my.scores.data(), wide);
      for (Index i = 0; i < m; i++) {
        const Index query = first + i, end = round_up(query + 1, LANES);
        float* row = my.scores.data() + i * wide;
        const RowSum row_sum = exponentials(row, query, scale);
        norms[i] = 1.f / row_sum.total;
        float* kept = sums + 2 * (index * t + query);
        kept[0] = row_sum.top, kept[1] = norms[i];
        Value* weights = my.weights.data() + i * wide;
        for (Index j = 0; j < end; j += L) {
          vec x = load<vec>(row + j);
          if (dropout.on()) x *= dropout.mask((uint32_t)(query * wide + j));
          T::write(weights + j, x);
        }
        for (Index j = end; j < seen; j += L) T::write(weights + j, vec{});
      }
      multiply<T>(m, d, words_of<T>(last), rows_of<T>(my.weights.data(), wide),
                  my.values.array.data(), my.values.depth, my.product.data(), d);
      write_rows<T>(m, d, my.product.data(), norms, y + first * heads * d, heads * d);
    }
  });
}

// The working memory of one thread in the backward pass.
template <class T>
struct Backward {
  Packed keys_t, values_t, keys, queries, d_outs;
  Array<float> scores, d_weights, product, d_k, d_v;
  Array<typename T::Value> d_scores;
  // The left factors of products over queries: word (i / G, j) for key j.
  Array<uint32_t> weights_by_key, d_scores_by_key;

  Backward(Index t, Index d, Index wide)
      : keys_t(Packed::of(T(), d, t)),
        values_t(Packed::of(T(), d, t)),
        keys(Packed::of(T(), t, d)),
        queries(Packed::of(T(), t, d)),
        d_outs(Packed::of(T(), t, d)),
        scores(QUERIES * wide),
        d_weights(QUERIES * wide),
        product(QUERIES * d),
        d_k(t * d),
        d_v(t * d),
        d_scores(QUERIES * wide),
        weights_by_key(QUERIES * wide / T::G),
        d_scores_by_key(QUERIES * wide / T::G) {}
};

// For G queries from `first` + i on, replace scores and gradients of the weights by the gradients of
// the scores; see `attention_backward`.
template <class T>
void score_gradients(const Backward<T>& my, const Dropout& dropout, Index first, Index i, Index m,
                     Index wide, Index seen, float scale, const float* kept, const float* deltas) {
  for (Index j = 0; j < seen; j += L) {
    vec weight[2] = {}, d_score[2] = {};
    for_group<T>(i, m, [&](int g) {
      const Index query = first + i + g, at = (i + g) * wide + j;
      if (j <= query) {
        const vec s = fma(load<vec>(my.scores.data() + at), scale, broadcast(-kept[2 * g]));
        const vec w = visible(exponential(s) * kept[2 * g + 1], query, j, 0.f);
        vec dw = load<vec>(my.d_weights.data() + at);
        weight[g] = w;
        if (dropout.on()) {
          const vec mask = dropout.mask((uint32_t)(query * wide + j));
          weight[g] *= mask;
          dw *= mask;
        }
        // Masked again: 0 times dw may be -0 or NaN, and only in vectors that the diagonal crosses.
        d_score[g] = visible(w * (dw - deltas[g]) * scale, query, j, 0.f);
      }
      T::write(my.d_scores.data() + at, d_score[g]);
    });
    store(my.weights_by_key.data() + i / T::G * wide + j, T::pack(weight));
    store(my.d_scores_by_key.data() + i / T::G * wide + j, T::pack(d_score));
  }
}

// With weights P, dropout mask M, output O = (P M) V and upstream gradient dO:
//   dV = (P M)ᵀ dO,  dP = (dO Vᵀ) M,  dS = P (dP - rowsum(dO O)) scale,  dQ = dS K,  dK = dSᵀ Q
template <class T>
void attention_backward(const typename T::Value* qkv, const typename T::Value* out,
                        const float* sums, const typename T::Value* d_out,
                        typename T::Value* d_qkv, Index B, Index t, Index heads, Index d, double p,
                        uint64_t seed) {
  typedef typename T::Value Value;
  const float scale = 1.f / std::sqrt((float)d);
  const Index c = heads * d, wide = round_up(t, LANES);
  const auto scratch = one_per_thread<Backward<T>>(t, d, wide);
  parallel(B * heads, [&](Index index, int slot) {
    const Backward<T>& my = scratch[slot];
    const Head<T> head(qkv, index, t, heads, d);
    head.prefetch_next(index, heads);
    const Dropout dropout(p, seed, (uint32_t)index);
    const Index place = index / heads * t * c + index % heads * d;
    const Value *dy = d_out + place, *y = out + place;
    if (index % heads + 1 < heads) prefetch(dy + d, c, t, d), prefetch(y + d, c, t, d);
    pack_transposed<T>(head.k, head.row, d, t, my.keys_t);
    pack_transposed<T>(head.v, head.row, d, t, my.values_t);
    pack<T>(head.k, head.row, t, d, my.keys);
    pack<T>(head.q, head.row, t, d, my.queries);
    pack<T>(dy, c, t, d, my.d_outs);
    std::memset(my.d_k.data(), 0, t * d * sizeof(float));
    std::memset(my.d_v.data(), 0, t * d * sizeof(float));
    Value* d_q = d_qkv + (head.q - qkv);
    for (Index first = 0; first < t; first += QUERIES) {
      const Index m = std::min(QUERIES, t - first), last = first + m, seen = round_up(last, LANES);
      multiply<T>(m, seen, d / T::G, rows_of<T>(head.q + first * head.row, head.row),
                  my.keys_t.array.data(), my.keys_t.depth, my.scores.data(), wide);
      multiply<T>(m, seen, d / T::G, rows_of<T>(dy + first * c, c), my.values_t.array.data(),
                  my.values_t.depth, my.d_weights.data(), wide);
      for (Index i = 0; i < m; i += T::G) {
        float deltas[2] = {};
        for_group<T>(i, m, [&](int g) {
          const Index at = (first + i + g) * c;
          Lanes total;
          for_vectors(d, [&](Index j, int p) {
            total.part[p] = fma(T::read(dy + at + j), T::read(y + at + j), total.part[p]);
          });
          deltas[g] = sum(total);
        });
        score_gradients<T>(my, dropout, first, i, m, wide, seen, scale,
                           sums + 2 * (index * t + first + i), deltas);
      }
      multiply<T>(m, d, words_of<T>(last), rows_of<T>(my.d_scores.data(), wide),
                  my.keys.array.data(), my.keys.depth, my.product.data(), d);
      write_rows<T>(m, d, my.product.data(), nullptr, d_q + first * head.row, head.row);
      const Left weights{my.weights_by_key.data(), 1, wide}, d_scores{my.d_scores_by_key.data(), 1, wide};
      multiply<T>(last, d, words_of<T>(m), weights, my.d_outs.at(first / T::G, 0), my.d_outs.depth,
                  my.d_v.data(), d, true);
      multiply<T>(last, d, words_of<T>(m), d_scores, my.queries.at(first / T::G, 0),
                  my.queries.depth, my.d_k.data(), d, true);
    }
    write_rows<T>(t, d, my.d_k.data(), nullptr, d_q + c, head.row);
    write_rows<T>(t, d, my.d_v.data(), nullptr, d_q + 2 * c, head.row);
  });
}

}  // namespace
}  // namespace chargpt

using namespace chargpt;

#define CHECKED(...) return out_of_memory([&] { __VA_ARGS__; });
#define FUNCTIONS(T, suffix)                                                                       \
  EXPORT int attention_forward_##suffix(const T::Value* qkv, T::Value* out, float* sums, Index B,  \
      Index t, Index heads, Index d, double p, uint64_t seed) {                                    \
    CHECKED(attention_forward<T>(qkv, out, sums, B, t, heads, d, p, seed))                         \
  }                                                                                                \
  EXPORT int attention_backward_##suffix(const T::Value* qkv, const T::Value* out,                 \
      const float* sums, const T::Value* d_out, T::Value* d_qkv, Index B, Index t, Index heads,    \
      Index d, double p, uint64_t seed) {                                                          \
    CHECKED(attention_backward<T>(qkv, out, sums, d_out, d_qkv, B, t, heads, d, p, seed))          \
  }

FUNCTIONS(Float, fp32)
#ifdef CHARGPT_BF16
FUNCTIONS(Bfloat16, bf16)
#endif
