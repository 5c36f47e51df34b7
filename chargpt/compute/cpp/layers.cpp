// The layers of GPT-2 but attention, forward and backward: linear, feed-forward, LayerNorm, and
// dropout with residual sum. Each makes one pass over blocks that fit the cache.
//
// Python calls the exported C functions through ctypes; chargpt/compute/native.py names each pointer.
// They return 0, or 1 if memory ran out: all of it is allocated before the parallel parts. n rows.

#include "dropout.h"
#include "gelu.h"
#include "products.h"

namespace chargpt {
namespace {

constexpr Index STRIP = 64;   // columns of a product at a time: they stay in the first cache
constexpr Index SHARD = 128;  // columns of a weight's gradient per chunk of work
constexpr Index CACHED = 1 << 18;  // a weight with more values does not fit the second cache

// How rows are cut. A large weight streams through the cache once for each chunk, so chunks are then
// larger. No result depends on the cut: a stretch is a multiple of 32 rows, because AMX adds 32 products
// before it adds them to a sum.
struct Cut {
  Index chunk;    // rows per chunk of work
  Index stretch;  // rows whose packed values are kept for the weights' gradients

  explicit Cut(Index n_weights)
      : chunk(n_weights <= CACHED ? BLOCK : 4 * BLOCK),
        stretch(std::max(10, 4 * pool::threads()) * chunk) {}
  Index chunks(Index n) const { return (n + chunk - 1) / chunk; }
};

// Compute a product in strips of columns, and pass each block of rows to done(i, m, j, columns,
// strip): m rows from i on, columns from j on; the strip's rows are STRIP apart.
template <class T, class Done>
INLINE void in_strips(Index n_rows, Index n, Index k, Left a, const Packed& b, Done done) {
  alignas(64) float strip[BLOCK * STRIP];
  for (Index j = 0; j < n; j += STRIP)
    for (Index i = 0; i < n_rows; i += BLOCK) {
      const Index m = std::min<Index>(BLOCK, n_rows - i), columns = std::min(STRIP, n - j);
      multiply<T>(m, columns, k, a.from(i), b.at(0, j), b.depth, strip, STRIP);
      done(i, m, j, columns, strip);
    }
}

// The same, and call f(i, j, x) for each vector x: i is its row, j its column.
template <class T, class F>
INLINE void for_product(Index n_rows, Index n, Index k, Left a, const Packed& b, F f) {
  in_strips<T>(n_rows, n, k, a, b,
               [&](Index first, Index m, Index left, Index columns, const float* strip) {
                 for (Index i = 0; i < m; i++)
                   for (Index j = 0; j < columns; j += L)
                     f(first + i, left + j, load<vec>(strip + i * STRIP + j));
               });
}

// Write the first `count` values of a vector, if they are fewer than L.
template <class T>
void write_some(typename T::Value* p, vec x, Index count) {
  typename T::Value all[L];
  T::write(all, x);
  std::memcpy(p, all, count * sizeof all[0]);
}

Index blocks(Index n) { return (n + BLOCK - 1) / BLOCK; }

// The gradient of a weight and a bias, summed token by token, a stretch of tokens at a time.
// Everybody may compute a shard: no sum depends on the cut.
template <class T>
struct Gradient {
  const Packed &up, &x;  // over the tokens of the stretch: the upstream gradient, the inputs
  Index outputs, inputs;
  float *weight, *bias;

  Index shards() const { return down() * across(); }
  void add(Index shard, Index rows, bool first) const {
    const Index top = shard / across() * height(), i = shard % across() * SHARD;
    const Index groups = (rows + T::G - 1) / T::G;
    for (Index o = top; o < std::min(outputs, top + height()); o += PANEL) {
      const Index here = std::min<Index>(PANEL, outputs - o);
      multiply<T>(here, std::min(SHARD, inputs - i), groups, up.panel(o), x.at(0, i), x.depth,
                  weight + o * inputs + i, inputs, !first);
      for (Index j = 0; bias && i == 0 && j < here; j += L) {
        vec total = first ? vec{} : load<vec>(bias + o + j);
        for (Index group = 0; group < groups; group++)
          for (int g = 0; g < T::G; g++) total += T::unpack(load<words>(up.at(group, o + j)), g);
        store(bias + o + j, total);
      }
    }
  }

 private:
  Index height() const { return outputs * inputs <= CACHED ? PANEL : 128; }
  Index down() const { return (outputs + height() - 1) / height(); }
  Index across() const { return (inputs + SHARD - 1) / SHARD; }
};

// --- linear: out = x Wᵀ + b, with W (outputs × inputs) and b float; outputs may be any number

template <class T>
void linear_forward(const typename T::Value* x, const float* w, const float* b,
                    typename T::Value* out, Index n, Index inputs, Index outputs) {
  const Packed weight = pack_weight<T>(w, outputs, inputs, true);
  const Cut cut(inputs * outputs);
  parallel(cut.chunks(n), [&](Index chunk, int) {
    const Index first = chunk * cut.chunk, m = std::min(cut.chunk, n - first);
    for_product<T>(m, round_up(outputs, LANES), inputs / T::G,
                   rows_of<T>(x + first * inputs, inputs), weight, [&](Index i, Index j, vec y) {
                     typename T::Value* at = out + (first + i) * outputs + j;
                     if (b) y += load<vec>(b + j);
                     if (j + L <= outputs)
                       T::write(at, y);
                     else if (j < outputs)
                       write_some<T>(at, y, outputs - j);
                   });
  });
}

template <class T>
void linear_backward(const typename T::Value* x, const float* w, const typename T::Value* d_out,
                     typename T::Value* d_x, float* d_w, float* d_b, Index n, Index inputs,
                     Index outputs) {
  typedef typename T::Value Value;
  const Packed weight = pack_weight<T>(w, outputs, inputs, false);
  const Cut cut(inputs * outputs);
  const Packed xs = Packed::of(T(), cut.stretch, inputs), ups = Packed::of(T(), cut.stretch, outputs);
  const Index wide = round_up(outputs, LANES);
  const Array<Value> padded(wide == outputs ? 0 : pool::threads() * cut.chunk * wide);
  const Gradient<T> gradient{ups, xs, outputs, inputs, d_w, d_b};
  for (Index start = 0; start < n; start += cut.stretch) {
    const Index rows = std::min(cut.stretch, n - start);
    parallel(cut.chunks(rows), [&](Index chunk, int slot) {
      const Index first = chunk * cut.chunk, m = std::min(cut.chunk, rows - first);
      const Value* up = d_out + (start + first) * outputs;
      if (wide != outputs) {
        Value* copy = padded.data() + slot * cut.chunk * wide;
        std::memset(copy, 0, m * wide * sizeof(Value));
        for (Index i = 0; i < m; i++)
          std::memcpy(copy + i * wide, up + i * outputs, outputs * sizeof(Value));
        up = copy;
      }
      pack<T>(x + (start + first) * inputs, inputs, m, inputs, xs, first / T::G);
      pack<T>(up, wide, m, wide, ups, first / T::G);
      for_product<T>(m, inputs, weight.depth, rows_of<T>(up, wide), weight,
                     [&](Index i, Index j, vec y) {
                       T::write(d_x + (start + first + i) * inputs + j, y);
                     });
    });
    parallel(gradient.shards(), [&](Index shard, int) { gradient.add(shard, rows, start == 0); });
  }
}

// --- feed-forward: out = GELU(x W1ᵀ + b1) W2ᵀ + b2, hidden size f

// `before` (n × f) keeps the input of GELU for the backward pass.
template <class T>
void feed_forward_forward(const typename T::Value* x, const float* w1, const float* b1,
                          const float* w2, const float* b2, typename T::Value* before,
                          typename T::Value* out, Index n, Index c, Index f) {
  typedef typename T::Value Value;
  const Packed expand = pack_weight<T>(w1, f, c, true), project = pack_weight<T>(w2, c, f, true);
  const Cut cut(c * f);
  const Array<Value> hiddens(pool::threads() * cut.chunk * f);
  parallel(cut.chunks(n), [&](Index chunk, int slot) {
    const Index first = chunk * cut.chunk, m = std::min(cut.chunk, n - first);
    Value* hidden = hiddens.data() + slot * cut.chunk * f;
    for_product<T>(m, f, c / T::G, rows_of<T>(x + first * c, c), expand,
                   [&](Index i, Index j, vec v) {
                     if (b1) v += load<vec>(b1 + j);
                     T::write(before + (first + i) * f + j, v);
                     T::write(hidden + i * f + j, gelu<T>(v));
                   });
    for_product<T>(m, c, f / T::G, rows_of<T>(hidden, f), project, [&](Index i, Index j, vec y) {
      if (b2) y += load<vec>(b2 + j);
      T::write(out + (first + i) * c + j, y);
    });
  });
}

template <class T>
void feed_forward_backward(const typename T::Value* x, const float* w1, const float* w2,
                           const typename T::Value* before, const typename T::Value* d_out,
                           typename T::Value* d_x, float* d_w1, float* d_b1, float* d_w2,
                           float* d_b2, Index n, Index c, Index f) {
  typedef typename T::Value Value;
  const Packed expand = pack_weight<T>(w1, f, c, false), project = pack_weight<T>(w2, c, f, false);
  const Cut cut(c * f);
  const Packed xs = Packed::of(T(), cut.stretch, c), ups = Packed::of(T(), cut.stretch, c);
  const Packed hiddens = Packed::of(T(), cut.stretch, f), d_hiddens = Packed::of(T(), cut.stretch, f);
  const Array<Value> buffers(pool::threads() * cut.chunk * f);
  const Gradient<T> first_layer{d_hiddens, xs, f, c, d_w1, d_b1};
  const Gradient<T> second_layer{ups, hiddens, c, f, d_w2, d_b2};
  for (Index start = 0; start < n; start += cut.stretch) {
    const Index rows = std::min(cut.stretch, n - start);
    parallel(cut.chunks(rows), [&](Index chunk, int slot) {
      const Index top = chunk * cut.chunk, n_rows = std::min(cut.chunk, rows - top);
      const Value* up = d_out + (start + top) * c;
      const Value* in = before + (start + top) * f;
      Value* d_hidden = buffers.data() + slot * cut.chunk * f;
      prefetch(in, f, std::min<Index>(BLOCK, n_rows), STRIP);
      pack<T>(x + (start + top) * c, c, n_rows, c, xs, top / T::G);
      pack<T>(up, c, n_rows, c, ups, top / T::G);
      in_strips<T>(n_rows, f, project.depth, rows_of<T>(up, c), project,
                   [&](Index first, Index m, Index left, Index columns, const float* strip) {
        // Rows below, or else the next strip's.
        const Index next = first + m < n_rows ? first + m : 0, right = next ? left : left + STRIP;
        prefetch(in + next * f + right, f, std::min<Index>(BLOCK, n_rows - next),
                 std::min(STRIP, f - right));
        for (Index i = first; i < first + m; i += T::G)
          for (Index j = left; j < left + columns; j += L) {
            vec hidden[2] = {}, d_before[2] = {};
            for_group<T>(i, n_rows, [&](int g) {
              const vec h = T::read(in + (i + g) * f + j);
              const vec up = load<vec>(strip + (i + g - first) * STRIP + j - left);
              const Gate its = gate<T>(h);
              hidden[g] = h * its.s;
              d_before[g] = up * gelu_slope(h, its);
              T::write(d_hidden + (i + g) * f + j, d_before[g]);
            });
            store(hiddens.at((top + i) / T::G, j), T::pack(hidden));
            store(d_hiddens.at((top + i) / T::G, j), T::pack(d_before));
          }
      });
      for_product<T>(n_rows, c, expand.depth, rows_of<T>(d_hidden, f), expand,
                     [&](Index i, Index j, vec y) {
                       T::write(d_x + (start + top + i) * c + j, y);
                     });
    });
    const Index firsts = first_layer.shards();
    parallel(firsts + second_layer.shards(), [&](Index shard, int) {
      if (shard < firsts)
        first_layer.add(shard, rows, start == 0);
      else
        second_layer.add(shard - firsts, rows, start == 0);
    });
  }
}

// --- LayerNorm: float in, T out

template <class T>
void layer_norm_forward(const float* x, const float* gain, const float* bias,
                        typename T::Value* out, float* means, float* inverse_stds, Index n, Index c,
                        float eps) {
  parallel(blocks(n), [&](Index block, int) {
    for (Index i = block * BLOCK; i < std::min(n, (block + 1) * BLOCK); i++) {
      const float* row = x + i * c;
      Lanes total, squares;
      for_vectors(c, [&](Index j, int p) { total.part[p] += load<vec>(row + j); });
      const float mean = sum(total) / c;
      for_vectors(c, [&](Index j, int p) {
        const vec centred = load<vec>(row + j) - mean;
        squares.part[p] = fma(centred, centred, squares.part[p]);
      });
      const float inverse_std = 1.f / std::sqrt(sum(squares) / c + eps);
      means[i] = mean;
      inverse_stds[i] = inverse_std;
      for (Index j = 0; j < c; j += L) {
        vec y = (load<vec>(row + j) - mean) * inverse_std * load<vec>(gain + j);
        if (bias) y += load<vec>(bias + j);
        T::write(out + i * c + j, y);
      }
    }
  });
}

// With z the normalised x and g = upstream × gain: dx = (g - mean(g) - z mean(g z)) / std, plus the
// gradient `skipped` (or null) that reaches x around the layer.
template <class T>
void layer_norm_backward(const float* x, const float* gain, const float* means,
                         const float* inverse_stds, const typename T::Value* d_out,
                         const float* skipped, float* d_x, float* d_gain, float* d_bias, Index n,
                         Index c) {
  const Index n_blocks = blocks(n);
  const Array<float> partial(n_blocks * 2 * c);  // a block's share of the two gradients
  parallel(n_blocks, [&](Index block, int) {
    float *gains = partial.data() + block * 2 * c, *biases = gains + c;
    std::memset(gains, 0, 2 * c * sizeof(float));
    for (Index i = block * BLOCK; i < std::min(n, (block + 1) * BLOCK); i++) {
      const float *row = x + i * c, mean = means[i], inverse_std = inverse_stds[i];
      const typename T::Value* dy = d_out + i * c;
      Lanes total, along;
      for_vectors(c, [&](Index j, int p) {
        const vec z = (load<vec>(row + j) - mean) * inverse_std, up = T::read(dy + j);
        const vec g = up * load<vec>(gain + j);
        total.part[p] += g;
        along.part[p] = fma(g, z, along.part[p]);
        store(gains + j, fma(up, z, load<vec>(gains + j)));
        store(biases + j, load<vec>(biases + j) + up);
      });
      const float mean_g = sum(total) / c, mean_gz = sum(along) / c;
      for (Index j = 0; j < c; j += L) {
        const vec z = (load<vec>(row + j) - mean) * inverse_std;
        const vec g = T::read(dy + j) * load<vec>(gain + j);
        vec dx = fma(z, -mean_gz, g - mean_g) * inverse_std;
        if (skipped) dx += load<vec>(skipped + i * c + j);
        store(d_x + i * c + j, dx);
      }
    }
  });
  parallel(c / LANES, [&](Index column, int) {
    for (Index j = column * LANES; j < (column + 1) * LANES; j += L) {
      vec gains = {}, biases = {};
      for (Index block = 0; block < n_blocks; block++) {
        gains += load<vec>(partial.data() + block * 2 * c + j);
        biases += load<vec>(partial.data() + (block * 2 + 1) * c + j);
      }
      store(d_gain + j, gains);
      if (d_bias) store(d_bias + j, biases);
    }
  });
}

// --- residual sum: float x plus dropout of T

constexpr Index STEP = 4096;  // values per chunk of work

template <class T>
void residual_forward(const float* x, const typename T::Value* update, float* out, Index n, double p,
                      uint64_t seed) {
  const Dropout dropout(p, seed, 0);
  parallel((n + STEP - 1) / STEP, [&](Index step, int) {
    for (Index i = step * STEP; i < std::min(n, (step + 1) * STEP); i += L) {
      vec u = T::read(update + i);
      if (dropout.on()) u *= dropout.mask((uint32_t)i);
      store(out + i, load<vec>(x + i) + u);
    }
  });
}

template <class T>
void residual_backward(const float* d_out, typename T::Value* d_update, Index n, double p,
                       uint64_t seed) {
  const Dropout dropout(p, seed, 0);
  parallel((n + STEP - 1) / STEP, [&](Index step, int) {
    for (Index i = step * STEP; i < std::min(n, (step + 1) * STEP); i += L) {
      vec u = load<vec>(d_out + i);
      if (dropout.on()) u *= dropout.mask((uint32_t)i);
      T::write(d_update + i, u);
    }
  });
}

}  // namespace
}  // namespace chargpt

// --- the exported functions, once per value type; `_bf16` only where the processor supports it

using namespace chargpt;

#define CHECKED(...) return out_of_memory([&] { __VA_ARGS__; });
#define FUNCTIONS(T, suffix)                                                                       \
  EXPORT int layer_norm_forward_##suffix(const float* x, const float* gain, const float* bias,     \
      T::Value* out, float* means, float* inverse_stds, Index n, Index c, float eps) {             \
    CHECKED(layer_norm_forward<T>(x, gain, bias, out, means, inverse_stds, n, c, eps))             \
  }                                                                                                \
  EXPORT int layer_norm_backward_##suffix(const float* x, const float* gain, const float* means,   \
      const float* inverse_stds, const T::Value* d_out, const float* skipped, float* d_x,          \
      float* d_gain, float* d_bias, Index n, Index c) {                                            \
    CHECKED(layer_norm_backward<T>(x, gain, means, inverse_stds, d_out, skipped, d_x, d_gain,      \
      d_bias, n, c))                                                                               \
  }                                                                                                \
  EXPORT int linear_forward_##suffix(const T::Value* x, const float* w, const float* b,            \
      T::Value* out, Index n, Index inputs, Index outputs) {                                       \
    CHECKED(linear_forward<T>(x, w, b, out, n, inputs, outputs))                                   \
  }                                                                                                \
  EXPORT int linear_backward_##suffix(const T::Value* x, const float* w, const T::Value* d_out,    \
      T::Value* d_x, float* d_w, float* d_b, Index n, Index inputs, Index outputs) {               \
    CHECKED(linear_backward<T>(x, w, d_out, d_x, d_w, d_b, n, inputs, outputs))                    \
  }                                                                                                \
  EXPORT int feed_forward_forward_##suffix(const T::Value* x, const float* w1, const float* b1,    \
      const float* w2, const float* b2, T::Value* before, T::Value* out, Index n, Index c,         \
      Index f) {                                                                                   \
    CHECKED(feed_forward_forward<T>(x, w1, b1, w2, b2, before, out, n, c, f))                      \
  }                                                                                                \
  EXPORT int feed_forward_backward_##suffix(const T::Value* x, const float* w1, const float* w2,   \
      const T::Value* before, const T::Value* d_out, T::Value* d_x, float* d_w1, float* d_b1,      \
      float* d_w2, float* d_b2, Index n, Index c, Index f) {                                       \
    CHECKED(feed_forward_backward<T>(x, w1, w2, before, d_out, d_x, d_w1, d_b1, d_w2, d_b2, n, c,  \
      f))                                                                                          \
  }                                                                                                \
  EXPORT int residual_forward_##suffix(const float* x, const T::Value* update, float* out,         \
      Index n, double p, uint64_t seed) {                                                          \
    CHECKED(residual_forward<T>(x, update, out, n, p, seed))                                       \
  }                                                                                                \
  EXPORT int residual_backward_##suffix(const float* d_out, T::Value* d_update, Index n, double p, \
      uint64_t seed) {                                                                             \
    CHECKED(residual_backward<T>(d_out, d_update, n, p, seed))                                     \
  }

FUNCTIONS(Float, fp32)
#ifdef CHARGPT_BF16
FUNCTIONS(Bfloat16, bf16)
#endif
